"""State space duality for TPUs in Pallas: one chunk after the other, the state in VMEM (Dao and Gu 2024, section 6).

The grid is (row of the batch, block of heads that share b and c, chunk). What XLA writes to HBM for every chunk and
head, decays and scores of Q x Q, never leaves the chip. The backward pass goes through the chunks from the last to the
first; it reads the state before each, which the forward pass stores, and differentiates the very same chunk.

By the compiler, for a layer of Mamba-2 1.3B (1 row of 2,048 tokens, 64 heads of 64, state 128, bf16, v5e), forward and
backward: 213 MB of HBM traffic by the kernels (98 and 115, by their grids), 235 MB by the program with each of their
operands once, and 103 MB of temporaries, for 801 MB and 236 MB of `chunked`. The kernels have 1,674 and 4,334 bundles,
loops once (`tools/benchmarks/scan_kernels.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm.kernels.scan_dispatch import filled_up

_LANES, _SUBLANES = 128, 8
_VMEM = {'TPU v4': 14 * 2**20}
_OTHER_VMEM = 48 * 2**20

Heads = tuple[jax.Array, ...]


def _product(x: jax.Array, y: jax.Array, contract: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """Product of two matrices over dimension contract[0] of the first and contract[1] of the second."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dimensions, precision=exact, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, y: jax.Array, contract: tuple[int, int], dtype: jnp.dtype) -> jax.Array:
    """`_product`, whose derivatives are products without transpositions, of operands in the type of x and y."""
    return _product(x, y, contract, dtype)


def _product_forward(x: jax.Array, y: jax.Array, contract: tuple[int, int], dtype: jnp.dtype) -> Any:
    return _product(x, y, contract, dtype), (x, y)


def _product_backward(contract: tuple[int, int], dtype: jnp.dtype, operands: Any, gradient: jax.Array) -> Any:
    x, y = operands
    gradient = gradient.astype(x.dtype)
    of_x, of_y = contract
    d_x = _product(gradient, y, (1, 1 - of_y), dtype) if of_x else _product(y, gradient, (1 - of_y, 1), dtype)
    d_y = _product(gradient, x, (0, 1 - of_x), dtype) if of_y else _product(x, gradient, (1 - of_x, 0), dtype)
    return d_x.astype(x.dtype), d_y.astype(y.dtype)


product.defvjp(_product_forward, _product_backward)


def run_chunk(
    xs: Heads, steps: Heads, sums: Heads, b: jax.Array, c: jax.Array, states: Heads, segments: jax.Array
) -> tuple[Heads, Heads]:
    """Q tokens of heads that share b and c: y of each head [Q, K], and the states after them.

    Shapes, a tuple of one for each head: xs [Q, K], steps [1, Q] (dt), sums [1, Q] (of dt a up to each token), states
    [K, N]. b, c [Q, N]. segments [1, Q]: how many begin up to each token.
    """
    dtype, length = states[0].dtype, b.shape[0]
    at = jax.lax.broadcasted_iota(jnp.int32, (length, length), 0)
    of = jax.lax.broadcasted_iota(jnp.int32, (length, length), 1)
    diagonal = (at == of).astype(dtype)
    is_last = (jax.lax.broadcasted_iota(jnp.int32, (1, length), 1) == length - 1).astype(dtype)

    def column(row: jax.Array) -> jax.Array:
        """[1, Q] -> [Q, 1]; a sum, since Mosaic transposes whole tiles only."""
        return jnp.sum(diagonal * row, axis=1, keepdims=True)

    segments = segments.astype(dtype)
    column_segments = column(segments)
    last_segment = jnp.sum(segments * is_last, axis=1, keepdims=True)
    readable = (at >= of) & (column_segments == segments)
    from_before = column_segments == 0
    into_next = column_segments == last_segment
    scores = product(c, b, (1, 1), dtype)
    ys, after = [], []
    for x, step, row, state in zip(xs, steps, sums, states, strict=True):
        rates = column(row)
        total = jnp.sum(row * is_last, axis=1, keepdims=True)
        # Masked before the exponential: what is hidden could overflow.
        left = jnp.exp(jnp.where(readable, rates - row, -jnp.inf))
        y = product((scores * left * step).astype(x.dtype), x, (1, 0), dtype)
        kept = jnp.exp(jnp.where(from_before, rates, -jnp.inf))
        ys.append(y + kept * product(c, state.astype(c.dtype), (1, 1), dtype))
        weights = jnp.exp(jnp.where(into_next, total - rates, -jnp.inf)) * column(step)
        written = product((x.astype(dtype) * weights).astype(x.dtype), b, (0, 0), dtype)
        after.append(jnp.exp(jnp.where(last_segment == 0, total, -jnp.inf)) * state + written)
    return tuple(ys), tuple(after)


