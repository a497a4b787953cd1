"""Running stacked layers, scanned or unrolled; both only index the leading repeat axis of the parameters."""

import operator

import jax
import jax.numpy as jnp

from llm.models.context import Cache, Context
from llm.models.layer import Layer
from llm.models.remat import RematKind, rematerialized

# By position in the pattern, the sums that routers make for losses and metrics, one entry a repeat; see Router.
Auxiliary = dict[str, dict[str, jax.Array]]
# x, what the last layer reads, and the cache.
Carry = tuple[jax.Array, jax.Array | None, Cache | None]
# The layers of a repeat, its index, and what it remembers.
Slices = tuple[dict[str, Layer] | None, jax.Array, Cache | None]


def run_layers(
    layers: dict[str, Layer],
    x: jax.Array,
    context: Context,
    *,
    repeats: int,
    first: jax.Array | int = 0,
    dropout_key: jax.Array | None = None,
    cache: Cache | None = None,
    scan: bool = True,
    remat: RematKind = 'none',
    remat_names: tuple[str, ...] = (),
    shared: bool = False,
    trunk: bool = False,
) -> tuple[jax.Array, Cache | None, Auxiliary, jax.Array | None]:
    """Run the layers of the pattern in turn, `repeats` times.

    Shapes: x [B, S, D] -> [B, S, D].

    Args:
        layers: by position in the pattern, parameters stacked along a leading axis of size `repeats`.
        first: index in the whole model of the first layer, for dropout.
        dropout_key: of this step; each layer folds in its index.
        cache: by position, stacked like the layers; see Attention.init_cache.
        scan: one compiled repeat in a loop, rather than all of them one after the other.
        remat, remat_names: see llm.models.remat; one layer is recomputed at a time.
        shared: all repeats have the same parameters, stored once: their leading axis is 1 (ALBERT, Lan et al. 2020,
            section 3.1).
        trunk: whether what the last layer reads is wanted.

    Returns:
        x after the last layer, the cache with the new tokens (None if there was none), the sums of the layers that have
        some, and what the last layer reads (None unless wanted).
    """
    scan = scan and repeats > 1
    run_layer = _run_fenced_layer if scan and remat != 'none' else _run_layer
    run_layer = rematerialized(run_layer, remat, remat_names, in_scan=scan)
    # Carried along by the loop, as x is: all but the last repeat's is written over.
    read = x if trunk else None

    def run_repeat(
        x: jax.Array,
        read: jax.Array | None,
        cache: Cache | None,
        layers: dict[str, Layer],
        repeat: jax.Array | int,
        place: jax.Array | int,
    ) -> tuple[jax.Array, jax.Array | None, Cache | None, Auxiliary]:
        cache = None if cache is None else dict(cache)
        auxiliary: Auxiliary = {}
        for position, layer in layers.items():
            key = dropout_key
            if key is not None:
                key = jax.random.fold_in(key, first + repeat * len(layers) + int(position))
            read = x if trunk else None
            x, entry, sums = run_layer(
                layer, x, context, key, None if cache is None else cache[position], place, repeat
            )
            if sums:
                auxiliary[position] = sums
            if cache is not None:
                cache[position] = entry
        return x, read, cache, auxiliary

    if not scan:
        found = []
        for repeat in range(repeats):
            entry = operator.itemgetter(0 if shared else repeat)
            x, read, cache, auxiliary = run_repeat(x, read, cache, jax.tree.map(entry, layers), repeat, repeat)
            found.append(auxiliary)
        return x, cache, jax.tree.map(lambda *each: jnp.stack(each), *found), read

    only = jax.tree.map(operator.itemgetter(0), layers) if shared else None
    # In decoding the cache is carried whole, and each repeat writes to its own entry, so that XLA updates it in place.
    # In training each repeat gets the entry that it remembers alone: what a loop carries would be kept whole for the
    # backward pass of every turn.
    remembering = cache is not None and context.offset is None

    def body(carry: Carry, slices: Slices) -> tuple[Carry, tuple[Auxiliary, Cache | None]]:
        x, read, carried = carry
        own, repeat, entry = slices
        before = jax.tree.map(lambda m: m[None], entry) if remembering else carried
        layers, place = own if only is None else only, 0 if remembering else repeat
        assert layers is not None
        x, read, after, auxiliary = run_repeat(x, read, before, layers, repeat, place)
        if remembering:
            return (x, read, None), (auxiliary, jax.tree.map(operator.itemgetter(0), after))
        return (x, read, after), (auxiliary, None)

    carried, entries = (None, cache) if remembering else (cache, None)
    slices = (None if shared else layers, jnp.arange(repeats), entries)
    (x, read, carried), (auxiliary, entries) = jax.lax.scan(body, (x, read, carried), slices)
    return x, entries if remembering else carried, auxiliary, read


def _run_layer(
    layer: Layer,
    x: jax.Array,
    context: Context,
    key: jax.Array | None,
    cache: Cache | None,
    place: jax.Array | int,
    repeat: jax.Array | int,
) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
    """`place`: which entry of the cache."""
    del repeat
    return layer(x, context, key, cache, place)


def _run_fenced_layer(
    layer: Layer,
    x: jax.Array,
    context: Context,
    key: jax.Array | None,
    cache: Cache | None,
    place: jax.Array | int,
    repeat: jax.Array,
) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
    # Else the compiler casts the parameters of all layers before the loop and keeps the copy. It does not see that this
    # is 1 at every turn.
    one = jax.lax.optimization_barrier((repeat >= 0).astype(jnp.float32))
    layer = jax.tree.map(lambda parameter: parameter * one.astype(parameter.dtype), layer)
    return _run_layer(layer, x, context, key, cache, place, repeat)
