"""The selective scan for TPUs in Pallas: states stay on the chip (Gu and Dao 2023, section 3.3.2 and algorithm 2).

The grid is (row of the batch, block of channels, chunk of tokens). Channels lie along the lanes and the state along the
sublanes, so a token is a few operations on whole registers, and its b and c are columns that broadcast along lanes.
HBM sees the inputs, y and the state at the border of each chunk; XLA's own loop writes and reads the state at every
token. The backward pass goes from the last chunk to the first and computes a chunk's states again.

By the compiler, for a layer of Mamba-1.4B (1 row of 2,048 tokens, 4,096 channels, state 16, bf16, v5e), forward and
backward: 201 MB of HBM traffic (kernels 74 and 127, by their grids) and 0.3 MB of temporaries, for 522 MB and 34 MB of
`chunked`, which is two loops of 2,048 small steps beside. The kernels have 822 and 4,427 bundles in all, loops once
(`tools/benchmarks/scan_kernels.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm.kernels.scan_dispatch import filled_up

_LANES = 128
_CHANNELS = 512  # most at a time: a state of 16 then takes 8 registers of 64
_VMEM = {'TPU v4': 14 * 2**20}
_OTHER_VMEM = 32 * 2**20


def _block(channels: int) -> int:
    """How many channels at a time: whole lanes that divide them, or else all of them."""
    fitting = [size for size in range(_LANES, _CHANNELS + 1, _LANES) if channels % size == 0]
    return max(fitting, default=channels)


class _Problem:
    """Sizes of one problem, and how its arrays are cut up."""

    def __init__(self, x: jax.Array, b: jax.Array, chunk: int, tpu: str | None) -> None:
        self.batch, self.length, self.channels = x.shape
        self.state = b.shape[1]
        self.chunk, self.chunks = chunk, self.length // chunk
        self.block = _block(self.channels)
        self.blocks = self.channels // self.block
        # Tokens whose rows make whole tiles: 16 of 2 bytes, 8 of 4.
        self.group = min(chunk, 32 // min(4, x.dtype.itemsize))
        self.interpret, self.vmem = tpu is None, _VMEM.get(tpu or '', _OTHER_VMEM)

    def specs(self, *, backward: bool) -> dict[str, pl.BlockSpec]:
        """How each kind of array is cut up; a backward pass starts with the last chunk."""
        f, q, n = self.block, self.chunk, self.state

        def at(chunk: Any) -> Any:
            return self.chunks - 1 - chunk if backward else chunk

        return {
            'tokens': pl.BlockSpec((1, q, f), lambda b, c, t: (b, at(t), c)),
            'columns': pl.BlockSpec((1, n, q), lambda b, c, t: (b, 0, at(t))),
            'resets': pl.BlockSpec((1, 1, q), lambda b, c, t: (b, 0, at(t))),
            'rates': pl.BlockSpec((n, f), lambda b, c, t: (0, c)),
            'state': pl.BlockSpec((1, n, f), lambda b, c, t: (b, 0, c)),
            'borders': pl.BlockSpec((1, 1, n, f), lambda b, c, t: (b, at(t), 0, c)),
            # What a block of channels adds to a token's b or c: numbers along the lanes.
            'parts': pl.BlockSpec((1, 1, 1, q * n), lambda b, c, t: (b, c, 0, at(t))),
        }

    def run(
        self,
        kernel: Callable[[dict[str, Any]], None],
        inputs: dict[str, tuple[jax.Array, str]],
        outputs: dict[str, tuple[tuple[int, ...], Any, str]],
        scratch: dict[str, tuple[int, ...]],
        name: str,
        dtype: Any,
    ) -> list[jax.Array]:
        """Run `kernel`, which takes the references by name, at every step of the grid."""
        specs = self.specs(backward='d_y' in inputs)
        names = [*inputs, *outputs, *scratch]
        run: Callable[..., list[jax.Array]] = pl.pallas_call(
            lambda *refs: kernel(dict(zip(names, refs, strict=True))),
            grid=(self.batch, self.blocks, self.chunks),
            in_specs=[specs[kind] for _, kind in inputs.values()],
            out_specs=[specs[kind] for *_, kind in outputs.values()],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()],
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape in scratch.values()],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=self.vmem
            ),
            interpret=self.interpret,
            name=name,
        )
        return run(*(x for x, _ in inputs.values()))


class _Group:
    """The arrays of neighbouring tokens, from `first` on, of which each token takes a row or a column."""

    def __init__(self, problem: _Problem, refs: dict[str, Any], index: Any, dtype: Any) -> None:
        self.size = problem.group
        self.first = index * self.size
        self.refs, self.dtype = refs, dtype
        # Rotated so that the columns of these tokens come first: a lane can only be picked by a constant.
        shift = jnp.where(index == 0, 0, problem.chunk - self.first)
        self.columns: dict[str, jax.Array] = {
            name: pltpu.roll(refs[name][0], shift, 1) for name in ('b', 'c', 'resets')
        }
        self._rows: dict[str, jax.Array] = {name: self._tile(name) for name in ('x', 'dt', 'd_y') if name in refs}

    def _tile(self, name: str) -> jax.Array:
        return self.refs[name][0, pl.ds(pl.multiple_of(self.first, self.size), self.size)].astype(self.dtype)

    def row(self, name: str, token: int) -> jax.Array:
        """[1, channels]."""
        return self._rows[name][token : token + 1]

    def column(self, name: str, token: int) -> jax.Array:
        """[state, 1]."""
        return self.columns[name][:, token : token + 1].astype(self.dtype)

    def decay(self, token: int) -> jax.Array:
        """[state, channels]; 0 where a segment begins."""
        return jnp.exp(self.row('dt', token) * self.refs['a'][...] + self.column('resets', token))

    def after(self, state: jax.Array, token: int) -> jax.Array:
        """The state after a token."""
        return self.decay(token) * state + self.row('dt', token) * self.row('x', token) * self.column('b', token)

    def write(self, name: str, rows: list[jax.Array]) -> None:
        """The rows of these tokens to an output."""
        out = self.refs[name]
        where = pl.ds(pl.multiple_of(self.first, self.size), self.size)
        out[0, where] = jnp.concatenate(rows).astype(out.dtype)


def _forward_kernel(problem: _Problem, refs: dict[str, Any]) -> None:
    carried = refs['carried']

    @pl.when(pl.program_id(2) == 0)
    def start() -> None:
        carried[...] = refs['initial'][0]

    if 'borders' in refs:
        refs['borders'][0, 0] = carried[...]

    def run(index: Any, state: jax.Array) -> jax.Array:
        group = _Group(problem, refs, index, carried.dtype)
        rows = []
        for token in range(group.size):
            state = group.after(state, token)
            rows.append(jnp.sum(state * group.column('c', token), axis=0, keepdims=True))
        group.write('y', rows)
        return state

    carried[...] = jax.lax.fori_loop(0, problem.chunk // problem.group, run, carried[...])

    @pl.when(pl.program_id(2) == problem.chunks - 1)
    def end() -> None:
        refs['final'][0] = carried[...]


def _lane_sums(x: jax.Array) -> jax.Array:
    """[N, channels] added up over tiles, [N, lanes]: what is left to add up lies in one tile."""
    channels = x.shape[1]
    if channels % _LANES:
        return x
    return functools.reduce(jnp.add, [x[:, i : i + _LANES] for i in range(0, channels, _LANES)])


def _backward_kernel(problem: _Problem, refs: dict[str, Any]) -> None:
    carried, d_a, states = refs['carried'], refs['sum_a'], refs['states']
    groups, dtype = problem.chunk // problem.group, carried.dtype

    @pl.when(pl.program_id(2) == 0)
    def start() -> None:
        carried[...] = refs['d_final'][0]
        d_a[...] = jnp.zeros_like(d_a)

    def again(index: Any, state: jax.Array) -> jax.Array:
        group = _Group(problem, refs, index, dtype)
        for token in range(group.size):
            states[group.first + token] = state
            state = group.after(state, token)
        return state

    states[problem.chunk] = jax.lax.fori_loop(0, groups, again, refs['borders'][0, 0])

    def run(step: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        group = _Group(problem, refs, groups - 1 - step, dtype)
        d_state, sum_a = carry
        d_xs: list[jax.Array] = []
        d_steps: list[jax.Array] = []
        for token in reversed(range(group.size)):
            place = group.first + token
            x, dt, d_y = (group.row(name, token) for name in ('x', 'dt', 'd_y'))
            d_state = d_state + group.column('c', token) * d_y
            refs['parts_c'][place] = _lane_sums(states[place + 1] * d_y)
            refs['parts_b'][place] = _lane_sums(d_state * (dt * x))
            d_inputs = jnp.sum(d_state * group.column('b', token), axis=0, keepdims=True)
            d_state = d_state * group.decay(token)
            d_exponent = d_state * states[place]
            d_xs.insert(0, d_inputs * dt)
            d_steps.insert(0, jnp.sum(d_exponent * refs['a'][...], axis=0, keepdims=True) + d_inputs * x)
            sum_a = sum_a + d_exponent * dt
        group.write('d_x', d_xs)
        group.write('d_dt', d_steps)
        return d_state, sum_a

    carried[...], d_a[...] = jax.lax.fori_loop(0, groups, run, (carried[...], d_a[...]))
    for name in 'bc':
        # The rest of the sum is a product with ones, which also turns the result along the lanes.
        parts = refs[f'parts_{name}'][...]
        parts = parts.reshape(-1, parts.shape[-1])
        ones = jnp.ones((8, parts.shape[-1]), dtype)
        sums = jax.lax.dot_general(
            ones,
            parts,
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )
        refs[f'd_{name}'][0, 0] = sums[:1]

    @pl.when(pl.program_id(2) == problem.chunks - 1)
    def end() -> None:
        refs['d_initial'][0] = carried[...]
        refs['d_a'][0] = d_a[...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(chunk: int, tpu: str | None, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _run_forward(chunk, tpu, arrays, keep=False)[:2]


def _inputs(arrays: tuple[jax.Array, ...]) -> dict[str, tuple[jax.Array, str]]:
    """What both passes read."""
    kinds = {'x': 'tokens', 'dt': 'tokens', 'a': 'rates', 'b': 'columns', 'c': 'columns', 'resets': 'resets'}
    return {name: (array, kinds[name]) for name, array in zip(kinds, arrays, strict=True)}


def _run_forward(chunk: int, tpu: str | None, arrays: tuple[jax.Array, ...], *, keep: bool) -> Any:
    *arguments, initial = arrays
    problem = _Problem(arrays[0], arrays[3], chunk, tpu)
    dtype = initial.dtype
    outputs = {
        'y': (arrays[0].shape, arrays[0].dtype, 'tokens'),
        'final': (initial.shape, dtype, 'state'),
    }
    if keep:
        shape = (problem.batch, problem.chunks, problem.state, problem.channels)
        outputs['borders'] = (shape, dtype, 'borders')
    return problem.run(
        functools.partial(_forward_kernel, problem),
        _inputs(tuple(arguments)) | {'initial': (initial, 'state')},
        outputs,
        {'carried': (problem.state, problem.block)},
        'selective_scan_forward',
        dtype,
    )


def _forward(chunk: int, tpu: str | None, *arrays: jax.Array) -> Any:
    y, final, borders = _run_forward(chunk, tpu, arrays, keep=True)
    return (y, final), (arrays[:-1], borders)


def _backward(chunk: int, tpu: str | None, residuals: Any, gradients: tuple[jax.Array, jax.Array]) -> Any:
    arrays, borders = residuals
    x, dt, a, b, c, _ = arrays
    d_y, d_final = gradients
    problem, dtype = _Problem(x, b, chunk, tpu), borders.dtype
    n, q, f = problem.state, chunk, problem.block
    parts = (problem.batch, problem.blocks, 1, problem.length * n)
    outputs = {
        'd_x': (x.shape, x.dtype, 'tokens'),
        'd_dt': (dt.shape, dt.dtype, 'tokens'),
        'd_b': (parts, dtype, 'parts'),
        'd_c': (parts, dtype, 'parts'),
        **dict.fromkeys(('d_a', 'd_initial'), (d_final.shape, dtype, 'state')),
    }
    lanes = f if f % _LANES else _LANES
    scratch = {
        **dict.fromkeys(('carried', 'sum_a'), (n, f)),
        'states': (q + 1, n, f),
        **dict.fromkeys(('parts_b', 'parts_c'), (q, n, lanes)),
    }
    extra = {'d_y': (d_y, 'tokens'), 'd_final': (d_final, 'state'), 'borders': (borders, 'borders')}
    d_x, d_dt, d_b, d_c, d_a, d_initial = problem.run(
        functools.partial(_backward_kernel, problem),
        _inputs(arrays) | extra,
        outputs,
        scratch,
        'selective_scan_backward',
        dtype,
    )
    d_b, d_c = (
        each.sum(axis=(1, 2)).reshape(problem.batch, problem.length, n).swapaxes(1, 2).astype(of.dtype)
        for each, of in ((d_b, b), (d_c, c))
    )
    return d_x, d_dt, d_a.sum(axis=0).astype(a.dtype), d_b, d_c, None, d_initial


_scan.defvjp(_forward, _backward)


def selective_scan(
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
    """See `reference.selective_scan`.

    Args:
        tpu: kind of TPU it will run on; None interprets the kernel, anywhere.
        chunk: tokens between borders, a multiple of 128 on a TPU and of 8 (16 in bf16) elsewhere.
    """
    length = x.shape[1]
    # Zeros leave a state as it is.
    x, dt, b, c, starts = filled_up(chunk, x, dt, b, c, starts)
    # Added to the exponent of a decay; finite, so that it times nothing is nothing.
    resets = jnp.where(starts, -1e30, 0).astype(initial.dtype)[:, None]
    b, c = (each.swapaxes(1, 2).astype(initial.dtype) for each in (b, c))
    y, final = _scan(chunk, tpu, x, dt, a, b, c, resets, initial)
    return y[:, :length], final