class _Problem:
    """Sizes of one problem, its arrays in the layout of the kernels, and how they are cut up."""

    def __init__(self, x: jax.Array, b: jax.Array, chunk: int, tpu: str | None) -> None:
        self.batch, self.length, self.heads, self.head_dim = x.shape
        self.groups, self.state = b.shape[2:]
        self.chunk, self.chunks = chunk, self.length // chunk
        share = self.heads // self.groups
        self.block = _SUBLANES if share % _SUBLANES == 0 else share
        self.blocks = share // self.block
        self.interpret, self.vmem = tpu is None, _VMEM.get(tpu or '', _OTHER_VMEM)

    def by_block(self, x: jax.Array) -> jax.Array:
        """[B, S, H, ...] -> [B, blocks, heads of a block, S, ...]."""
        x = jnp.moveaxis(x, 1, 2)
        return x.reshape(self.batch, -1, self.block, *x.shape[2:])

    def by_token(self, x: jax.Array) -> jax.Array:
        """The inverse of `by_block`."""
        x = x.reshape(self.batch, self.heads, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2)

    def specs(self, *, backward: bool) -> dict[str, pl.BlockSpec]:
        """How each kind of array is cut up; a backward pass starts with the last chunk."""
        block, q, k, n = self.block, self.chunk, self.head_dim, self.state

        def at(chunk: Any) -> Any:
            return self.chunks - 1 - chunk if backward else chunk

        return {
            'tokens': pl.BlockSpec((1, 1, block, q, k), lambda b, h, t: (b, h, 0, at(t), 0)),
            'scalars': pl.BlockSpec((1, 1, block, q), lambda b, h, t: (b, h, 0, at(t))),
            'group': pl.BlockSpec((1, 1, q, n), lambda b, h, t: (b, jax.lax.div(h, jnp.int32(self.blocks)), at(t), 0)),
            'segments': pl.BlockSpec((1, 1, q), lambda b, h, t: (b, 0, at(t))),
            'state': pl.BlockSpec((1, 1, block, k, n), lambda b, h, t: (b, h, 0, 0, 0)),
            'borders': pl.BlockSpec((1, 1, 1, block, k, n), lambda b, h, t: (b, h, at(t), 0, 0, 0)),
            'group_part': pl.BlockSpec((1, 1, q, n), lambda b, h, t: (b, h, at(t), 0)),
        }

    def run(
        self,
        kernel: Callable[[dict[str, Any]], None],
        inputs: dict[str, tuple[jax.Array, str]],
        outputs: dict[str, tuple[tuple[int, ...], Any, str]],
        name: str,
        dtype: Any,
    ) -> list[jax.Array]:
        """Run `kernel`, which takes the references by name, at every step of the grid."""
        specs = self.specs(backward='d_y' in inputs)
        names = [*inputs, *outputs, 'carried']
        run: Callable[..., list[jax.Array]] = pl.pallas_call(
            lambda *refs: kernel(dict(zip(names, refs, strict=True))),
            grid=(self.batch, self.groups * self.blocks, self.chunks),
            in_specs=[specs[kind] for _, kind in inputs.values()],
            out_specs=[specs[kind] for *_, kind in outputs.values()],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()],
            scratch_shapes=[pltpu.VMEM((self.block, self.head_dim, self.state), dtype)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=self.vmem
            ),
            interpret=self.interpret,
            name=name,
        )
        return run(*(x for x, _ in inputs.values()))


