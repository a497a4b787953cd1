"""Tokens to the experts that were chosen for them, wherever those are, and what they made of them back.

Every device sorts its own choices by expert, so that each expert's tokens lie side by side. Where experts are cut over
a mesh axis, tokens go to their experts by an all-to-all and come back by another. How many go to each device is known
only at run time, while an all-to-all has fixed sizes: so the choices go in rounds of a fixed number of rows for each
device, as many rounds as the fullest pair of devices needs. None is dropped, and memory does not depend on the balance.
The rounds are a loop whose backward pass is the same loop.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llm.parallel.sharding import Axes, dividing, manual_axes, names, rules_in_force, split_over

# (matrices, rows [R, D], rows of each expert [E]) -> [R, D]; rows after the last expert's are zeros and stay zeros.
Transform = Callable[[Any, jax.Array, jax.Array], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """Which experts see which tokens.

    Attributes:
        expert: [B, S, C] int, C choices of each token. weight: [B, S, C] of what they make of it in the sum.
        kept: [B, S, C] bool; the others are not computed.
    """

    expert: jax.Array
    weight: jax.Array
    kept: jax.Array


def dispatch(
    transform: Transform,
    x: jax.Array,
    choices: Choices,
    matrices: dict[str, jax.Array],
    axes: Mapping[str, Axes],
    num_experts: int,
    *,
    most_rows: Callable[[int, int], int] | None = None,
    share: float = 0.5,
) -> jax.Array:
    """The weighted sum of what the chosen experts make of each token. Shapes: x [B, S, D] -> [B, S, D].

    Args:
        transform: the experts, all at once.
        matrices: parameters of the experts, [E, ...]. axes: their logical axes; along 'mlp' each device may have a
            part, and what the parts make adds up.
        most_rows: (tokens per row, rows) here -> a bound on the number of choices of one expert that are kept.
        share: rows of a round over what balanced experts need in all.
    """
    run = functools.partial(_on_device, transform, num_experts=num_experts, most_rows=most_rows, share=share)
    current = rules_in_force()
    if current is None or current[0].size == 1:
        return run(x, choices, matrices, experts=(), others=())
    mesh, rules = current
    open_axes = set(mesh.axis_names) - set(mesh.manual_axes)
    cuts = rules.partition(('batch', 'sequence'), mesh, parameters=False)
    batch, sequence = (dividing(cut, size, mesh) for cut, size in zip(cuts, x.shape, strict=False))
    tokens = {*batch, *sequence, *manual_axes('batch', parameters=False)}
    experts = tuple(a for a in split_over('experts', parameters=True) if a in tokens)
    specs = {name: rules.partition(axes[name], mesh, parameters=True) for name in matrices}
    parts = {a for name in matrices for a in _over(specs[name], axes[name], 'mlp') if a not in tokens}
    residual = names(rules.partition(('batch', 'residual'), mesh, parameters=False)[1])
    scattered = tuple(a for a in residual if a in parts)
    # The sum over parts of the hidden layer ends in the layout of the residual stream, if it may.
    length = x.shape[1] // math.prod(mesh.shape[a] for a in sequence)
    if residual != (*sequence, *scattered) or length % math.prod(mesh.shape[a] for a in scattered):
        scattered = ()

    def on_device(x: jax.Array, choices: Choices, matrices: dict[str, jax.Array]) -> jax.Array:
        whole = {
            name: _gathered(matrix, specs[name], axes[name], {*experts, *parts}) for name, matrix in matrices.items()
        }
        y = run(x, choices, whole, experts=experts, others=tuple(a for a in mesh.axis_names if a in tokens))
        if scattered:
            y = jax.lax.psum_scatter(y, scattered, scatter_dimension=1, tiled=True)
        rest = tuple(a for a in mesh.axis_names if a in parts and a not in scattered)
        return jax.lax.psum(y, rest) if rest else y

    if not open_axes:
        return on_device(x, choices, matrices)
    spec = P(batch or None, sequence or None, None)
    out = P(batch or None, (*sequence, *scattered) or None, None)
    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=(spec, spec, specs), out_specs=out, axis_names=open_axes, check_vma=False
    )
    result: jax.Array = mapped(x, choices, matrices)
    return result


def _over(spec: P, axes: Axes, axis: str) -> tuple[str, ...]:
    return tuple(a for entry, each in zip(spec, axes, strict=True) if each == axis for a in names(entry))


def _gathered(matrix: jax.Array, spec: P, axes: Axes, cut: set[str]) -> jax.Array:
    """Whole but along the mesh axes `cut`."""
    for dimension, entry in enumerate(spec):
        over = tuple(a for a in names(entry) if a not in cut)
        if over:
            matrix = jax.lax.all_gather(matrix, over, axis=dimension, tiled=True)
    return matrix


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sorted:
    """Choices of this device, sorted by expert; those that are not kept come last.

    Attributes:
        choice: [N] number t * C + c of the choice at each place. place: [T, C] of each choice. expert, kept: [T, C].
        starts: [E + 1] place of each expert's first choice.
    """

    choice: jax.Array
    place: jax.Array
    expert: jax.Array
    kept: jax.Array
    starts: jax.Array


def _sorted(choices: Choices, num_experts: int) -> _Sorted:
    expert = choices.expert.reshape(-1, choices.expert.shape[-1])
    kept = choices.kept.reshape(expert.shape)
    key = jnp.where(kept, expert, num_experts).reshape(-1)
    choice = jnp.argsort(key, stable=True)
    starts = jnp.searchsorted(key[choice], jnp.arange(num_experts + 1)).astype(jnp.int32)
    return _Sorted(choice, _inverse(choice).reshape(expert.shape), expert, kept, starts)


def _inverse(permutation: jax.Array) -> jax.Array:
    return jnp.zeros_like(permutation).at[permutation].set(jnp.arange(permutation.size, dtype=permutation.dtype))


@jax.custom_vjp
def _take(x: jax.Array, index: jax.Array, valid: jax.Array, back: jax.Array, back_valid: jax.Array) -> jax.Array:
    """Rows of x at `index`, zeros where not `valid`. The gradient is a gather too, where a transposed one would add
    row by row: row i of x was taken as rows back[i] [...] of the flattened result.
    """
    return jnp.where(valid[..., None], jnp.take(x, index, axis=0, mode='clip'), 0)


def _take_forward(x: jax.Array, index: jax.Array, *others: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _take(x, index, *others), others[1:]


def _take_backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    back, valid = kept
    rows = jnp.take(gradient.reshape(-1, gradient.shape[-1]), back, axis=0, mode='clip')
    rows = jnp.where(valid[..., None], rows, 0)
    return (rows if back.ndim == 1 else rows.sum(1), None, None, None, None)


_take.defvjp(_take_forward, _take_backward)


def _on_device(
    transform: Transform,
    x: jax.Array,
    choices: Choices,
    matrices: Any,
    *,
    experts: tuple[str, ...],
    others: tuple[str, ...],
    num_experts: int,
    most_rows: Callable[[int, int], int] | None,
    share: float,
) -> jax.Array:
    """`dispatch` of one device's tokens. `experts`, `others`: mesh axes that cut the experts, and the tokens."""
    batch, length, width = x.shape
    ways = jax.lax.axis_size(experts) if experts else 1
    columns, tokens = choices.expert.shape[-1], batch * length
    own = num_experts // ways
    bound = tokens * min(columns, own)  # of the choices that one device can get from another
    if most_rows is not None:
        bound = min(bound, own * most_rows(length, batch))
    rows = min(bound, max(8, -(-math.ceil(share * tokens * columns / ways) // 8) * 8)) if ways > 1 else bound
    order = _sorted(choices, num_experts)
    one_round = functools.partial(_round, transform, rows=rows, ways=ways, own=own, experts=experts)
    operands = (x.reshape(tokens, width), choices.weight.reshape(tokens, columns), matrices)
    if rows == bound:
        return one_round(operands, order, 0).reshape(x.shape)
    fullest = jnp.max(jnp.diff(order.starts[::own]))
    count = jax.lax.pmax(-(-fullest // rows), others)
    return _rounds(one_round, operands, order, count).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(one_round: Callable[..., jax.Array], operands: Any, order: _Sorted, count: jax.Array) -> jax.Array:
    def body(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + one_round(operands, order, index)

    return jax.lax.fori_loop(0, count, body, jnp.zeros_like(operands[0]))


def _rounds_forward(one_round: Any, operands: Any, order: _Sorted, count: jax.Array) -> tuple[jax.Array, Any]:
    return _rounds(one_round, operands, order, count), (operands, order, count)


def _rounds_backward(one_round: Any, kept: Any, gradient: jax.Array) -> tuple[Any, None, None]:
    operands, order, count = kept

    def body(index: jax.Array, total: Any) -> Any:
        _, vjp = jax.vjp(lambda operands: one_round(operands, order, index), operands)
        return jax.tree.map(jnp.add, total, vjp(gradient)[0])

    return jax.lax.fori_loop(0, count, body, jax.tree.map(jnp.zeros_like, operands)), None, None


_rounds.defvjp(_rounds_forward, _rounds_backward)


def _round(
    transform: Transform,
    operands: tuple[jax.Array, jax.Array, Any],
    order: _Sorted,
    index: jax.Array | int,
    *,
    rows: int,
    ways: int,
    own: int,
    experts: tuple[str, ...],
) -> jax.Array:
    """What the choices of one round add: each of `ways` devices gets the next `rows`. [T, D] -> [T, D]."""
    x, weight, matrices = operands
    columns = weight.shape[1]
    first = order.starts[:-1:own] + index * rows  # [ways]
    place = first[:, None] + jnp.arange(rows)
    sent = (place < order.starts[own::own][:, None]).reshape(-1)
    choice = jnp.take(order.choice, place.reshape(-1), mode='clip')  # [ways * rows], as what follows
    # Where each choice of a token lies among those that are sent.
    device = order.expert // own
    offset = order.place - jnp.take(first, device)
    mine = order.kept & (offset >= 0) & (offset < rows)
    slot = device * rows + offset
    few = ways * rows >= weight.size  # not so where experts choose: any of them may have chosen any token
    take = _take if few else _take_and_add
    out = take(x, choice // columns, sent, slot, mine)
    if ways == 1:
        made = transform(matrices, out, jnp.diff(order.starts))
    else:
        expert = jnp.take(order.expert.reshape(-1), choice) % own
        made = _elsewhere(transform, matrices, out, jnp.where(sent, expert, own), ways, own, experts)
    dtype = jnp.promote_types(weight.dtype, made.dtype)
    if few:
        found = _take(made, slot, mine, choice, sent).astype(dtype)
        return jnp.einsum('TC,TCD->TD', weight, found).astype(x.dtype)
    scale = jnp.where(sent, weight.reshape(-1)[choice], 0)
    total = jnp.zeros(x.shape, dtype).at[choice // columns].add(scale[:, None] * made)
    return total.astype(x.dtype)


def _take_and_add(x: jax.Array, index: jax.Array, valid: jax.Array, *_: jax.Array) -> jax.Array:
    return jnp.where(valid[..., None], jnp.take(x, index, axis=0, mode='clip'), 0)


def _elsewhere(
    transform: Transform, matrices: Any, rows: jax.Array, expert: jax.Array, ways: int, own: int, axes: tuple[str, ...]
) -> jax.Array:
    """`transform` on the devices that have the experts: rows [ways * R, D], R for each of them -> the same.

    Args:
        expert: [ways * R] number of each row's expert among its device's `own`; `own` if there is no row.
    """

    def exchange(x: jax.Array) -> jax.Array:
        apart = x.reshape(ways, -1, *x.shape[1:])
        return jax.lax.all_to_all(apart, axes, split_axis=0, concat_axis=0, tiled=True).reshape(x.shape)

    rows, expert = exchange(rows), exchange(expert)
    by_expert = jnp.argsort(expert, stable=True)
    back = _inverse(by_expert)
    starts = jnp.searchsorted(expert[by_expert], jnp.arange(own + 1))
    real = jnp.ones(expert.shape, bool)
    made = transform(matrices, _take(rows, by_expert, real, back, real), jnp.diff(starts).astype(jnp.int32))
    return exchange(_take(made, back, real, by_expert, real))
