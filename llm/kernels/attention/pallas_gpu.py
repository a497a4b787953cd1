"""Flash attention for NVIDIA GPUs in Pallas on Triton (Dao 2023, "FlashAttention-2", algorithms 1 and 2).

A program per block of queries and head loops over the blocks of keys that its queries may see, and over nothing else;
those that the mask leaves whole are not masked. The backward pass runs twice, by queries and by keys, seven products in
all: five would need atomic additions, whose order, and so whose last bits, change from run to run. Gradients of keys
are summed over the query heads that share them inside the kernel. Arrays stay as they are in memory, [B, S, H, K].
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llm.errors import UserError
from llm.kernels.attention.block_ranges import block_ranges
from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.pallas_gpu_kernels import (
    LOG2_E,
    Program,
    Sizes,
    backward_keys_kernel,
    backward_queries_kernel,
    forward_kernel,
)

_SMALLEST = 16  # a side of what tensor cores multiply


class Blocks(NamedTuple):
    """How one kernel is cut up: rows of a program's own block, rows at a time in its loop, warps, loads in flight."""

    own: int
    loop: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class _Chip:
    """Bytes of shared memory that one program may take, and the blocks of each kernel by padded head size."""

    shared: int
    forward: dict[int, Blocks]
    backward_queries: dict[int, Blocks]
    backward_keys: dict[int, Blocks]