def _heads(ref: Any, block: int) -> Heads:
    """What a block of scalars [1, 1, heads, Q] holds, a row for each head."""
    return tuple(ref[0, 0, head : head + 1] for head in range(block))


def _matrices(ref: Any, block: int) -> Heads:
    """What a block of tokens or states holds, a matrix for each head."""
    return tuple(ref[(0,) * (len(ref.shape) - 3) + (head,)] for head in range(block))


def _forward_kernel(problem: _Problem, refs: dict[str, Any]) -> None:
    carried, block = refs['carried'], problem.block

    @pl.when(pl.program_id(2) == 0)
    def start() -> None:
        carried[...] = refs['initial'][0, 0]

    if 'borders' in refs:
        refs['borders'][0, 0, 0] = carried[...]
    ys, after = run_chunk(
        _matrices(refs['x'], block),
        _heads(refs['dt'], block),
        _heads(refs['sums'], block),
        refs['b'][0, 0],
        refs['c'][0, 0],
        _matrices(carried, block),
        refs['segments'][0],
    )
    for head in range(block):
        refs['y'][0, 0, head] = ys[head].astype(refs['y'].dtype)
        carried[head] = after[head]

    @pl.when(pl.program_id(2) == problem.chunks - 1)
    def end() -> None:
        refs['final'][0, 0] = carried[...]


def _backward_kernel(problem: _Problem, refs: dict[str, Any]) -> None:
    carried, block = refs['carried'], problem.block

    @pl.when(pl.program_id(2) == 0)
    def start() -> None:
        carried[...] = refs['d_final'][0, 0]

    segments = refs['segments'][0]
    _, pullback = jax.vjp(
        functools.partial(run_chunk, segments=segments),
        _matrices(refs['x'], block),
        _heads(refs['dt'], block),
        _heads(refs['sums'], block),
        refs['b'][0, 0],
        refs['c'][0, 0],
        _matrices(refs['borders'], block),
    )
    d_ys = tuple(d_y.astype(carried.dtype) for d_y in _matrices(refs['d_y'], block))
    d_xs, d_steps, d_sums, d_b, d_c, d_states = pullback((d_ys, _matrices(carried, block)))
    for head in range(block):
        refs['d_x'][0, 0, head] = d_xs[head].astype(refs['d_x'].dtype)
        refs['d_dt'][0, 0, head : head + 1] = d_steps[head]
        refs['d_sums'][0, 0, head : head + 1] = d_sums[head]
        carried[head] = d_states[head]
    refs['d_b'][0, 0] = d_b.astype(refs['d_b'].dtype)
    refs['d_c'][0, 0] = d_c.astype(refs['d_c'].dtype)

    @pl.when(pl.program_id(2) == problem.chunks - 1)
    def end() -> None:
        refs['d_initial'][0, 0] = carried[...]


