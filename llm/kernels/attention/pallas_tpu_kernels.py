"""The bodies of the TPU kernels: what happens at one entry of the block table. See `pallas_tpu`.

Scores are kept transposed, [keys, queries]: what is known per query (maximum, sum, log-sum-exp, delta) is then a row
that broadcasts along sublanes, and softmax reduces over sublanes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from llm.kernels.attention.block_table import ACTIVE, BLOCK_BITS, FIRST, LAST, PARTIAL, BlockTable
from llm.kernels.attention.masking import Options

LOG2_E = math.log2(math.e)
_HIDDEN = -1e30  # finite, so that differences of two are no NaN


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one problem, after padding to whole blocks.

    Attributes:
        groups: G; heads: query heads that share a key/value head.
        block_q, block_k: queries and keys of a block. key_blocks: of a row.
    """

    groups: int
    heads: int
    head_size: int
    block_q: int
    block_k: int
    key_blocks: int


def unpack(packed: Any) -> tuple[Any, Any]:
    """The blocks of queries and of keys of an entry of the block table."""
    mask = (1 << BLOCK_BITS) - 1
    return packed & mask, packed >> BLOCK_BITS & mask


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Product of two matrices over dimension contract[0] of the first and contract[1] of the second."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=dtype)


class Step:
    """What a kernel knows at one step of the grid.

    Args:
        refs: by name; 'entries', 'row_scalars' (offset and key length of each row) and, with ALiBi, 'slopes' lie in
            scalar memory; 'query_ids' [1, 1, block_q] and 'key_ids' [1, block_k, lanes] are there with segments.
    """

    def __init__(self, options: Options, sizes: Sizes, table: BlockTable, refs: dict[str, Any]):
        self.options, self.sizes, self.table, self.refs = options, sizes, table, refs
        self.row, self.group, self.entry = (pl.program_id(axis) for axis in range(3))
        packed = refs['entries'][(self.row * table.length if table.rows > 1 else 0) + self.entry]
        self.query_block, self.key_block = unpack(packed)
        self.flags = packed >> 2 * BLOCK_BITS

    def has(self, flag: int) -> jax.Array:
        """Whether the entry of this step has the flag."""
        return self.flags & flag != 0

    def each_head(self, body: Callable[[jax.Array | int, bool], None]) -> None:
        """Run `body(head, partial)` for every query head, if there is anything to compute."""
        for partial in self.table.kinds:
            wanted = self.has(ACTIVE) & (self.has(PARTIAL) == partial)
            pl.when(wanted)(functools.partial(self._heads, body, partial))

    def _heads(self, body: Callable[[jax.Array | int, bool], None], partial: bool) -> None:
        if self.sizes.heads == 1:
            body(0, partial)
        else:
            jax.lax.fori_loop(0, self.sizes.heads, lambda head, _: body(head, partial), None)

    def scores(self, products: jax.Array, head: jax.Array | int, partial: bool) -> tuple[jax.Array, jax.Array | None]:
        """Scores in units of log 2, and which of them count (None: all), [keys, queries], from products q . k."""
        options, sizes = self.options, self.sizes
        slopes = self.refs.get('slopes')
        if options.soft_cap is None and slopes is None:
            scores = products * (options.scale * LOG2_E)  # one multiplication: here they are what takes time
        elif not partial and slopes is None:
            scores = options.scores(products * options.scale, products, None) * LOG2_E
        if not partial and slopes is None:
            return scores, None
        shape = (sizes.block_k, sizes.block_q)
        key_index = self.key_block * sizes.block_k + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        query_index = self.query_block * sizes.block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        distance = self.refs['row_scalars'][2 * self.row] + query_index - key_index
        if options.soft_cap is not None or slopes is not None:
            slope = None if slopes is None else slopes[self.group * sizes.heads + head]
            scores = options.scores(products * options.scale, distance, slope) * LOG2_E
        if not partial:
            return scores, None
        more = [key_index < self.refs['row_scalars'][2 * self.row + 1]]
        if 'query_ids' in self.refs:
            more.append(self.refs['key_ids'][0][:, :1] == self.refs['query_ids'][0])
        return scores, options.allowed(distance, *more)


