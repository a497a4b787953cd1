"""Every collective of a compiled program: what it moves, along which mesh axes, how often, beside other work or not.

Bytes. `payload` is the whole array of a collective, on one device: the result of an all-gather, the operand of every
other kind. `link_bytes` is what a device sends when n devices work in a ring (Thakur et al. 2005, "Optimization of
Collective Communication Operations in MPICH", section 4): payload * (n - 1) / n for all-gather, reduce-scatter and
all-to-all (the last without counting what travels through others), twice that for all-reduce, payload for
collective-permute. Both are of one execution; `Collective.count` says how many there are in one run of the program.

Counts. A `while` multiplies what its body does by its trip count: the compiler's `known_trip_count` (XLA:CPU writes
it), else that of a counter which the condition compares with a constant and the body increases by a constant (TPU).
A counter whose first value is not found is taken to start at 0. A loop that ends by other means counts as one trip
and is listed in `Program.unknown_loops`. Of a `conditional`, the branch with the most link bytes counts.

Backends. XLA:TPU writes a reduce-scatter as a fusion of all-reduce and dynamic-slice, and an asynchronous collective as
fusions that start it, go on with it beside other work, and end it, each holding the same instruction: here that is one
collective. Between slices (over the data-center network) it writes a send and a receive. XLA:CPU partitions a
reduce-scatter into an all-reduce and a slice, which is counted as the all-reduce that it is.
"""

import dataclasses
import math
from collections.abc import Callable

from jax.sharding import AbstractMesh, Mesh

from llm.scaling.program.hlo_text import Computation, Instruction, Shape, parse
from llm.scaling.program.loops import trip_count
from llm.scaling.program.replica_groups import Groups, replica_groups, source_target_pairs, spanned_axes

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')

# Factor on the payload for what one of n devices of a ring sends.
RING_FACTORS: dict[str, Callable[[int], float]] = {
    'all-gather': lambda n: (n - 1) / n,
    'reduce-scatter': lambda n: (n - 1) / n,
    'all-reduce': lambda n: 2 * (n - 1) / n,
    'all-to-all': lambda n: (n - 1) / n,
    'collective-permute': lambda n: 1.0,
}