def _inputs(
    problem: _Problem, x: jax.Array, dt: jax.Array, sums: jax.Array, b: jax.Array, c: jax.Array, segments: jax.Array
) -> dict[str, tuple[jax.Array, str]]:
    """What both passes read."""
    return {
        'x': (problem.by_block(x), 'tokens'),
        'dt': (problem.by_block(dt), 'scalars'),
        'sums': (problem.by_block(sums), 'scalars'),
        'b': (jnp.moveaxis(b, 1, 2), 'group'),
        'c': (jnp.moveaxis(c, 1, 2), 'group'),
        'segments': (segments[:, None], 'segments'),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(chunk: int, tpu: str | None, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _run_forward(chunk, tpu, arrays, keep=False)[:2]


def _run_forward(chunk: int, tpu: str | None, arrays: tuple[jax.Array, ...], *, keep: bool) -> Any:
    x, dt, sums, b, c, segments, initial = arrays
    problem = _Problem(x, b, chunk, tpu)
    states = (problem.batch, problem.groups * problem.blocks, problem.block, problem.head_dim, problem.state)
    inputs = _inputs(problem, x, dt, sums, b, c, segments) | {'initial': (initial.reshape(states), 'state')}
    outputs = {
        'y': (inputs['x'][0].shape, initial.dtype, 'tokens'),
        'final': (states, initial.dtype, 'state'),
    }
    if keep:
        outputs['borders'] = ((*states[:2], problem.chunks, *states[2:]), initial.dtype, 'borders')
    kernel = functools.partial(_forward_kernel, problem)
    y, final, *borders = problem.run(kernel, inputs, outputs, 'ssd_forward', initial.dtype)
    return problem.by_token(y), final.reshape(initial.shape), *borders


def _forward(chunk: int, tpu: str | None, *arrays: jax.Array) -> Any:
    y, final, borders = _run_forward(chunk, tpu, arrays, keep=True)
    return (y, final), (arrays[:-1], borders)


def _backward(chunk: int, tpu: str | None, residuals: Any, gradients: tuple[jax.Array, jax.Array]) -> Any:
    (x, dt, sums, b, c, segments), borders = residuals
    d_y, d_final = gradients
    problem, dtype = _Problem(x, b, chunk, tpu), borders.dtype
    blocks = problem.groups * problem.blocks
    states = (problem.batch, blocks, problem.block, problem.head_dim, problem.state)
    inputs = _inputs(problem, x, dt, sums, b, c, segments) | {
        'd_y': (problem.by_block(d_y.astype(x.dtype)), 'tokens'),
        'd_final': (d_final.reshape(states), 'state'),
        'borders': (borders, 'borders'),
    }
    scalars = inputs['dt'][0].shape
    outputs = {
        'd_x': (inputs['x'][0].shape, x.dtype, 'tokens'),
        **dict.fromkeys(('d_dt', 'd_sums'), (scalars, dtype, 'scalars')),
        # Of a block of heads each.
        **dict.fromkeys(('d_b', 'd_c'), ((problem.batch, blocks, problem.length, problem.state), dtype, 'group_part')),
        'd_initial': (states, dtype, 'state'),
    }
    kernel = functools.partial(_backward_kernel, problem)
    d_x, d_dt, d_sums, *d_groups, d_initial = problem.run(kernel, inputs, outputs, 'ssd_backward', dtype)
    d_b, d_c = (
        each.reshape(problem.batch, problem.groups, -1, *each.shape[2:]).sum(axis=2).swapaxes(1, 2).astype(b.dtype)
        for each in d_groups
    )
    d_x, d_dt, d_sums = (problem.by_token(each) for each in (d_x, d_dt, d_sums))
    return d_x, d_dt, d_sums, d_b, d_c, None, d_initial.reshape(d_final.shape)


_scan.defvjp(_forward, _backward)


def ssd(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    starts: jax.Array,
    initial: jax.Array,
    *,
    tpu: str | None = None,
    chunk: int = _LANES,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.ssd`.

    Args:
        tpu: kind of TPU it will run on; None interprets the kernel, anywhere.
        chunk: Q, a multiple of 128 on a TPU.
    """
    batch, length = x.shape[:2]
    # Zeros leave a state as it is.
    x, dt, b, c, starts = filled_up(chunk, x, dt, b, c, starts)

    def summed(each: jax.Array) -> jax.Array:
        """Sums from the beginning of each chunk on, [B, S, ...]."""
        return jnp.cumsum(each.reshape(batch, -1, chunk, *each.shape[2:]), axis=2).reshape(each.shape)

    y, final = _scan(chunk, tpu, x, dt, summed(dt * a), b, c, summed(starts.astype(jnp.int32)), initial)
    return y[:, :length], final
