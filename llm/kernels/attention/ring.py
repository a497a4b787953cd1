"""Ring attention (Liu et al. 2023): queries stay on their device while keys and values travel round all devices.

At step t a device holds the keys that started t devices before it. It attends to them block by block, with the kernel
of `llm.kernels.attention.flash`, and merges the results by their log-sum-exp. In the backward pass the gradients of
keys and values travel along and arrive home after n steps. With a causal mask in zig-zag every device has, at every
step but the first, exactly two pairs of chunks to compute, whatever its place: the last chunk of its queries with the
first of the keys, and the two first or the two last chunks.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm.kernels.attention import flash
from llm.kernels.attention.flash import Inputs
from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.sequence_axis import SequenceAxis, hand_on

Index = int | jax.Array


class _Pair(NamedTuple):
    """Parts of queries and of keys that meet, and the distance between their first tokens."""

    query: Index
    key: Index
    offset: Index


@dataclasses.dataclass(frozen=True)
class _Ring:
    """What every step of the ring needs; `length` is that of a part."""

    axis: SequenceAxis
    implementation: flash.Implementation
    options: Options
    length: int

    def split(self, x: jax.Array) -> jax.Array:
        """[B, S, ...] -> [parts, B, S / parts, ...]."""
        return jnp.moveaxis(x.reshape(x.shape[0], self.axis.parts, self.length, *x.shape[2:]), 1, 0)

    def join(self, x: jax.Array, dtype: Any) -> jax.Array:
        """The inverse of `split`."""
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]).astype(dtype)

    def split_ids(self, ids: jax.Array | None) -> jax.Array | None:
        """`split`, where there are segments."""
        return None if ids is None else self.split(ids)

    def split_statistic(self, x: jax.Array) -> jax.Array:
        """[B, H, S] -> [parts, B, H, S / parts]."""
        return jnp.moveaxis(x.reshape(*x.shape[:2], self.axis.parts, self.length), 2, 0)

    def rotate(self, tree: Any) -> Any:
        """Hand everything to the next device."""
        return jax.tree.map(functools.partial(hand_on, axis=self.axis), tree)

    def pairs(self, step: Index) -> list[_Pair]:
        """What a device has to compute at a step, from 0 to n - 1."""
        n, length = self.axis.size, self.length
        rank = jax.lax.axis_index(self.axis.name)
        source = (rank - step) % n
        if not self.axis.zigzag:
            return [_Pair(0, 0, (rank - source) * length)]
        firsts = [(place * length, (2 * n - 1 - place) * length) for place in (rank, source)]
        cross = _Pair(1, 0, firsts[0][1] - firsts[1][0])
        if not self.options.causal:
            return [cross, *(_Pair(q, k, firsts[0][q] - firsts[1][k]) for q, k in ((0, 0), (1, 1), (0, 1)))]
        if isinstance(step, int) and step == 0:
            return [cross, _Pair(0, 0, 0), _Pair(1, 1, 0)]
        same = jnp.where(source < rank, 0, 1)
        return [cross, _Pair(same, same, jnp.abs(rank - source) * length)]

    def where(self, positions: Positions, query_ids: Any, key_ids: Any, pair: _Pair) -> tuple[Options, Positions]:
        """Options and positions of one pair; ids are split."""
        static, traced = (pair.offset, None) if isinstance(pair.offset, int) else (None, pair.offset)
        return dataclasses.replace(self.options, offset=static), Positions(
            None if query_ids is None else query_ids[pair.query],
            None if key_ids is None else key_ids[pair.key],
            traced,
            None,
            positions.slopes,
        )

    def around(self, body: Any, state: Any, moving: Any) -> Any:
        """Fold body(step, state, moving) -> (state, moving) over the steps, handing `moving` on between them.

        `moving` is a pair: what is only read, handed on while the step computes, and what the step adds to.
        """

        def turn(step: Index, state: Any, moving: Any) -> Any:
            read, summed = moving
            handed = self.rotate(read)
            state, summed = body(step, state, (read, summed))
            return state, (handed, self.rotate(summed))

        def scanned(carry: Any, step: jax.Array) -> Any:
            return turn(step, *carry), None

        state, moving = turn(0, state, moving)
        (state, moving), _ = jax.lax.scan(scanned, (state, moving), jnp.arange(1, self.axis.size - 1))
        state, summed = body(self.axis.size - 1, state, moving)
        return state, self.rotate(summed)


def _merge(output: jax.Array, total: jax.Array, part: jax.Array, part_total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output [B, S, H, K] and log-sum-exp [B, H, S] over two sets of keys."""
    new = jnp.logaddexp(total, part_total)
    finite = jnp.where(new == -jnp.inf, 0, new)
    old_share, share = (jnp.exp(x - finite).swapaxes(1, 2)[..., None] for x in (total, part_total))
    return output * old_share + part * share, new


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def ring_attention(
    axis: SequenceAxis,
    implementation: flash.Implementation,
    options: Options,
    inputs: Inputs,
) -> jax.Array:
    """See `llm.kernels.attention.sequence.attention`."""
    output: jax.Array = _forward(axis, implementation, options, inputs)[0]
    return output


