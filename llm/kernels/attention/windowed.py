"""Windows with gaps, and global tokens (Longformer, Beltagy et al. 2020, section 3.1), in S (W + N) time and memory.

A window of dilation d reaches W - 1 steps of d tokens. Tokens that are d apart lie side by side once rows are cut into
d rows of every d-th token; there it is a plain window. Attention to N global tokens is worked out apart, and the two
are put together by their log-sum-exps; so every implementation by blocks can do the parts.

Where rows are cut along a mesh axis, each piece is handed what its windows reach of its neighbours, the few global
tokens are gathered, and what those see of each piece is put together in the same way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm.errors import UserError
from llm.kernels.attention import Implementation, by_blocks, chip_of, choose, flash
from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.sequence_axis import SequenceAxis
from llm.kernels.row_pieces import join, split, with_neighbours


class GlobalTokens(NamedTuple):
    """Tokens that see all of their segment and are seen by all of it, and what they see it with.

    Attributes:
        mask: [B, S] bool.
        places: [B, N], where they are in the row, in the order in which its tokens lie on the devices that share it;
            real: [B, N], whether there are so many.
        query: [B, N, H, K]; key, value: [B, S, G, K], of all tokens, by projections of their own.
    """

    mask: jax.Array
    places: jax.Array
    real: jax.Array
    query: jax.Array
    key: jax.Array
    value: jax.Array


def find(mask: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Index of the first `most` tokens that are set, and whether there are so many: bool [B, S] -> [B, N] twice."""
    length = mask.shape[1]
    left, _ = jax.lax.top_k(jnp.where(mask, length - jnp.arange(length), 0), min(most, length))
    return jnp.where(left > 0, length - left, 0), left > 0


def pick(x: jax.Array, index: jax.Array, axis: SequenceAxis | None = None) -> jax.Array:
    """The tokens at `index`: [B, S, ...] and [B, N] -> [B, N, ...]; with `axis` x is this device's part of the row."""
    here = None
    if axis is not None:
        here, index = _own_places(index, x.shape[1], axis)
    trailing = (1,) * (x.ndim - 2)
    found = jnp.take_along_axis(x, index.reshape(*index.shape, *trailing), axis=1)
    if axis is None or here is None:
        return found
    return jax.lax.psum(jnp.where(here.reshape(*here.shape, *trailing), found, jnp.zeros_like(found)), axis.name)


def _own_places(index: jax.Array, length: int, axis: SequenceAxis) -> tuple[jax.Array, jax.Array]:
    """Which of the places are on this device, and where there; those of others are some place on it."""
    local = index - jax.lax.axis_index(axis.name) * length
    return (local >= 0) & (local < length), jnp.clip(local, 0, length - 1)


def _implementation(implementation: Implementation, device: jax.Device, queries: int) -> flash.Implementation:
    chosen = choose(implementation, device, queries)
    if chosen == 'cudnn':
        raise UserError(
            'cannot do windows with gaps or global tokens', where="attention 'cudnn'", fix="Use 'pallas_gpu' or 'auto'."
        )
    chosen = 'chunked' if chosen == 'reference' else chosen
    return by_blocks(chosen, chip_of(device, 'gpu' if chosen == 'pallas_gpu' else 'tpu'))


def _every(x: jax.Array, dilation: int, pad: int = 0) -> jax.Array:
    """Rows of every `dilation`-th token: [B, S, ...] -> [B * dilation, ceil(S / dilation), ...]."""
    more = -x.shape[1] % dilation
    x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), constant_values=pad)
    parts = x.reshape(x.shape[0], -1, dilation, *x.shape[2:]).swapaxes(1, 2)
    return parts.reshape(-1, *parts.shape[2:])


def _together(x: jax.Array, dilation: int, length: int, axis: int) -> jax.Array:
    """The inverse of `_every`, with tokens along `axis`."""
    x = jnp.moveaxis(x, axis, 1)
    parts = x.reshape(-1, dilation, *x.shape[1:]).swapaxes(1, 2)
    return jnp.moveaxis(parts.reshape(parts.shape[0], -1, *parts.shape[3:])[:, :length], 1, axis)


