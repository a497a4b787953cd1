"""The device mesh: six named axes, any of which may be 1. One device is a mesh of ones."""

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from llm.errors import UserError

MESH_AXES = ('pipeline', 'data', 'fsdp', 'expert', 'sequence', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. -1 (at most once) means: whatever devices are left.

    The order of MESH_AXES puts `tensor` innermost, where the links are fastest.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    pipeline: int = 1

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
    return jax.make_mesh(
        sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices[: math.prod(sizes)]
    )
