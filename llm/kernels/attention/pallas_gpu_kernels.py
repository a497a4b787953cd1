"""The bodies of the GPU kernels: what one program does for its block of queries, or of keys. See `pallas_gpu`.

Scores are [queries, keys] where a program has a block of queries and [keys, queries] where it has one of keys, so that
every product but that of two blocks as they are loaded has the scores on its left, which tensor cores take from
registers.
"""

import dataclasses
import functools
import math
import struct
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llm.kernels.attention.masking import Options

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one problem.

    Attributes:
        queries, keys: S and T. heads: query heads that share a key/value head.
        head_size: K; padded_size: a power of two that holds it.
        block_q, block_k: queries and keys of a block.
        blocks: blocks that have a program each. backwards: whether the last of them comes first.
    """

    queries: int
    keys: int
    heads: int
    head_size: int
    padded_size: int
    block_q: int
    block_k: int
    blocks: int
    backwards: bool

    def block(self, program: Any) -> Any:
        """The block of a program, by its place in the grid."""
        return self.blocks - 1 - program if self.backwards else program


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int], dtype: Any) -> jax.Array:
    """Product of two matrices over dimension contract[0] of the first and contract[1] of the second."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=dtype)


def _instruction(ptx: str, *arguments: jax.Array) -> jax.Array:
    """One instruction on float32 arrays of the same shape, element by element."""
    like = jax.ShapeDtypeStruct(arguments[0].shape, jnp.float32)
    constraints = ','.join(['=f', *('f' for _ in arguments)])
    (result,) = plgpu.elementwise_inline_asm(
        ptx, args=arguments, constraints=constraints, pack=1, result_shape_dtypes=[like]
    )
    return result


