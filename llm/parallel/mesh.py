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
        dcn_data, dcn_fsdp, dcn_pipeline: over how many slices, which are connected by the data centre's network alone,
            an axis goes. It is a factor of the axis: data=2, dcn_data=2, fsdp=256 is two slices of 256 chips, with
            parameters cut up within a slice and gradients added across (hybrid sharding). Where devices know nothing of
            slices, as simulated ones, equal runs of them are taken for slices.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    pipeline: int = 1
    dcn_data: int = 1
    dcn_fsdp: int = 1
    dcn_pipeline: int = 1

    def across_slices(self) -> tuple[int, ...]:
        """The factors of the axes that go across slices, in the order of MESH_AXES."""
        factors = {'data': self.dcn_data, 'fsdp': self.dcn_fsdp, 'pipeline': self.dcn_pipeline}
        return tuple(factors.get(axis, 1) for axis in MESH_AXES)

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
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    across = config.across_slices()
    devices = devices[: math.prod(sizes)]
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    if math.prod(across) == 1:
        return Mesh(_near(sizes, devices), MESH_AXES, axis_types=kinds)
    for axis, size, factor in zip(MESH_AXES, sizes, across, strict=True):
        if factor < 1 or size % factor:
            raise UserError(
                f'mesh axis {axis} of size {size} cannot go over {factor} slices',
                where=f'MeshConfig.dcn_{axis}',
                fix=f'Use a divisor of {size}.',
            )
    within = tuple(size // factor for size, factor in zip(sizes, across, strict=True))
    slices = _slices(devices, math.prod(across))
    blocks = [_near(within, part) for part in slices]
    # Axis by axis the slices come first: [*across, *within] -> [across_0, within_0, across_1, ...].
    grid = np.array(blocks).reshape(*across, *within)
    order = [axis for pair in zip(range(len(sizes)), range(len(sizes), 2 * len(sizes)), strict=True) for axis in pair]
    return Mesh(grid.transpose(order).reshape(sizes), MESH_AXES, axis_types=kinds)


def _near(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """The devices so that neighbours along an axis are neighbours on the links, as far as that goes."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # no whole sides of the torus multiply to these sizes
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _slices(devices: list[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each slice.

    Raises:
        UserError: they are not `count` slices of the same size.
    """
    known: dict[int, list[jax.Device]] = {}
    for device in devices:
        known.setdefault(getattr(device, 'slice_index', None) or 0, []).append(device)
    if len(known) == 1 and devices[0].platform != 'tpu':
        return [list(part) for part in np.array(devices).reshape(count, -1)]
    if len(known) != count or len({len(part) for part in known.values()}) > 1:
        sizes = ', '.join(str(len(part)) for part in known.values())
        raise UserError(
            f'the mesh goes over {count} slices, but the devices are {len(known)} of {sizes} devices',
            where='MeshConfig',
            fix='Let the product of dcn_data, dcn_fsdp and dcn_pipeline be the number of slices.',
        )
    return [known[index] for index in sorted(known)]