_SYNONYMS = {'ragged-all-to-all': 'all-to-all', 'collective-broadcast': 'collective-permute'}
_SLICES = 'dynamic-slice'
_LOOKED_THROUGH = ('get-tuple-element', 'bitcast', 'copy', 'reshape', 'transpose', 'convert')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of the program.

    Attributes:
        kind: one of KINDS. name: of the instruction. op_name: JAX's name for where it comes from.
        shapes: the whole arrays, on one device: results of an all-gather, operands of other kinds.
        group_size: devices that take part in one group. axes: mesh axes that a group spans; () for one device.
        across_slices: whether it leaves a slice, over the data-center network.
        asynchronous: whether the program does other work while it runs, as far as the compiler found any.
        count: executions in one run of the program.
    """

    kind: str
    name: str
    op_name: str
    shapes: tuple[Shape, ...]
    group_size: int
    axes: tuple[str, ...]
    across_slices: bool
    asynchronous: bool
    count: int

    @property
    def payload(self) -> float:
        """Bytes of the whole arrays on one device, one execution."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def link_bytes(self) -> float:
        """Bytes that a device sends in one execution in a ring."""
        return self.payload * RING_FACTORS[self.kind](self.group_size)

    @property
    def element_type(self) -> str:
        """Of the largest array."""
        return max(self.shapes, key=lambda shape: shape.bytes).element_type if self.shapes else ''


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind along the same mesh axes, added up over a run of the program.

    Attributes:
        executions: of any of them. payload, link_bytes: see the module's docstring; of all executions, on one device.
        asynchronous_link_bytes: the part of link_bytes that runs beside other work.
    """

    kind: str
    axes: tuple[str, ...]
    across_slices: bool
    executions: int
    payload: float
    link_bytes: float
    asynchronous_link_bytes: float


@dataclasses.dataclass(frozen=True)
class Program:
    """What was read.

    Attributes:
        collectives: those that move bytes to another device.
        unknown_loops: names of `while` instructions that hold collectives and whose trip count could not be read.
    """

    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]

    def traffic(self) -> tuple[Traffic, ...]:
        """Sums by (axes, kind), most link bytes first."""
        groups: dict[tuple[tuple[str, ...], str, bool], list[Collective]] = {}
        for each in self.collectives:
            groups.setdefault((each.axes, each.kind, each.across_slices), []).append(each)
        rows = [
            Traffic(
                kind=kind,
                axes=axes,
                across_slices=across,
                executions=sum(each.count for each in found),
                payload=sum(each.count * each.payload for each in found),
                link_bytes=sum(each.count * each.link_bytes for each in found),
                asynchronous_link_bytes=sum(each.count * each.link_bytes for each in found if each.asynchronous),
            )
            for (axes, kind, across), found in groups.items()
        ]
        return tuple(sorted(rows, key=lambda row: (-row.link_bytes, row.axes, row.kind)))


def read_program(text: str, mesh: Mesh | AbstractMesh) -> Program:
    """The collectives of a program compiled for `mesh`.

    Args:
        text: optimized HLO, `compiled.as_text()`; of TPU or CPU.
        mesh: whose devices, in order, the program runs on. Slices are told apart by the devices of a Mesh; an
            AbstractMesh is one slice.

    Raises:
        ValueError: the text is no optimized HLO module, or holds replica groups in an unknown form.
    """
    return _Reader(parse(text), mesh).read()


@dataclasses.dataclass
class _Found:
    collectives: list[Collective]
    unknown_loops: list[str]

    @property
    def link_bytes(self) -> float:
        return sum(each.count * each.link_bytes for each in self.collectives)

    def add(self, other: '_Found', times: int) -> None:
        self.collectives += [dataclasses.replace(each, count=each.count * times) for each in other.collectives]
        self.unknown_loops += [name for name in other.unknown_loops if name not in self.unknown_loops]


class _Reader:
    def __init__(self, computations: dict[str, Computation], mesh: Mesh | AbstractMesh) -> None:
        self.computations = computations
        self.axis_sizes = dict(mesh.shape)
        devices = list(mesh.devices.flat) if isinstance(mesh, Mesh) else [None] * math.prod(self.axis_sizes.values())
        self.slices = [getattr(device, 'slice_index', 0) for device in devices]
        self.found: dict[str, _Found] = {}
        self.fused = {
            name
            for computation in computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == 'fusion'
            for _, name in instruction.called
        }
        # The channels of asynchronous fusions: whichever fusion does not start one goes on with it.
        self.started = {
            instruction.attribute('channel_id')
            for computation in computations.values()
            if _targets(computation, 'AsyncCollectiveStart')
            for instruction in computation.instructions.values()
            if _kind(instruction) is not None
        }

    def read(self) -> Program:
        entry = next(computation for computation in self.computations.values() if computation.is_entry)
        found = self.in_computation(entry)
        return Program(tuple(found.collectives), tuple(found.unknown_loops))

    def in_computation(self, computation: Computation) -> _Found:
        """Everything that one run of `computation` does."""
        if computation.name not in self.found:
            found = _Found([], [])
            for instruction in computation.instructions.values():
                self.in_instruction(instruction, computation, found)
            self.found[computation.name] = found
        return self.found[computation.name]

    def in_instruction(self, instruction: Instruction, computation: Computation, found: _Found) -> None:
        kind = _kind(instruction)
        if kind is not None:
            collective = self.collective(kind, instruction, computation)
            if collective is not None:
                found.collectives.append(collective)
            return
        called = {attribute: self.computations[name] for attribute, name in instruction.called}
        if instruction.opcode == 'while':
            inside = _Found([], [])
            inside.add(self.in_computation(called['body']), 1)
            inside.add(self.in_computation(called['condition']), 1)
            trips = trip_count(instruction, computation, self.computations)
            if trips is None and inside.collectives:
                inside.unknown_loops.append(instruction.name)
            found.add(inside, 1 if trips is None else trips)
        elif instruction.opcode == 'conditional':
            branches = [self.in_computation(self.computations[name]) for _, name in instruction.called]
            found.add(max(branches, key=lambda branch: branch.link_bytes), 1)
        elif instruction.opcode in ('fusion', 'call', 'custom-call'):
            for target in called.values():
                found.add(self.in_computation(target), 1)
        elif instruction.opcode == 'async-start':
            for target in called.values():
                inside = self.in_computation(target)
                background = [dataclasses.replace(each, asynchronous=True) for each in inside.collectives]
                found.add(_Found(background, inside.unknown_loops), 1)

    def collective(self, kind: str, instruction: Instruction, computation: Computation) -> Collective | None:
        """None for what is no collective of its own: the end of one, a group of one device."""
        if instruction.opcode == 'send':
            return self.between_slices(instruction, computation)
        asynchronous = instruction.opcode.endswith('-start')
        if instruction.attribute('channel_id') in self.started:
            if _targets(computation, 'AsyncCollectiveStart'):
                asynchronous = True
            elif _targets(computation, 'AsyncCollectiveDone') or computation.name.startswith('async_collective'):
                return None
        if kind == 'all-reduce' and computation.name in self.fused and _is_reduce_scatter(instruction, computation):
            kind = 'reduce-scatter'
        if 'source_target_pairs=' in instruction.attributes:
            groups = source_target_pairs(instruction.attributes)
        else:
            groups = replica_groups(instruction.attributes, len(self.slices))
        groups = self.of_mesh(groups)
        size = max(map(len, groups))
        if all(len(set(group)) == 1 for group in groups):
            return None
        shapes = _operand_shapes(instruction, computation)
        if kind == 'all-gather':
            dimension = int(instruction.list_attribute('dimensions') or 0)
            shapes = tuple(_gathered(shape, dimension, size) for shape in shapes)
        return Collective(
            kind=kind,
            name=instruction.name,
            op_name=instruction.op_name,
            shapes=shapes,
            group_size=size,
            axes=spanned_axes(groups, self.axis_sizes),
            across_slices=any(len({self.slices[device] for device in group}) > 1 for group in groups),
            asynchronous=asynchronous,
            count=1,
        )

    def of_mesh(self, groups: Groups) -> Groups:
        """Groups as positions in the mesh: a program for several slices numbers the devices within its own slice."""
        num_slices = len(set(self.slices))
        if num_slices > 1 and max(map(max, groups)) < len(self.slices) // num_slices:
            own = [device for device, index in enumerate(self.slices) if index == self.slices[0]]
            return tuple(tuple(own[device] for device in group) for group in groups)
        return groups

    def between_slices(self, send: Instruction, computation: Computation) -> Collective | None:
        """The collective that a transfer over the data-center network stands for."""
        transfer = _frontend_attribute(send, '_xla_megascale_transfer_type')
        kind = {'ONE_TO_ONE': 'collective-permute'}.get(transfer, transfer.lower().replace('_', '-'))
        if kind not in KINDS:
            return None
        source = send
        if kind == 'all-gather':
            rendezvous = _frontend_attribute(send, '_xla_host_transfer_rendezvous')
            source = next(
                (
                    each
                    for each in computation.instructions.values()
                    if each.opcode == 'recv'
                    and _frontend_attribute(each, '_xla_host_transfer_rendezvous') == rendezvous
                ),
                send,
            )
        slices_along = {
            axis: {self.slices[device] for device in line}
            for axis, line in ((axis, self.line(axis)) for axis in self.axis_sizes)
        }
        axes = tuple(axis for axis, along in slices_along.items() if len(along) > 1)
        return Collective(
            kind=kind,
            name=send.name,
            op_name=send.op_name,
            shapes=source.shapes[:1],
            group_size=len(set(self.slices)),
            axes=axes,
            across_slices=True,
            asynchronous=True,
            count=1,
        )

    def line(self, axis: str) -> list[int]:
        """The devices along `axis` through the first one."""
        names = list(self.axis_sizes)
        stride = math.prod(self.axis_sizes[name] for name in names[names.index(axis) + 1 :])
        return [stride * index for index in range(self.axis_sizes[axis])]


def _kind(instruction: Instruction) -> str | None:
    """Of KINDS, for an instruction that begins a collective."""
    opcode = instruction.opcode
    if opcode == 'send' and '_xla_megascale_transfer_type' in instruction.attributes:
        return 'send'
    opcode = opcode.removesuffix('-start')
    opcode = _SYNONYMS.get(opcode, opcode)
    return opcode if opcode in KINDS else None


def _targets(computation: Computation, target: str) -> bool:
    return any(
        f'custom_call_target="{target}"' in each.attributes
        for each in computation.instructions.values()
        if each.opcode == 'custom-call'
    )


def _frontend_attribute(instruction: Instruction, name: str) -> str:
    return instruction.attributes.partition(f'{name}="')[2].partition('"')[0]


def _is_reduce_scatter(all_reduce: Instruction, computation: Computation) -> bool:
    """Whether of an all-reduce in a fusion only slices are used."""
    waiting, slices = [all_reduce.name], 0
    while waiting:
        for user in computation.users.get(waiting.pop(), ()):
            if user.opcode in _LOOKED_THROUGH:
                waiting.append(user.name)
            elif user.opcode == _SLICES:
                slices += 1
            else:
                return False
    return slices > 0


def _operand_shapes(instruction: Instruction, computation: Computation) -> tuple[Shape, ...]:
    return tuple(shape for name in instruction.operands for shape in computation.instructions[name].shapes)


def _gathered(shape: Shape, dimension: int, size: int) -> Shape:
    dimensions = list(shape.dimensions)
    dimensions[dimension] *= size
    return Shape(shape.element_type, tuple(dimensions))
