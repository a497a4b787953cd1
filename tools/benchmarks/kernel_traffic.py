"""Bytes that Pallas TPU kernels move between HBM and VMEM, from their grids and block specifications.

The pipeline that Pallas makes around a kernel runs through the grid, last dimension fastest. It fetches an operand's
block when its index differs from the step before, and writes a result's block back when its index is about to change.
So the traffic of an operand is its block's bytes times the number of runs of equal indices. What a kernel copies by
itself is not seen, nor how a chip of two cores shares the grid.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal


@dataclasses.dataclass(frozen=True)
class KernelTraffic:
    """What one kernel moves.

    Attributes:
        read, written: bytes, by number of the operand or result that has blocks. steps: of the grid.
    """

    name: str
    read: tuple[int, ...]
    written: tuple[int, ...]
    steps: int

    @property
    def total(self) -> int:
        """Bytes both ways."""
        return sum(self.read) + sum(self.written)


def kernel_traffic(function: Callable[..., Any], *arguments: Any) -> list[KernelTraffic]:
    """The kernels that `function` calls, in order; none of them within a loop.

    Args:
        arguments: arrays or ShapeDtypeStructs. What a kernel prefetches to compute its indices must not depend on them.

    Raises:
        ValueError: it does depend on them.
    """
    program = jax.make_jaxpr(function)(*arguments)
    unknown = [None] * len(program.in_avals)
    return list(_kernels(program.jaxpr, program.consts, unknown, {}))


def _kernels(jaxpr: Any, consts: Any, arguments: Any, results: dict[int, Any]) -> Iterator[KernelTraffic]:
    """Evaluates what does not depend on unknown (None) arguments; `results` gets the outputs by position."""
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        values = [value(atom) for atom in equation.invars]
        inner = equation.params.get('jaxpr', equation.params.get('call_jaxpr'))
        if equation.primitive.name == 'pallas_call':
            yield _traffic(equation, values)
        elif all(each is not None for each in values):
            found = equation.primitive.bind(*values, **equation.params)
            outputs = found if equation.primitive.multiple_results else [found]
            known.update(zip(equation.outvars, outputs, strict=True))
        elif inner is not None and hasattr(inner, 'jaxpr') and len(inner.jaxpr.invars) == len(values):
            inside: dict[int, Any] = {}
            yield from _kernels(inner.jaxpr, inner.consts, values, inside)
            known.update((var, inside[number]) for number, var in enumerate(equation.outvars))
    results.update((number, value(atom)) for number, atom in enumerate(jaxpr.outvars))


def _traffic(equation: Any, values: list[Any]) -> KernelTraffic:
    mapping = equation.params['grid_mapping']
    name = str(equation.params['name'])
    prefetched = values[: mapping.num_index_operands]
    if any(each is None for each in prefetched):
        raise ValueError(f'the indices of {name} depend on the arguments')
    grid = tuple(int(size) for size in mapping.grid)
    steps = np.indices(grid).reshape(len(grid), -1)  # last dimension fastest
    moved = []
    for block in mapping.block_mappings:
        starts = jax.vmap(lambda *step, block=block: block.compute_start_indices_interpret(step, *prefetched))
        indices = np.stack([np.broadcast_to(np.asarray(each), steps.shape[1:]) for each in starts(*steps)])
        runs = 1 + int(np.any(indices[:, 1:] != indices[:, :-1], axis=0).sum())
        sizes = [getattr(size, 'block_size', 1) for size in block.block_shape]  # 1 where a dimension is squeezed
        moved.append(runs * math.prod(sizes) * block.array_aval.dtype.itemsize)
    return KernelTraffic(name, tuple(moved[: mapping.num_inputs]), tuple(moved[mapping.num_inputs :]), math.prod(grid))
