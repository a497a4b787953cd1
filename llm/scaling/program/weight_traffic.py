"""Bytes of weights that a training step moves, against the least that fully sharded parameters must move."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from llm.models.parameters import ParameterSpec, Role, named_specs
from llm.parallel.sharding import AxisRules, names
from llm.scaling.program.collectives import Collective, Program

# Split over devices that each run their own share of it: never gathered.
_OWN_SHARE = ('layers', 'experts')


@dataclasses.dataclass(frozen=True)
class WeightTraffic:
    """Bytes on one device and one microbatch, as payload (see `llm.scaling.program.collectives`).

    Attributes:
        gathered: of weights put together from their shards. scattered: of gradients summed into shards; an all-reduce,
            which also gathers what it summed, counts twice. permuted: of gathers and scatters that the compiler has cut
            into permutations of shards beside the product that uses them.
        least_gathered, least_scattered: each sharded weight twice, once for the forward and once for the backward
            pass, and its gradient once, all in the compute type. An embedding is looked up where it is, unless it is
            the head too.
        other: of collectives along the same mesh axes that are no weight or gradient of this model.
    """

    gathered: float
    scattered: float
    permuted: float
    least_gathered: float
    least_scattered: float
    other: float

    @property
    def ratio(self) -> float:
        """Moved over least; 1.0 where nothing is sharded and nothing moves.

        It falls below 1 where a program does with less, by one gather kept for both passes or for several microbatches.
        """
        least = self.least_gathered + self.least_scattered
        moved = self.gathered + self.scattered + self.permuted
        return moved / least if least else (math.inf if moved else 1.0)


def weight_traffic(
    program: Program,
    specs: dict[str, Any],
    mesh: Mesh | AbstractMesh,
    rules: AxisRules,
    *,
    compute_dtype: str,
    microbatches: int,
) -> WeightTraffic:
    """What a training step gathers and scatters of the parameters `specs`.

    A parameter is gathered over the mesh axes that split it and not the activations' same logical axis (under the
    default rules `fsdp` and `sequence`). A collective belongs to a parameter if it runs along these axes and has the
    dimensions of one layer's array, or of all layers', apart from their order and from merged neighbours. An activation
    of just these dimensions is counted as the weight.

    Args:
        program: of the step, compiled for `mesh`.
        specs: nested dict of ParameterSpec. rules: by which parameters and activations are placed.
        microbatches: that the step runs one after the other.
    """
    known: dict[tuple[int, ...], set[str]] = {}
    over: set[str] = set()
    least = 0.0
    declared = [spec for _, spec in named_specs(specs)]
    head = Role.OUTPUT if any(spec.role is Role.OUTPUT for spec in declared) else Role.EMBEDDING
    for spec in declared:
        gathered = _Gathered.of(spec, mesh, rules)
        if not gathered.axes:
            continue
        over.update(gathered.axes)
        if spec.role is not Role.EMBEDDING or head is Role.EMBEDDING:
            least += gathered.elements * jnp.dtype(compute_dtype).itemsize
        for dimensions in gathered.shapes():
            known.setdefault(dimensions, set()).update(gathered.axes)

    totals = {'gathered': 0.0, 'scattered': 0.0, 'permuted': 0.0, 'other': 0.0}
    for collective in program.collectives:
        if not over.intersection(collective.axes):
            continue
        for shape in collective.shapes:
            size = collective.count * shape.bytes
            axes = known.get(tuple(sorted(d for d in shape.dimensions if d > 1)), set())
            share = _share(collective, axes)
            if share == 'permuted':  # n - 1 permutations of a shard are one gather of n
                ways = math.prod(mesh.shape[axis] for axis in collective.axes)
                size *= ways / (ways - 1)
            totals[share] += 2 * size if collective.kind == 'all-reduce' else size
    return WeightTraffic(
        gathered=totals['gathered'] / microbatches,
        scattered=totals['scattered'] / microbatches,
        permuted=totals['permuted'] / microbatches,
        least_gathered=2 * least,
        least_scattered=least,
        other=totals['other'] / microbatches,
    )


def _share(collective: Collective, axes: set[str]) -> str:
    shares = {'all-gather': 'gathered', 'reduce-scatter': 'scattered', 'collective-permute': 'permuted'}
    if collective.kind in shares and axes.issuperset(collective.axes):
        return shares[collective.kind]
    if collective.kind == 'all-reduce' and axes.intersection(collective.axes):
        return 'scattered'
    return 'other'


@dataclasses.dataclass(frozen=True)
class _Gathered:
    """A parameter as the devices of one gather have it.

    Attributes:
        stack: layers on one device, 1 if it is not stacked. dimensions: of one layer, less the splits that stay.
        ways: by which each dimension is divided again where it is not gathered, one factor for each mesh axis.
        axes: mesh axes that it is gathered over.
    """

    stack: int
    dimensions: tuple[int, ...]
    ways: tuple[tuple[int, ...], ...]
    axes: tuple[str, ...]

    @staticmethod
    def of(spec: ParameterSpec, mesh: Mesh | AbstractMesh, rules: AxisRules) -> '_Gathered':
        stored = rules.place(spec.axes, spec.shape, mesh)
        used = rules.partition(spec.axes, mesh, parameters=False)
        stack, dimensions, ways, axes = 1, [], [], []
        for axis, size, here, there in zip(spec.axes, spec.shape, stored, used, strict=True):
            kept = [name for name in names(here) if axis in _OWN_SHARE or name in names(there)]
            moved = [name for name in names(here) if name not in kept]
            share = size // math.prod(mesh.shape[name] for name in kept)
            if axis in ('layers', 'remainder'):
                stack *= share
            else:
                dimensions.append(share)
                ways.append(tuple(mesh.shape[name] for name in moved))
                axes += moved
        return _Gathered(stack, tuple(dimensions), tuple(ways), tuple(axes))

    @property
    def elements(self) -> int:
        """Of all layers."""
        return self.stack * math.prod(self.dimensions)

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Sorted dimensions above 1 of every array that a gather over some of the axes may give."""
        choices = []
        for size, ways in zip(self.dimensions, self.ways, strict=True):
            divisors = {math.prod(some) for n in range(len(ways) + 1) for some in itertools.combinations(ways, n)}
            choices.append([size // divisor for divisor in sorted(divisors)])
        for dimensions in itertools.product(*choices):
            for merged in _with_merged_neighbours(dimensions):
                yield tuple(sorted(size for size in merged if size > 1))
                yield tuple(sorted(size for size in (self.stack, *merged) if size > 1))


def _with_merged_neighbours(dimensions: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if len(dimensions) < 2:
        yield dimensions
        return
    for rest in _with_merged_neighbours(dimensions[1:]):
        yield (dimensions[0], *rest)
        yield (dimensions[0] * rest[0], *rest[1:])