def _forward(
    axis: SequenceAxis,
    implementation: flash.Implementation,
    options: Options,
    inputs: Inputs,
) -> Any:
    (query, key, value, positions), sinks = inputs.arrays, inputs.sinks
    ring = _Ring(axis, implementation, options, query.shape[1] // axis.parts)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    queries, query_ids = ring.split(query), ring.split_ids(positions.query_ids)

    def body(step: Index, state: Any, moving: Any) -> Any:
        outputs, totals = state
        keys, values, key_ids = moving[0]
        for pair in ring.pairs(step):
            pair_options, where = ring.where(positions, query_ids, key_ids, pair)
            output, total = implementation.forward(
                pair_options, queries[pair.query], keys[pair.key], values[pair.key], where, dtype=dtype
            )
            merged = _merge(outputs[pair.query], totals[pair.query], output, total)
            outputs, totals = (x.at[pair.query].set(y) for x, y in zip((outputs, totals), merged, strict=True))
        return (outputs, totals), None

    batch, _, heads, _ = query.shape
    state = (
        jnp.zeros(queries.shape, dtype),
        jnp.full((axis.parts, batch, heads, ring.length), -jnp.inf, dtype),
    )
    moving = ((ring.split(key), ring.split(value), ring.split_ids(positions.key_ids)), None)
    (outputs, totals), _ = ring.around(body, state, moving)
    output = ring.join(outputs, dtype)
    log_sum_exp = jnp.moveaxis(totals, 0, 2).reshape(batch, heads, -1)
    output, log_sum_exp = flash.add_sinks(output, log_sum_exp, sinks)
    output = output.astype(query.dtype)
    return output, (inputs, output, log_sum_exp)


def _backward(
    axis: SequenceAxis, implementation: flash.Implementation, options: Options, residuals: Any, d_output: jax.Array
) -> Any:
    inputs, output, log_sum_exp = residuals
    (query, key, value, positions), sinks = inputs.arrays, inputs.sinks
    ring = _Ring(axis, implementation, options, query.shape[1] // axis.parts)
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    queries, d_outputs, query_ids = ring.split(query), ring.split(d_output), ring.split_ids(positions.query_ids)
    delta = flash.output_dot_gradient(output, d_output)
    totals, deltas = ring.split_statistic(log_sum_exp), ring.split_statistic(delta)

    def body(step: Index, d_queries: Any, moving: Any) -> Any:
        (keys, values, key_ids), (d_keys, d_values) = moving
        for pair in ring.pairs(step):
            pair_options, where = ring.where(positions, query_ids, key_ids, pair)
            d_query, d_key, d_value = implementation.backward(
                pair_options,
                queries[pair.query],
                keys[pair.key],
                values[pair.key],
                where,
                totals[pair.query],
                deltas[pair.query],
                d_outputs[pair.query],
                dtype=dtype,
            )
            d_queries = d_queries.at[pair.query].add(d_query)
            d_keys, d_values = d_keys.at[pair.key].add(d_key), d_values.at[pair.key].add(d_value)
        return d_queries, (d_keys, d_values)

    keys, values = ring.split(key), ring.split(value)
    sums = jnp.zeros(keys.shape, dtype), jnp.zeros(values.shape, dtype)
    moving = ((keys, values, ring.split_ids(positions.key_ids)), sums)
    d_queries, (d_keys, d_values) = ring.around(body, jnp.zeros(queries.shape, dtype), moving)
    gradients = Inputs(
        ring.join(d_queries, query.dtype),
        ring.join(d_keys, key.dtype),
        ring.join(d_values, value.dtype),
        Positions(),
        flash.sinks_gradient(sinks, log_sum_exp, delta),
    )
    return (gradients,)


ring_attention.defvjp(_forward, _backward)
