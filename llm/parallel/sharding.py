"""Where logical axes live on the mesh: one table, read for parameters and for activations."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llm.errors import UserError

Axes = tuple[str | None, ...]
MeshAxes = str | tuple[str, ...] | None


def names(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """The table: (logical axis, mesh axes it is split over). First fitting row wins, `None` keeps an axis whole.

    A mesh axis is used at most once in one array: a row whose mesh axes are already taken by an earlier dimension
    is passed over. `parameters` is read for parameters and optimizer state, `activations` for activations.

    'residual' is the sequence axis of the residual stream, between layers and in norms: there the devices that share
    each matrix product share tokens instead (Korthikanti et al. 2022, "sequence parallelism"), so that an all-reduce
    becomes a reduce-scatter and an all-gather, and what is kept for the backward pass is cut up too.

    Attributes:
        sequence_method: how attention reaches the tokens of other devices when rows are cut along the `sequence` axis:
            'ring', 'ulysses' or 'all_gather'; see llm.kernels.attention.sequence.
    """

    parameters: tuple[tuple[str, MeshAxes], ...] = (
        ('layers', 'pipeline'),
        ('experts', 'expert'),
        ('vocab', ('pipeline', 'tensor')),
        ('positions', 'pipeline'),
        ('heads', 'tensor'),
        ('kv_heads', 'tensor'),
        ('mlp', 'tensor'),
        # Where there are no experts to cut, whatever cuts tokens cuts parameters.
        ('embed', ('fsdp', 'sequence', 'expert')),
        ('embed', ('fsdp', 'sequence')),
    )
    activations: tuple[tuple[str, MeshAxes], ...] = (
        ('batch', ('data', 'fsdp', 'expert')),
        ('sequence', 'sequence'),
        ('residual', ('sequence', 'tensor')),
        ('heads', 'tensor'),
        ('kv_heads', 'tensor'),
        ('mlp', 'tensor'),
        ('vocab', ('pipeline', 'tensor')),
    )
    sequence_method: Literal['ring', 'ulysses', 'all_gather'] = 'ring'

    def __post_init__(self) -> None:
        methods = ('ring', 'ulysses', 'all_gather')
        if self.sequence_method not in methods:
            raise UserError(
                f'sequence_method is {self.sequence_method!r}',
                where='AxisRules',
                fix=f'Use one of {", ".join(methods)}.',
            )

    def place(self, axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """The PartitionSpec of a parameter of this shape; a dimension may turn out not to be divisible.

        Layers of a stack that the stages of a pipeline cannot share evenly, and layers that are not in the stack, are
        cut up over the stages along another dimension: the largest that can be.
        """
        spec = list(self.partition(axes, mesh, parameters=True))
        if not axes or axes[0] not in ('layers', 'remainder', 'depths'):
            return PartitionSpec(*spec)
        over = names(self.partition(('layers',), mesh, parameters=True)[0])
        ways = math.prod(mesh.shape[axis] for axis in over)
        if not over or (axes[0] == 'layers' and shape[0] % ways == 0):
            return PartitionSpec(*spec)
        spec[0] = None
        left = [size // math.prod(mesh.shape[a] for a in names(e)) for size, e in zip(shape, spec, strict=True)]
        # Not experts: a pipeline gathers the other dimensions, and those stay where they are.
        if fitting := [i for i in range(1, len(shape)) if left[i] % ways == 0 and axes[i] != 'experts']:
            widest = max(fitting, key=lambda i: left[i])
            spec[widest] = (*over, *names(spec[widest]))
        return PartitionSpec(*(each if not isinstance(each, tuple) or len(each) > 1 else each[0] for each in spec))

    def splitting(self, axis: str, mesh_axis: str) -> 'AxisRules':
        """These rules with activations split along `axis` over one more mesh axis, the minor one."""
        rows = tuple((each, (*names(over), mesh_axis) if each == axis else over) for each, over in self.activations)
        return dataclasses.replace(self, activations=rows)

    def partition(self, axes: Axes, mesh: Mesh | AbstractMesh, *, parameters: bool) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Mesh axes of size 1 are left out, and in a part of a program where they are manual, manual axes.
        """
        rows = self.parameters if parameters else self.activations
        taken: set[str] = set()
        spec: list[MeshAxes] = []
        for axis in axes:
            chosen: tuple[str, ...] = ()
            for logical, mesh_axes in rows:
                if logical == axis and mesh_axes is not None:
                    wanted = names(mesh_axes)
                    usable = tuple(a for a in wanted if mesh.shape[a] > 1 and a not in mesh.manual_axes)
                    if not taken.intersection(usable):
                        chosen = usable
                        break
            taken.update(chosen)
            spec.append(chosen[0] if len(chosen) == 1 else (chosen or None))
        return PartitionSpec(*spec)


_current: contextvars.ContextVar[tuple[Mesh | AbstractMesh, AxisRules] | None] = contextvars.ContextVar(
    'axis_rules', default=None
)
_device: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar('device', default=None)


@contextlib.contextmanager
def use_rules(mesh: Mesh | AbstractMesh, rules: AxisRules) -> Iterator[None]:
    """Within this context `constrain` places activations on `mesh` by `rules`.

    An abstract mesh, as manual code has, stands for the devices of the mesh outside.
    """
    token = _current.set((mesh, rules))
    device = _device.set(mesh.devices.flat[0] if isinstance(mesh, Mesh) else _device.get())
    try:
        yield
    finally:
        _device.reset(device)
        _current.reset(token)


