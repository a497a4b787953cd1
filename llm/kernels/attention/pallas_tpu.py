"""Flash attention for TPUs in Pallas (Dao et al. 2022, "FlashAttention", algorithms 1 and 4).

The grid is (row of the batch, key/value head, entry of a block table): pairs of blocks that the mask hides are neither
loaded nor computed, and those that it leaves whole are not masked. The query heads that share a key/value head are
worked on together, so keys and values are loaded once for all of them. The log-sum-exp takes 4 bytes per query in
memory rather than a tile's 512.

The backward pass computes the scores once, five products in all, as long as the gradients of a head's keys and values
fit in VMEM; beyond that it runs twice, once by queries and once by keys, seven products.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm.kernels.attention.block_table import BlockTable, block_table
from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.pallas_tpu_kernels import LOG2_E, Sizes, Step, backward_kernel, forward_kernel, unpack

_LANES = 128


@dataclasses.dataclass(frozen=True)
class _Chip:
    """Most rows of queries (queries x heads that share keys) and most keys at a time; bytes of VMEM to ask for."""

    rows: int
    keys: int
    vmem: int


# Large blocks, because each step also moves data between the units of the chip: on v5e the compiler's program takes
# 2,790 bundles per 512 x 512 scores backward with blocks of 1024 x 1024, and 4,390 with 512 x 512.
# VMEM holds 16 MiB per core on v4, 64 on v5p and 7x, 128 on v5e and v6e; the rest is left to the compiler.
_CHIPS = {
    'TPU v4': _Chip(rows=1024, keys=512, vmem=14 * 2**20),
    'TPU v5': _Chip(rows=4096, keys=1024, vmem=48 * 2**20),
    'TPU v5 lite': _Chip(rows=4096, keys=1024, vmem=64 * 2**20),
    'TPU v6 lite': _Chip(rows=4096, keys=1024, vmem=64 * 2**20),
    'TPU7x': _Chip(rows=4096, keys=1024, vmem=48 * 2**20),
}
_OTHER = _CHIPS['TPU v5']

# Name of an array in the kernel -> (array, or shape and dtype; how it is cut up: a key of _block_specs).
Arrays = dict[str, tuple[Any, str]]


def _block(length: int, most: int) -> int:
    """A block size: the largest multiple of 128, at most `most`, that divides the length rounded up to 128."""
    tiles = -(-length // _LANES)
    return _LANES * max(n for n in range(1, max(1, most // _LANES) + 1) if tiles % n == 0)


class _Problem:
    """One problem: its sizes, and its arrays in the layout of the kernels."""

    def __init__(
        self,
        options: Options,
        query: jax.Array,
        key: jax.Array,
        positions: Positions,
        tpu: str | None,
        blocks: tuple[int, int] | None,
    ):
        self.options, self.interpret = options, tpu is None
        self.batch, self.queries, all_heads, head_size = query.shape
        self.keys, groups = key.shape[1:3]
        self.chip = _CHIPS.get(tpu or '', _OTHER)
        heads = all_heads // groups
        if blocks is None:
            rows = max(_LANES, self.chip.rows // heads)
            blocks = _block(self.queries, min(rows, 1024)), _block(self.keys, self.chip.keys)
        key_blocks = -(-self.keys // blocks[1])
        self.sizes = Sizes(groups, heads, head_size, *blocks, key_blocks)
        self.padded = -(-self.queries // blocks[0]) * blocks[0], key_blocks * blocks[1]
        self.positions = positions.padded(*self.padded)

    def heads_first(self, x: jax.Array, length: int) -> jax.Array:
        """[B, S, G * R, K] -> [B, G, R, S padded to `length`, K]."""
        x = x.reshape(*x.shape[:2], self.sizes.groups, -1, x.shape[3]).transpose(0, 2, 3, 1, 4)
        return jnp.pad(x, [(0, 0)] * 3 + [(0, length - x.shape[3]), (0, 0)])

    def by_query(self, x: jax.Array) -> jax.Array:
        """[B, H, S] -> [B, G, R, 1, S padded]."""
        x = jnp.pad(x, [(0, 0), (0, 0), (0, self.padded[0] - self.queries)])
        return x.reshape(self.batch, self.sizes.groups, self.sizes.heads, 1, -1)

    def inputs(self, query: jax.Array, key: jax.Array, value: jax.Array) -> Arrays:
        """What both passes read."""
        arrays: Arrays = {'query': (self.heads_first(query, self.padded[0]), 'queries')}
        for name, x in (('key', key), ('value', value)):
            arrays[name] = (self.heads_first(x, self.padded[1])[:, :, 0], 'keys')
        ids = self.positions.query_ids, self.positions.key_ids
        if ids[0] is not None and ids[1] is not None:
            arrays['query_ids'] = (ids[0][:, None], 'query_ids')
            arrays['key_ids'] = (jnp.broadcast_to(ids[1][:, :, None], (*ids[1].shape, _LANES)), 'key_ids')
        return arrays

    def table(self, *, keys_outer: bool) -> BlockTable:
        blocks = self.sizes.block_q, self.sizes.block_k
        return block_table(self.options, self.positions, (self.queries, self.keys), blocks, keys_outer=keys_outer)

    def _block_specs(self, table: BlockTable) -> dict[str, pl.BlockSpec]:
        sizes = self.sizes
        rows, length = table.rows > 1, table.length

        def spec(shape: tuple[int, ...], index: Callable[[Any, Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
            def index_map(b: Any, g: Any, p: Any, entries: Any, *_: Any) -> tuple[Any, ...]:
                return index(b, g, *unpack(entries[(b * length if rows else 0) + p]))

            return pl.BlockSpec(shape, index_map)

        heads, size, block_q, block_k = sizes.heads, sizes.head_size, sizes.block_q, sizes.block_k
        return {
            'queries': spec((1, 1, heads, block_q, size), lambda b, g, q, k: (b, g, 0, q, 0)),
            'keys': spec((1, 1, block_k, size), lambda b, g, q, k: (b, g, k, 0)),
            'statistic': spec((1, 1, heads, 1, block_q), lambda b, g, q, k: (b, g, 0, 0, q)),
            'query_ids': spec((1, 1, block_q), lambda b, g, q, k: (b, 0, q)),
            'key_ids': spec((1, block_k, _LANES), lambda b, g, q, k: (b, k, 0)),
            'key_sum': spec((1, 1, 1, block_k, size), lambda b, g, q, k: (b, g, k, 0, 0)),
            'key_sums': spec((1, 1, sizes.key_blocks, block_k, size), lambda b, g, q, k: (b, g, 0, 0, 0)),
        }

    def run(
        self,
        kernel: Callable[[Step], None],
        table: BlockTable,
        inputs: Arrays,
        outputs: Arrays,
        scratch: dict[str, tuple[tuple[int, ...], Any]],
        name: str,
    ) -> Any:
        """Run `kernel` at every step of the grid; a list of the outputs."""
        positions = self.positions
        row_scalars = positions.row_scalars(self.options, self.batch, self.keys)
        scalars = {'entries': table.entries, 'row_scalars': row_scalars.reshape(-1)}
        if positions.slopes is not None:
            scalars['slopes'] = positions.slopes
        names = [*scalars, *inputs, *outputs, *scratch]
        specs = self._block_specs(table)

        def body(*refs: Any) -> None:
            kernel(Step(self.options, self.sizes, table, dict(zip(names, refs, strict=True))))

        return pl.pallas_call(
            body,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=(self.batch, self.sizes.groups, table.length),
                in_specs=[specs[kind] for _, kind in inputs.values()],
                out_specs=[specs[kind] for _, kind in outputs.values()],
                scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
            ),
            out_shape=[jax.ShapeDtypeStruct(*shape_and_dtype) for shape_and_dtype, _ in outputs.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=self.chip.vmem
            ),
            interpret=self.interpret,
            name=name,
        )(*scalars.values(), *(x for x, _ in inputs.values()))


def _heads_last(x: jax.Array, length: int) -> jax.Array:
    """[B, G, R, S, K] -> [B, S cut to `length`, G * R, K]."""
    return x[:, :, :, :length].transpose(0, 3, 1, 2, 4).reshape(x.shape[0], length, -1, x.shape[-1])


def forward(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: Positions,
    *,
    dtype: Any = None,
    tpu: str | None = None,
    blocks: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `llm.kernels.attention.flash`.

    Args:
        tpu: kind of TPU it will run on; None interprets the kernel, anywhere.
        blocks: queries and keys at a time, multiples of 128 on a TPU; default: by kind of TPU and lengths.
    """
    problem = _Problem(options, query, key, positions, tpu, blocks)
    sizes, queries = problem.sizes, problem.padded[0]
    statistics = jnp.promote_types(query.dtype, jnp.float32)
    shape = (problem.batch, sizes.groups, sizes.heads)
    output, log_sum_exp = problem.run(
        forward_kernel,
        problem.table(keys_outer=False),
        problem.inputs(query, key, value),
        {
            'output': (((*shape, queries, sizes.head_size), dtype or query.dtype), 'queries'),
            'log_sum_exp': (((*shape, 1, queries), statistics), 'statistic'),
        },
        {
            'highest': ((sizes.heads, 1, sizes.block_q), statistics),
            'total': ((sizes.heads, 1, sizes.block_q), statistics),
            'mixed': ((sizes.heads, sizes.head_size, sizes.block_q), statistics),
        },
        'flash_attention_forward',
    )
    log_sum_exp = log_sum_exp.reshape(problem.batch, -1, queries)[:, :, : problem.queries]
    return _heads_last(output, problem.queries), log_sum_exp