def forward_kernel(step: Step) -> None:
    """Online softmax over the keys of a block of queries.

    Reads 'query', 'key', 'value'; writes 'output' and 'log_sum_exp'; keeps 'highest' and 'total' [heads, 1, queries]
    and 'mixed' [heads, head size, queries].
    """
    refs = step.refs
    query, key, value = refs['query'], refs['key'], refs['value']
    highest, total, mixed = refs['highest'], refs['total'], refs['mixed']
    dtype = mixed.dtype

    @pl.when(step.has(FIRST))
    def clear() -> None:
        highest[...] = jnp.full_like(highest, _HIDDEN)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    def add(head: jax.Array | int, partial: bool) -> None:
        products = _dot(key[0, 0], query[0, 0, head], (1, 1), dtype)
        scores, allowed = step.scores(products, head, partial)
        if allowed is not None:
            scores = jnp.where(allowed, scores, _HIDDEN)
        before = highest[head]
        now = jnp.maximum(before, jnp.max(scores, axis=0, keepdims=True))
        weights = jnp.exp2(scores - now)
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0)
        shrink = jnp.exp2(before - now)
        highest[head] = now
        total[head] = total[head] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        mixed[head] = mixed[head] * shrink + _dot(value[0, 0], weights.astype(value.dtype), (0, 0), dtype)

    step.each_head(add)

    @pl.when(step.has(LAST))
    def write() -> None:
        empty = total[...] == 0
        divisor = jnp.where(empty, 1, total[...])
        refs['log_sum_exp'][0, 0] = jnp.where(empty, -jnp.inf, highest[...] / LOG2_E + jnp.log(divisor))
        output = refs['output']
        for head in range(step.sizes.heads):
            output[0, 0, head] = (mixed[head] / divisor[head]).T.astype(output.dtype)


def backward_kernel(step: Step, *, queries_outer: bool) -> None:
    """Gradients of queries ('d_query', summed in 'sum_query' [heads, head size, queries]), of keys and values, or all.

    Gradients of keys and values ('d_key' and 'd_value', summed in 'sum_key' and 'sum_value' [blocks, keys, head size])
    are written block by block if the table goes by keys. If it goes by queries they stay on the chip, all of them,
    until the end. Reads 'query', 'key', 'value', 'd_output', 'log_sum_exp' in units of log 2, 'delta'.
    """
    refs = step.refs
    query, key, value, d_output = (refs[name] for name in ('query', 'key', 'value', 'd_output'))
    log_sum_exp, delta = refs['log_sum_exp'], refs['delta']
    dtype, scale = delta.dtype, step.options.scale
    slot = step.key_block if queries_outer else 0
    first, last = step.has(FIRST), step.has(LAST)
    if queries_outer:
        first_key, last_key = step.entry == 0, step.entry == step.table.length - 1
    else:
        first_key, last_key = first, last

    def clear(*names: str) -> None:
        for name in names:
            refs[name][...] = jnp.zeros_like(refs[name])

    if 'sum_query' in refs:
        pl.when(first)(functools.partial(clear, 'sum_query'))
    if 'sum_key' in refs:
        pl.when(first_key)(functools.partial(clear, 'sum_key', 'sum_value'))

    def add(head: jax.Array | int, partial: bool) -> None:
        q, k, v, d_out = query[0, 0, head], key[0, 0], value[0, 0], d_output[0, 0, head]
        products = _dot(k, q, (1, 1), dtype)
        scores, allowed = step.scores(products, head, partial)
        # No score exceeds the log-sum-exp, but of scores near 1e9 a rounding more or less is e**64.
        weights = jnp.exp2(jnp.minimum(scores - log_sum_exp[0, 0, head], 0))
        if allowed is not None:
            weights = jnp.where(allowed, weights, 0)
        d_products = weights * (_dot(v, d_out, (1, 1), dtype) - delta[0, 0, head])
        if allowed is not None:  # what is hidden may have overflowed, and 0 times infinity is no number
            d_products = jnp.where(allowed, d_products, 0)
        d_products = step.options.products_gradient(products * scale, d_products).astype(q.dtype)
        if 'sum_key' in refs:
            refs['sum_value'][slot] += _dot(weights.astype(d_out.dtype), d_out, (1, 0), dtype)
            refs['sum_key'][slot] += _dot(d_products, q, (1, 0), dtype)
        if 'sum_query' in refs:
            refs['sum_query'][head] += _dot(k, d_products, (0, 0), dtype)

    step.each_head(add)

    def write_query() -> None:
        out = refs['d_query']
        for head in range(step.sizes.heads):
            out[0, 0, head] = (refs['sum_query'][head] * scale).T.astype(out.dtype)

    def write_key() -> None:
        refs['d_key'][0, 0] = (refs['sum_key'][...] * scale).astype(refs['d_key'].dtype)
        refs['d_value'][0, 0] = refs['sum_value'][...].astype(refs['d_value'].dtype)

    if 'sum_query' in refs:
        pl.when(last)(write_query)
    if 'sum_key' in refs:
        pl.when(last_key)(write_key)