def windowed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int,
    dilation: int = 1,
    soft_cap: float | None = None,
    segment_ids: jax.Array | None = None,
    global_tokens: GlobalTokens | None = None,
    implementation: Implementation = 'auto',
    device: jax.Device | None = None,
    sequence_axis: SequenceAxis | None = None,
) -> jax.Array:
    """Self-attention in windows: token i sees token t where i - t is a multiple m of the dilation, 0 <= m < window.

    Without `causal` |m| < window. Besides, all tokens see the global ones of their segment, and those see all of it.

    Shapes: query [B, S, H, K], key and value [B, S, G, K] -> [B, S, H, K].

    Args:
        segment_ids: [B, S], not negative. global_tokens: not with `causal`.
        soft_cap, implementation, device: see dot_product_attention.
        sequence_axis: the mesh axis that rows are cut along; S are then this device's tokens, and global places and
            queries those of the whole row. For use inside `jax.shard_map`.
    """
    if causal and global_tokens is not None:
        raise ValueError('a causal window has no global tokens')
    device = jax.devices()[0] if device is None else device
    length = query.shape[1]
    ids = key_ids = segment_ids
    if ids is None and (global_tokens is not None or sequence_axis is not None or length % dilation):
        ids = key_ids = jnp.ones(query.shape[:2], jnp.int32)
    if global_tokens is not None and ids is not None:
        key_ids = jnp.where(global_tokens.mask, -1, ids)  # they are seen apart
    attend = functools.partial(flash.attention_and_sums, _implementation(implementation, device, length))
    q, k, v = (split(x, sequence_axis) for x in (query, key, value))
    where, before, piece = Positions(), 0, q.shape[1]
    if ids is not None and key_ids is not None:
        query_ids, key_ids = split(ids, sequence_axis), split(key_ids, sequence_axis)
        if sequence_axis is not None:
            before = _reach(window, dilation, piece, sequence_axis)
            sides = before, 0 if causal else before
            both = with_neighbours(jnp.concatenate([k, v], axis=-1), *sides, sequence_axis)  # in one message
            k, v = jnp.split(both, 2, axis=-1)
            key_ids = with_neighbours(key_ids + 2, *sides, sequence_axis) - 2  # -2 outside of the row
        where = Positions(_every(query_ids, dilation, -2), _every(key_ids, dilation, -2))
    options = Options(scale, causal, window, soft_cap, before // dilation)
    q, k, v = (_every(x, dilation) for x in (q, k, v))
    output, total = attend(options, flash.Inputs(q, k, v, where, None))
    output, total = _together(output, dilation, piece, 1), _together(total, dilation, piece, 2)
    output, total = join(output, sequence_axis), join(total.swapaxes(1, 2), sequence_axis).swapaxes(1, 2)
    if global_tokens is None or ids is None:
        return output
    index, real = global_tokens.places, global_tokens.real
    own = jnp.where(real, pick(ids, index, sequence_axis), -1)
    options = Options(scale, False, None, soft_cap, 0)
    key, value = (pick(x, index, sequence_axis) for x in (key, value))
    seen = flash.Inputs(query, key, value, Positions(ids, own), None)
    output = flash.joined([(output, total), attend(options, seen)])
    seeing = flash.Inputs(global_tokens.query, global_tokens.key, global_tokens.value, Positions(own, ids), None)
    implementation_of_few = _implementation(implementation, device, index.shape[1])
    found, total = flash.attention_and_sums(implementation_of_few, options, seeing)
    if sequence_axis is not None:
        pieces = jax.lax.all_gather((found, total), sequence_axis.name)
        found = flash.joined(list(zip(*pieces, strict=True)))
        here, index = _own_places(index, length, sequence_axis)
        real = real & here
    rows = jnp.arange(query.shape[0])[:, None]
    return output.at[rows, jnp.where(real, index, length)].set(found, mode='drop')


def _reach(window: int, dilation: int, length: int, axis: SequenceAxis) -> int:
    """How many tokens to one side of a piece of `length` its windows need: whole steps, no more than there are."""
    others = (axis.size * axis.parts - 1) * length
    return dilation * min(window - 1, -(-others // dilation))


def windowed_attention_to_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_index: jax.Array,
    *,
    scale: float,
    window: int,
    dilation: int = 1,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal windows for a few queries in a long cache, of which only the keys in the window are read.

    Shapes: query [B, S, H, K], key and value [B, T, G, K], query_index [B or 1, S] -> [B, S, H, K]. Arguments: see
    windowed_attention.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    index = query_index[..., None] - dilation * jnp.arange(window)
    index = jnp.broadcast_to(index, (query.shape[0], *index.shape[1:]))
    rows = jnp.arange(query.shape[0])[:, None, None]
    key, value = (x[rows, jnp.maximum(index, 0)] for x in (key, value))
    grouped = query.reshape(*query.shape[:2], key.shape[3], -1, query.shape[-1])
    scores = jnp.einsum('BSGRK,BSTGK->BSGRT', grouped, key, preferred_element_type=dtype) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where((index >= 0)[:, :, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum('BSGRT,BSTGK->BSGRK', weights, value, preferred_element_type=dtype)
    return mixed.reshape(query.shape).astype(query.dtype)