# The largest of a few blocks whose programs fit in registers, or do but for some 40 bytes (bf16, causal, packed;
# tools/benchmarks/attention_gpu_registers.py for sm_80 and sm_90). Hopper's tensor cores read factors from shared
# memory, so its programs have registers to spare. On neither has anything been timed.
_AMPERE = _Chip(
    shared=163 * 2**10,
    forward={64: Blocks(128, 64, 4, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 64, 8, 2)},
    backward_queries={64: Blocks(128, 64, 8, 3), 128: Blocks(128, 32, 8, 2), 256: Blocks(64, 32, 8, 2)},
    backward_keys={64: Blocks(128, 32, 8, 3), 128: Blocks(64, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
)
_HOPPER = _Chip(
    shared=227 * 2**10,
    forward={64: Blocks(128, 64, 4, 3), 128: Blocks(128, 128, 8, 2), 256: Blocks(128, 64, 8, 2)},
    backward_queries={64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 2), 256: Blocks(128, 32, 8, 2)},
    backward_keys={64: Blocks(128, 32, 8, 3), 128: Blocks(128, 32, 8, 2), 256: Blocks(64, 32, 8, 2)},
)
# By compute capability (CUDA C++ programming guide, technical specifications per compute capability).
_CHIPS = {
    '8.0': _AMPERE,
    '8.7': _AMPERE,
    '9.0': _HOPPER,
    '10.0': _HOPPER,
    '10.3': _HOPPER,
    '11.0': _HOPPER,
}
_OTHER = dataclasses.replace(_AMPERE, shared=99 * 2**10)  # cards for desktops and inference

# Name of an array in the kernel -> (array, or shape and dtype; how it is cut up: a key of _block_specs).
Arrays = dict[str, tuple[Any, str]]


def _power_of_two(n: int, least: int) -> int:
    return max(least, pl.next_power_of_2(n))


def blocks_for(gpu: str | None, kernel: str, padded_size: int, itemsize: int) -> Blocks:
    """How a kernel is cut up: as in the table, made smaller until its rows fit in shared memory.

    Args:
        gpu: see `forward`. kernel: a table of _Chip. itemsize: bytes of an element.
    """
    chip = _CHIPS.get(gpu or '', _OTHER)
    table: dict[int, Blocks] = getattr(chip, kernel)
    blocks = table[min((size for size in table if size >= padded_size), default=max(table))]
    # Of so many arrays a program keeps its own block; two more go through its loop.
    own_arrays = 1 if kernel == 'forward' else 2
    row_bytes, shared = padded_size * itemsize, chip.shared
    while (own_arrays * blocks.own + 2 * blocks.stages * blocks.loop) * row_bytes > shared:
        if blocks.stages > 2:
            blocks = blocks._replace(stages=blocks.stages - 1)
        elif blocks.own > blocks.loop and blocks.own > 32:
            blocks = blocks._replace(own=blocks.own // 2)
        elif blocks.loop > _SMALLEST:
            blocks = blocks._replace(loop=blocks.loop // 2)
        elif blocks.stages > 1:
            blocks = blocks._replace(stages=1)
        else:
            break
    return blocks


def runs_on(gpu: str) -> bool:
    """Whether a GPU is one of NVIDIA's, Ampere or later, by its compute capability (AMD's have none, but a name)."""
    major = gpu.partition('.')[0]
    return major.isdecimal() and int(major) >= 8


def where(implementation: str) -> str:
    """For a UserError of an implementation."""
    return f'attention implementation {implementation!r}'


def check_gpu(implementation: str, gpu: str | None) -> str:
    """`gpu`, a compute capability.

    Raises:
        UserError: it is not of a GPU that `runs_on` takes.
    """
    if gpu is None or not runs_on(gpu):
        device = 'this is none' if gpu is None else f'this one has {gpu}'
        raise UserError(
            f'needs an NVIDIA GPU of compute capability 8.0 or later, and {device}',
            where=where(implementation),
            fix="Use 'auto'.",
        )
    return gpu


class _Problem:
    """One kernel's problem: its sizes, and its arrays."""

    def __init__(
        self,
        kernel: str,
        options: Options,
        query: jax.Array,
        key: jax.Array,
        positions: Positions,
        gpu: str | None,
        blocks: tuple[int, int] | None,
    ):
        self.options, self.interpret = options, gpu is None
        self.batch, queries, all_heads, head_size = query.shape
        keys, self.groups = key.shape[1:3]
        self.keys_outer = kernel == 'backward_keys'
        padded_size = _power_of_two(head_size, _SMALLEST)
        chosen = blocks_for(gpu, kernel, padded_size, query.dtype.itemsize)
        if blocks is None:
            blocks = (chosen.loop, chosen.own) if self.keys_outer else (chosen.own, chosen.loop)
            blocks = min(blocks[0], _power_of_two(queries, _SMALLEST)), min(blocks[1], _power_of_two(keys, _SMALLEST))
        self.compiler_params = plgpu.CompilerParams(num_warps=chosen.warps, num_stages=chosen.stages)
        counts = -(-queries // blocks[0]), -(-keys // blocks[1])
        self.sizes = Sizes(
            queries,
            keys,
            all_heads // self.groups,
            head_size,
            padded_size,
            *blocks,
            blocks=counts[1] if self.keys_outer else counts[0],
            # With a causal mask the last queries have most to do; the first keys too, and those come first anyway.
            backwards=options.causal and not self.keys_outer,
        )
        self.positions = positions.padded(counts[0] * blocks[0], counts[1] * blocks[1])

    def _block_specs(self, own_edges: bool) -> dict[str, pl.BlockSpec]:
        """How arrays are cut up. What a program loops over is whole in its specification, and loaded by the program.

        Args:
            own_edges: whether each row of the batch has its own ranges.
        """
        sizes, heads, size = self.sizes, self.sizes.heads, self.sizes.padded_size

        def spec(shape: tuple[int | None, ...], index: Callable[[Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda program, head, row: index(sizes.block(program), head, row))

        shared = {
            'edges': spec((None, None, 4), lambda i, h, b: (b if own_edges else 0, i, 0)),
            'row_scalars': spec((None, 2), lambda i, h, b: (b, 0)),
            'slopes': spec((self.groups * heads,), lambda i, h, b: (0,)),
        }
        if self.keys_outer:
            return shared | {
                'queries': spec((None, sizes.queries, heads, size), lambda i, g, b: (b, 0, g, 0)),
                'keys': spec((None, sizes.block_k, None, size), lambda i, g, b: (b, i, g, 0)),
                'statistic': spec((None, heads, sizes.queries), lambda i, g, b: (b, g, 0)),
                'query_ids': spec((None, -(-sizes.queries // sizes.block_q) * sizes.block_q), lambda i, g, b: (b, 0)),
                'key_ids': spec((None, sizes.block_k), lambda i, g, b: (b, i)),
            }
        return shared | {
            'queries': spec((None, sizes.block_q, None, size), lambda i, h, b: (b, i, h, 0)),
            'keys': spec((None, sizes.keys, None, size), lambda i, h, b: (b, 0, h // heads, 0)),
            'statistic': spec((None, None, sizes.block_q), lambda i, h, b: (b, h, i)),
            'query_ids': spec((None, sizes.block_q), lambda i, h, b: (b, i)),
            'key_ids': spec((None, -(-sizes.keys // sizes.block_k) * sizes.block_k), lambda i, h, b: (b, 0)),
        }

    def run(self, kernel: Callable[[Program], None], inputs: Arrays, outputs: Arrays, dtype: Any, name: str) -> Any:
        """Run `kernel` in every program of the grid; a list of the outputs."""
        sizes, positions = self.sizes, self.positions
        lengths, blocks = (sizes.queries, sizes.keys), (sizes.block_q, sizes.block_k)
        ranges = block_ranges(self.options, positions, lengths, blocks, keys_outer=self.keys_outer)
        inputs = inputs | {
            'edges': (ranges.edges, 'edges'),
            'row_scalars': (positions.row_scalars(self.options, self.batch, sizes.keys), 'row_scalars'),
        }
        if positions.slopes is not None:
            inputs['slopes'] = (positions.slopes, 'slopes')
        if positions.query_ids is not None and positions.key_ids is not None:
            inputs |= {'query_ids': (positions.query_ids, 'query_ids'), 'key_ids': (positions.key_ids, 'key_ids')}
        names = [*inputs, *outputs]
        native = not self.interpret and dtype == jnp.float32
        specs = self._block_specs(own_edges=ranges.edges.shape[0] > 1)

        def body(*refs: Any) -> None:
            named = dict(zip(names, refs, strict=True))
            kernel(Program(self.options, sizes, ranges.kinds, named, dtype, native))

        body.__name__ = name  # what a profiler shows
        return pl.pallas_call(
            body,
            grid=(sizes.blocks, self.groups if self.keys_outer else self.groups * sizes.heads, self.batch),
            in_specs=[specs[kind] for _, kind in inputs.values()],
            out_specs=[specs[kind] for _, kind in outputs.values()],
            out_shape=[jax.ShapeDtypeStruct(*shape_and_dtype) for shape_and_dtype, _ in outputs.values()],
            compiler_params=self.compiler_params,
            interpret=self.interpret,
            name=name,
        )(*(x for x, _ in inputs.values()))


def forward(
    options: Options,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: Positions,
    *,
    dtype: Any = None,
    gpu: str | None = None,
    blocks: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `llm.kernels.attention.flash`.

    Args:
        gpu: compute capability of the GPU it will run on, as '9.0'; None interprets the kernel, anywhere.
        blocks: queries and keys at a time, powers of two from 16 on a GPU; default: by GPU, head size and lengths.
    """
    problem = _Problem('forward', options, query, key, positions, gpu, blocks)
    statistics = jnp.promote_types(query.dtype, jnp.float32)
    batch, queries, heads, _ = query.shape
    output, log_sum_exp = problem.run(
        forward_kernel,
        {'query': (query, 'queries'), 'key': (key, 'keys'), 'value': (value, 'keys')},
        {
            'output': ((query.shape, dtype or query.dtype), 'queries'),
            'log_sum_exp': (((batch, heads, queries), statistics), 'statistic'),
        },
        statistics,
        'flash_attention_forward',
    )
    return output, log_sum_exp


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
    gpu: str | None = None,
    blocks: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `llm.kernels.attention.flash` and `forward`."""
    statistics = jnp.promote_types(query.dtype, jnp.float32)
    d_query_type, d_key_type = dtype or query.dtype, dtype or key.dtype
    inputs: Arrays = {
        'query': (query, 'queries'),
        'key': (key, 'keys'),
        'value': (value, 'keys'),
        'd_output': (d_output.astype(query.dtype), 'queries'),
        # Without any key every weight is to be zero, and not the difference of two infinities.
        'log_sum_exp': (jnp.where(log_sum_exp == -jnp.inf, jnp.inf, log_sum_exp * LOG2_E), 'statistic'),
        'delta': (delta, 'statistic'),
    }

    problem = _Problem('backward_queries', options, query, key, positions, gpu, blocks)
    outputs: Arrays = {'d_query': ((query.shape, d_query_type), 'queries')}
    (d_query,) = problem.run(backward_queries_kernel, inputs, outputs, statistics, 'flash_attention_backward_queries')
    problem = _Problem('backward_keys', options, query, key, positions, gpu, blocks)
    outputs = dict.fromkeys(('d_key', 'd_value'), ((key.shape, d_key_type), 'keys'))
    d_key, d_value = problem.run(backward_keys_kernel, inputs, outputs, statistics, 'flash_attention_backward_keys')
    return d_query, d_key, d_value