def rules_in_force() -> tuple[Mesh | AbstractMesh, AxisRules] | None:
    """What `use_rules` set, for code that places its collectives itself; None outside of rules."""
    return _current.get()


@dataclasses.dataclass(frozen=True)
class SequenceCut:
    """Rows are cut into `pieces` along mesh axis `axis`, and attention goes by `method`.

    Attributes:
        in_step: whether all devices of the mesh do the same at the same time, as they do outside of manual code.
    """

    axis: str
    pieces: int
    method: Literal['ring', 'ulysses', 'all_gather']
    in_step: bool

    def zigzag(self, length: int) -> bool:
        """Whether tokens of rows of `length` are laid out in zig-zag, so that causal work is balanced."""
        return self.method != 'ulysses' and length % (2 * self.pieces) == 0


def sequence_cut() -> SequenceCut | None:
    """How the rules in force cut rows; None where they do not, and outside of rules.

    Raises:
        UserError: rows are cut along two mesh axes.
    """
    current = _current.get()
    if current is None:
        return None
    mesh, rules = current
    axes = rules.partition(('sequence',), mesh, parameters=False)[0]
    if axes is None:
        return None
    if not isinstance(axes, str):
        raise UserError(f'rows are cut along {axes}', where='AxisRules.activations', fix='Use one mesh axis.')
    return SequenceCut(axes, mesh.shape[axes], rules.sequence_method, in_step=not mesh.manual_axes)


def target_device() -> jax.Device:
    """A device of the mesh in force (of a topology that is only compiled for, perhaps), or else of this process."""
    return _device.get() or jax.devices()[0]


def dividing(entry: MeshAxes, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec, but for the last ones until the rest divides `size`."""
    axes = names(entry)
    while size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """Place activation `x`, whose dimensions have these logical axes, by the rules in force; outside of rules, x.

    Of the mesh axes that should split a dimension, the last are left out until the rest divides it: a single token, as
    in decoding, is not split.
    """
    if x.ndim != len(axes):
        raise ValueError(f'array of shape {x.shape} was given axes {axes}')
    current = _current.get()
    if current is None:
        return x
    mesh, rules = current
    spec = []
    for size, entry in zip(x.shape, rules.partition(axes, mesh, parameters=False), strict=True):
        spec.append(dividing(entry, size, mesh) or None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def map_shards(
    function: Callable[..., Any], arrays: dict[str, jax.Array], axes: dict[str, Axes], out_axes: Axes | list[Axes]
) -> Any:
    """Run `function` on every device, on that device's part of the arrays; outside of rules, on the whole arrays.

    For what the compiler cannot split by itself, or would split badly: kernels, loops over the batch.

    Args:
        function: takes the arrays by name. What it gives for a part must be that part of what it gives for the whole.
        axes: logical axes of each array, by name; None keeps a dimension whole. out_axes: those of the result, or a
            list of those of several results.
    """
    current = _current.get()
    if current is None:
        return function(**arrays)
    mesh, rules = current
    open_axes = set(mesh.axis_names) - set(mesh.manual_axes)
    # In manual code also over axes of size 1: the compiler must not be left to partition a kernel, not even into one.
    if not open_axes or (mesh.size == 1 and not mesh.manual_axes):
        return function(**arrays)
    specs = {name: rules.partition(axes[name], mesh, parameters=False) for name in arrays}
    many = out_axes if isinstance(out_axes, list) else [out_axes]
    out_specs = [rules.partition(each, mesh, parameters=False) for each in many]
    mapped = jax.shard_map(
        lambda parts: function(**parts),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=out_specs if isinstance(out_axes, list) else out_specs[0],
        axis_names=open_axes,
        check_vma=False,
    )
    return mapped(arrays)


def split_over(axis: str, *, parameters: bool) -> tuple[str, ...]:
    """The mesh axes, manual ones among them, that the rules in force split dimensions of logical axis `axis` over."""
    current = _current.get()
    if current is None:
        return ()
    mesh, rules = current
    spec = rules.partition((axis,), AbstractMesh(mesh.axis_sizes, mesh.axis_names), parameters=parameters)[0]
    return names(spec)


def manual_axes(axis: str, *, parameters: bool) -> tuple[str, ...]:
    """Those of `split_over` that are manual here: one sees a part of the dimension."""
    current = _current.get()
    manual = () if current is None else current[0].manual_axes
    return tuple(each for each in split_over(axis, parameters=parameters) if each in manual)


def global_rows(rows: int) -> tuple[int, jax.Array | int]:
    """The number of rows of the batch of which `rows` are here, and the index of the first of those."""
    axes = manual_axes('batch', parameters=False)
    if not axes:
        return rows, 0
    return rows * jax.lax.axis_size(axes), rows * jax.lax.axis_index(axes)


def parameter_sharding(
    axes: Axes, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: AxisRules, name: str
) -> NamedSharding:
    """The sharding of one parameter.

    Raises:
        UserError: a dimension is not divisible by the mesh axes it is split over.
    """
    spec = rules.place(axes, shape, mesh)
    for axis, size, mesh_axes in zip(axes, shape, spec, strict=True):
        over = names(mesh_axes)
        ways = math.prod(mesh.shape[mesh_axis] for mesh_axis in over)
        if size % ways:
            raise UserError(
                f'{axis!r} of size {size} cannot be divided over mesh axis {"*".join(over)!r} of size {ways}',
                where=f'parameter {name}',
                fix=f'Change the model so that {ways} divides {size}, or lower MeshConfig.{" or ".join(over)}.',
            )
    return NamedSharding(mesh, spec)