class Program:
    """What a kernel knows: one program of the grid (block, head, row of the batch).

    Args:
        kinds: see BlockRanges.
        refs: by name; 'edges' [4], 'row_scalars' (offset and key length of the row), 'slopes' [H] with ALiBi, and
            'query_ids', 'key_ids' with segments.
        dtype: of statistics and sums.
        native: whether NVIDIA's instructions may be named: float32, and not interpreted.
    """

    def __init__(
        self,
        options: Options,
        sizes: Sizes,
        kinds: tuple[bool, bool, bool],
        refs: dict[str, Any],
        dtype: Any,
        native: bool,
    ):
        self.options, self.sizes, self.kinds, self.refs, self.dtype = options, sizes, kinds, refs, dtype
        self.native = native
        self.block = sizes.block(pl.program_id(0))
        self.head = pl.program_id(1)
        # Scores are `factor` times what `raw_scores` gives, in units of log 2; it is positive, so that it may follow
        # a maximum, and goes into one multiply-add with the difference that is raised to a power of two.
        self.plain = options.soft_cap is None and 'slopes' not in refs and options.scale > 0
        self.factor = LOG2_E * (options.scale if self.plain else 1.0)

    def queries(self, name: str, first: Any, head: Any = None) -> jax.Array:
        """[block_q, padded size] of an array, from query `first` of the ref on; zeros where there is none."""
        return self._rows(name, first, head, self.sizes.block_q, self.sizes.queries)

    def keys(self, name: str, first: Any, *, tail: bool = True) -> jax.Array:
        """[block_k, padded size] of an array, from key `first` of the ref on; `tail`: whether some may be missing."""
        return self._rows(name, first, None, self.sizes.block_k, self.sizes.keys if tail else 0)

    def _rows(self, name: str, first: Any, head: Any, count: int, length: int) -> jax.Array:
        part = self._slice(first, count)
        view = self.refs[name].at[part] if head is None else self.refs[name].at[part, head]
        mask = self._mask(name, first, count, length)
        loaded: jax.Array = plgpu.load(view) if mask is None else plgpu.load(view, mask=mask, other=0)
        return loaded

    def _slice(self, first: Any, count: int) -> Any:
        return slice(None) if first is None else pl.ds(first, count)

    def _mask(self, name: str, first: Any, count: int, length: int) -> jax.Array | None:
        """Which elements of rows `first` (None: of this program's own block) and following exist; None if all do."""
        sizes = self.sizes
        mask = None
        if length % count:
            start = self.block * count if first is None else first
            mask = (start + jax.lax.iota(jnp.int32, count) < length)[:, None]
        if sizes.padded_size != sizes.head_size:
            columns = (jax.lax.iota(jnp.int32, sizes.padded_size) < sizes.head_size)[None, :]
            mask = columns if mask is None else mask & columns
        return mask

    def statistic(self, name: str, first: Any, head: Any, other: float) -> jax.Array:
        """[block_q] of an array with a number per query; `other` where there is no query."""
        count = self.sizes.block_q
        ref = self.refs[name]
        view = ref if first is None else ref.at[head, pl.ds(first, count)]
        if not self.sizes.queries % count:
            whole: jax.Array = plgpu.load(view)
            return whole
        start = self.block * count if first is None else first
        mask = start + jax.lax.iota(jnp.int32, count) < self.sizes.queries
        loaded: jax.Array = plgpu.load(view, mask=mask, other=other)
        return loaded

    def store(self, name: str, value: jax.Array, length: int) -> None:
        """Write this program's block [block, padded size], or [block], of an array of `length` rows."""
        ref, count = self.refs[name], value.shape[0]
        mask = self._mask(name, None, count, length)
        if value.ndim == 1:
            exists = self.block * count + jax.lax.iota(jnp.int32, count) < length
            mask = exists if length % count else None
        plgpu.store(ref, value.astype(ref.dtype), mask=mask)

    def over_blocks(self, body: Callable[..., Any], carry: Any) -> Any:
        """Fold body(block, carry, partial=...) over the blocks of this program's range."""
        edges = [self.refs['edges'][i] for i in range(4)]
        for part, there in enumerate(self.kinds):
            if there:
                each = functools.partial(body, partial=part != 1)
                carry = jax.lax.fori_loop(edges[part], edges[part + 1], each, carry)
        return carry

    def exponents(self, raw: jax.Array, base: jax.Array) -> jax.Array:
        """Scores less `base`, which broadcasts, in units of log 2: raw * factor - base."""
        if not self.native:
            return raw * self.factor - base
        # XLA keeps the compiler from fusing the two. A number in PTX is written as its bits.
        bits = struct.pack('>f', self.factor).hex()
        return _instruction(f'fma.rn.ftz.f32 $0, $1, 0f{bits}, $2;', raw, jnp.broadcast_to(-base, raw.shape))

    def exp2(self, x: jax.Array) -> jax.Array:
        """2**x."""
        # The instruction alone: around it go three more for results below 2**-126, which here are as good as zero.
        return _instruction('ex2.approx.ftz.f32 $0, $1;', x) if self.native else jnp.exp2(x)

    def raw_scores(
        self, products: jax.Array, head: Any, first_query: Any, first_key: Any, partial: bool, *, keys_first: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """Scores over `factor`, -inf for hidden pairs, and which pairs count (None: all), from products q . k.

        Args:
            first_query, first_key: index in the row; None for those of this program's own block.
            keys_first: whether arrays are [keys, queries].
        """
        options, sizes = self.options, self.sizes
        slopes = self.refs.get('slopes')
        raw = products if self.plain else products * options.scale
        if not partial and slopes is None:
            return raw if self.plain else options.scores(raw, raw, None), None
        own = first_query is None
        query_index = (self.block * sizes.block_q if own else first_query) + jax.lax.iota(jnp.int32, sizes.block_q)
        key_index = (first_key if own else self.block * sizes.block_k) + jax.lax.iota(jnp.int32, sizes.block_k)

        def across(of_queries: jax.Array, of_keys: jax.Array) -> tuple[jax.Array, jax.Array]:
            if keys_first:
                return of_queries[None, :], of_keys[:, None]
            return of_queries[:, None], of_keys[None, :]

        queries, keys = across(query_index, key_index)
        distance = self.refs['row_scalars'][0] + queries - keys
        if not self.plain:
            raw = options.scores(raw, distance, None if slopes is None else slopes[head])
        if not partial:
            return raw, None
        more = [keys < self.refs['row_scalars'][1]]
        if 'query_ids' in self.refs:
            query_ids = self.refs['query_ids'][self._slice(first_query, sizes.block_q)]
            key_ids = self.refs['key_ids'][self._slice(first_key, sizes.block_k)]
            id_pair = across(query_ids, key_ids)
            more.append(id_pair[0] == id_pair[1])
        allowed = options.allowed(distance, *more)
        assert allowed is not None
        return jnp.where(allowed, raw, -jnp.inf), allowed

    def gradients(
        self,
        products: jax.Array,
        raw: jax.Array,
        allowed: jax.Array | None,
        d_weights: jax.Array,
        log_sum_exp: jax.Array,
        delta: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Weights, and the gradient of scaled products; log_sum_exp (in units of log 2) and delta broadcast."""
        # No score exceeds the log-sum-exp, but of scores near 1e9 a rounding more or less is e**64.
        weights = self.exp2(jnp.minimum(self.exponents(raw, log_sum_exp), 0))
        d_scores = weights * (d_weights - delta)
        if allowed is not None:  # what is hidden may have overflowed, and 0 times infinity is no number
            d_scores = jnp.where(allowed, d_scores, 0)
        return weights, self.options.products_gradient(products * self.options.scale, d_scores)


def forward_kernel(program: Program) -> None:
    """Online softmax of a block of queries. Reads 'query', 'key', 'value'; writes 'output' and 'log_sum_exp'."""
    sizes, dtype = program.sizes, program.dtype
    query = program.queries('query', None)

    def add(block: Any, carry: Any, *, partial: bool) -> Any:
        mixed, highest, total = carry
        first = block * sizes.block_k
        key = program.keys('key', first, tail=partial)
        products = _dot(query, key, (1, 1), dtype)
        raw, allowed = program.raw_scores(products, program.head, None, first, partial, keys_first=False)
        now = jnp.maximum(highest, jnp.max(raw, axis=1) * program.factor)
        # A query that has met only hidden keys so far: -inf less 0, and not less -inf.
        base = now if allowed is None else jnp.where(now == -jnp.inf, 0, now)
        weights = program.exp2(program.exponents(raw, base[:, None]))
        shrink = program.exp2(highest - base)
        value = program.keys('value', first, tail=partial)
        mixed = mixed * shrink[:, None] + _dot(weights.astype(value.dtype), value, (1, 0), dtype)
        return mixed, now, total * shrink + jnp.sum(weights, axis=1)

    mixed, highest, total = program.over_blocks(
        add,
        (
            jnp.zeros((sizes.block_q, sizes.padded_size), dtype),
            jnp.full((sizes.block_q,), -jnp.inf, dtype),
            jnp.zeros((sizes.block_q,), dtype),
        ),
    )
    empty = total == 0
    divisor = jnp.where(empty, 1, total)
    program.store('output', mixed / divisor[:, None], sizes.queries)
    log_sum_exp = jnp.where(empty, -jnp.inf, highest / LOG2_E + jnp.log(divisor))
    program.store('log_sum_exp', log_sum_exp, sizes.queries)


def backward_queries_kernel(program: Program) -> None:
    """Gradient of a block of queries.

    Reads 'query', 'key', 'value', 'd_output', 'log_sum_exp' in units of log 2 (infinite where there is no key),
    'delta'; writes 'd_query'.
    """
    sizes, dtype = program.sizes, program.dtype
    query, d_output = program.queries('query', None), program.queries('d_output', None)
    log_sum_exp = program.statistic('log_sum_exp', None, None, math.inf)[:, None]
    delta = program.statistic('delta', None, None, 0.0)[:, None]

    def add(block: Any, d_query: jax.Array, *, partial: bool) -> jax.Array:
        first = block * sizes.block_k
        key, value = (program.keys(name, first, tail=partial) for name in ('key', 'value'))
        products = _dot(query, key, (1, 1), dtype)
        raw, allowed = program.raw_scores(products, program.head, None, first, partial, keys_first=False)
        d_weights = _dot(d_output, value, (1, 1), dtype)
        _, d_products = program.gradients(products, raw, allowed, d_weights, log_sum_exp, delta)
        return d_query + _dot(d_products.astype(key.dtype), key, (1, 0), dtype)

    d_query = program.over_blocks(add, jnp.zeros((sizes.block_q, sizes.padded_size), dtype))
    program.store('d_query', d_query * program.options.scale, sizes.queries)


def backward_keys_kernel(program: Program) -> None:
    """Gradients of a block of keys and values, over all query heads that share them.

    Reads what `backward_queries_kernel` does; writes 'd_key' and 'd_value'.
    """
    sizes, dtype = program.sizes, program.dtype
    key, value = program.keys('key', None), program.keys('value', None)

    def of_head(index: Any, sums: Any) -> Any:
        head = program.head * sizes.heads + index

        def add(block: Any, sums: Any, *, partial: bool) -> Any:
            d_key, d_value = sums
            first = block * sizes.block_q
            query, d_output = (program.queries(name, first, index) for name in ('query', 'd_output'))
            log_sum_exp = program.statistic('log_sum_exp', first, index, math.inf)[None, :]
            delta = program.statistic('delta', first, index, 0.0)[None, :]
            products = _dot(key, query, (1, 1), dtype)
            raw, allowed = program.raw_scores(products, head, first, None, partial, keys_first=True)
            d_weights = _dot(value, d_output, (1, 1), dtype)
            weights, d_products = program.gradients(products, raw, allowed, d_weights, log_sum_exp, delta)
            d_value = d_value + _dot(weights.astype(d_output.dtype), d_output, (1, 0), dtype)
            return d_key + _dot(d_products.astype(query.dtype), query, (1, 0), dtype), d_value

        return program.over_blocks(add, sums)

    zeros = jnp.zeros((sizes.block_k, sizes.padded_size), dtype)
    d_key, d_value = jax.lax.fori_loop(0, sizes.heads, of_head, (zeros, zeros))
    program.store('d_key', d_key * program.options.scale, sizes.keys)
    program.store('d_value', d_value, sizes.keys)