def backward(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: Positions,
    log_sum_exp: jax.Array,
    delta: jax.Array,
    d_output: jax.Array,
    *,
    dtype: Any = None,
    tpu: str | None = None,
    blocks: tuple[int, int] | None = None,
    one_pass: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `llm.kernels.attention.flash` and `forward`.

    Args:
        one_pass: whether all gradients are computed together; default: if those of a head's keys and values fit in
            two fifths of the VMEM; with the blocks half of it is too much.
    """
    problem = _Problem(options, query, key, positions, tpu, blocks)
    sizes, (queries, keys) = problem.sizes, problem.padded
    statistics = jnp.promote_types(query.dtype, jnp.float32)
    d_query_type, d_key_type = dtype or query.dtype, dtype or key.dtype
    if one_pass is None:
        # Two sums, and two outputs that are each written while the next is computed.
        each = keys * max(sizes.head_size, _LANES) * (statistics.itemsize + 2 * jnp.dtype(d_key_type).itemsize)
        one_pass = 2 * each <= problem.chip.vmem * 2 // 5
    inputs = problem.inputs(query, key, value) | {
        'd_output': (problem.heads_first(d_output.astype(query.dtype), queries), 'queries'),
        'log_sum_exp': (problem.by_query(log_sum_exp * LOG2_E), 'statistic'),
        'delta': (problem.by_query(delta), 'statistic'),
    }
    query_shape = (problem.batch, sizes.groups, sizes.heads, queries, sizes.head_size)
    key_shape = (problem.batch, sizes.groups, sizes.key_blocks, sizes.block_k, sizes.head_size)

    def run(name: str, *, of_queries: bool, of_keys: bool) -> Any:
        outputs: Arrays = {}
        scratch: dict[str, tuple[tuple[int, ...], Any]] = {}
        if of_queries:
            outputs['d_query'] = ((query_shape, d_query_type), 'queries')
            scratch['sum_query'] = ((sizes.heads, sizes.head_size, sizes.block_q), statistics)
        if of_keys:
            kind, kept = ('key_sums', sizes.key_blocks) if of_queries else ('key_sum', 1)
            outputs |= dict.fromkeys(('d_key', 'd_value'), ((key_shape, d_key_type), kind))
            scratch |= dict.fromkeys(('sum_key', 'sum_value'), ((kept, sizes.block_k, sizes.head_size), statistics))
        kernel = functools.partial(backward_kernel, queries_outer=of_queries)
        return problem.run(kernel, problem.table(keys_outer=not of_queries), inputs, outputs, scratch, name)

    if one_pass:
        d_query, d_key, d_value = run('flash_attention_backward', of_queries=True, of_keys=True)
    else:
        (d_query,) = run('flash_attention_backward_queries', of_queries=True, of_keys=False)
        d_key, d_value = run('flash_attention_backward_keys', of_queries=False, of_keys=True)
    d_key, d_value = (
        _heads_last(x.reshape(problem.batch, sizes.groups, 1, keys, sizes.head_size), problem.keys)
        for x in (d_key, d_value)
    )
    return _heads_last(d_query, problem.queries), d_key, d_value
