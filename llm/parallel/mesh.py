"""The device mesh: six named axes, any of which may be 1. One device is a mesh of ones."""

import dataclasses
import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from llm.errors import UserError

MESH_AXES = ('pipeline', 'data', 'fsdp', 'expert', 'sequence', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. -1 (at most once) means: whatever devices are left.

    The order of MESH_AXES puts `tensor` innermost, where the links are fastest.

    Attributes:
        across_slices: the axis that reaches over several TPU slices, where links are slowest; the number of slices must
            divide it. With one slice it means nothing.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    pipeline: int = 1
    across_slices: str = 'data'

    def __post_init__(self) -> None:
        if self.across_slices not in MESH_AXES:
            raise UserError(
                f'across_slices is {self.across_slices!r}',
                where='MeshConfig',
                fix=f'Use one of {", ".join(MESH_AXES)}.',
            )

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Axis sizes in the order of MESH_AXES for `num_devices` devices.

        Raises:
            UserError: the product needs more devices than exist, or does not divide them.
        """
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        requested = ' x '.join(f'{axis}={size}' for axis, size in sizes.items() if size != 1) or 'one device'
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
            raise UserError(
                f'mesh {requested} is not valid', fix='Use sizes of at least 1, and -1 for at most one axis.'
            )
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if fixed > num_devices:
            raise UserError(
                f'mesh {requested} needs {fixed} devices but {num_devices} exist',
                fix='Lower an axis of MeshConfig, or simulate devices on CPU with '
                f'XLA_FLAGS=--xla_force_host_platform_device_count={fixed}.',
            )
        if free:
            if num_devices % fixed:
                raise UserError(
                    f'mesh {requested} cannot use {num_devices} devices evenly',
                    fix=f'The fixed axes multiply to {fixed}, which must divide {num_devices}.',
                )
            sizes[free[0]] = num_devices // fixed
        return tuple(sizes[axis] for axis in MESH_AXES)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that `config` asks for, over the first devices of `devices` (default: all there are).

    Axes are `AxisType.Auto`: the compiler places what the rules of `llm.parallel.sharding` leave open.

    Raises:
        UserError: the devices cannot be divided so.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    devices = devices[: math.prod(sizes)]
    num_slices = len({getattr(device, 'slice_index', 0) for device in devices})
    one = num_slices == 1
    placed = _within_slice(sizes, devices) if one else _across_slices(config, sizes, devices, num_slices)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _within_slice(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Devices so that neighbours along a mesh axis are neighbours on the links, as far as that goes."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # no whole sides of the torus multiply to these sizes
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _across_slices(
    config: MeshConfig, sizes: tuple[int, ...], devices: list[jax.Device], num_slices: int
) -> np.ndarray:
    across = MESH_AXES.index(config.across_slices)
    if sizes[across] % num_slices:
        raise UserError(
            f'mesh axis {config.across_slices}={sizes[across]} cannot be divided over {num_slices} slices',
            where='MeshConfig.across_slices',
            fix=f'Make MeshConfig.{config.across_slices} a multiple of {num_slices}, or name another axis.',
        )
    between = tuple(num_slices if axis == across else 1 for axis in range(len(sizes)))
    within = tuple(size // count for size, count in zip(sizes, between, strict=True))
    try:
        return mesh_utils.create_hybrid_device_mesh(within, between, devices)
    except NotImplementedError:
        return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
