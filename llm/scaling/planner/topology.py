"""Machines that need not exist: a topology's name to its chips, its devices to compile for, and its links.

`v5e:16x16` is a TPU slice of 16 x 16 chips, described by libtpu; several slices are a count. `h100:8x4` is 4 nodes of
8 GPUs, planned by figures alone. `cpu:8` is this machine's CPU as 8 simulated devices.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from llm.errors import UserError
from llm.parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from llm.scaling.accounting import measured_cpu_flops
from llm.scaling.chips import CHIPS, Chip

Platform = Literal['tpu', 'gpu', 'cpu']

# libtpu describes topologies on any Linux machine, if told not to look for a TPU of its own.
_WITHOUT_A_TPU = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
_EXAMPLES = 'v5e:16x16, v6e:4x4, v5p:8x8x8, v4:4x4x4, tpu7x:4x4x4, h100:8x4, cpu:8'


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine to plan for.

    Attributes:
        name: as given. platform: of its chips. chip: their figures.
        shape: chips along each side of a slice; (GPUs of a node, nodes); (devices,) of a CPU.
        num_slices: of that shape.
        devices: () where jax knows none of the kind here. compiles: whether to compile for them.
        num_devices: jax devices in all. device_share: part of a chip that a device is.
    """

    name: str
    platform: Platform
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int
    devices: tuple[jax.Device, ...]
    num_devices: int
    device_share: float
    compiles: bool

    @property
    def num_chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For each side of the torus whether its ends are joined."""
        return _wraps(self.chip, self.shape)

    @property
    def memory_per_device(self) -> float:
        """Bytes of HBM that a program may use on one device."""
        return self.chip.hbm_bytes * self.device_share - self.chip.reserved_bytes

    @property
    def peak_flops_per_device(self) -> float:
        """Dense bf16 FLOP/s of one device."""
        return self.chip.peak_flops * self.device_share

    @property
    def hbm_bandwidth_per_device(self) -> float:
        """Bytes/s of one device."""
        return self.chip.hbm_bandwidth * self.device_share

    @property
    def host_bandwidth_per_device(self) -> float:
        """Bytes/s of one device to the memory of its host, or from it."""
        return self.chip.host_bandwidth * self.device_share

    @property
    def on_chip_memory(self) -> float:
        """Bytes beside HBM in which a device's program keeps what it works on."""
        return self.chip.vmem_bytes * self.device_share

    def sizes(self, config: MeshConfig) -> dict[str, int]:
        """Mesh axes and their sizes on all devices of this topology.

        Raises:
            UserError: the mesh does not use every device.
        """
        try:
            sizes = dict(zip(MESH_AXES, config.sizes(self.num_devices), strict=True))
        except UserError as error:
            what = error.what.replace('exist', f'are in {self.name}')
            fix = f'{self.name} has {self.num_devices} devices: make the axes of MeshConfig multiply to that.'
            raise UserError(what, where='MeshConfig', fix=fix) from error
        if math.prod(sizes.values()) != self.num_devices:
            wanted = ' x '.join(f'{axis}={size}' for axis, size in sizes.items() if size > 1) or 'of one device'
            raise UserError(
                f'mesh {wanted} leaves some of the {self.num_devices} devices of {self.name} without work',
                where='MeshConfig',
                fix='Make its axes multiply to that; -1 for one axis takes what is left.',
            )
        across = math.prod(config.across_slices())
        if across != self.num_slices:
            raise UserError(
                f'the mesh goes over {across} slices, and there are {self.num_slices} of them',
                where='MeshConfig',
                fix='Let the product of dcn_data, dcn_fsdp and dcn_pipeline be the number of slices.',
            )
        return sizes

    def links(self, config: MeshConfig) -> 'Links':
        """What connects the devices along the axes of this mesh."""
        sizes = self.sizes(config)
        if self.platform == 'tpu':
            return _torus_links(self, make_mesh(config, list(self.devices)))
        return _switch_links(self, sizes)


@dataclasses.dataclass(frozen=True)
class Links:
    """How fast a device sends along mesh axes.

    Attributes:
        bandwidth: bytes/s of one device in a ring along each axis, within a slice or node.
        across: slices or nodes along each axis that leaves one.
        network: bytes/s of one device over the data-center network.
        sides: of the torus that each axis runs along, empty for a switch. sizes: of the mesh axes.
    """

    sizes: dict[str, int]
    bandwidth: dict[str, float]
    across: dict[str, int]
    network: float
    sides: dict[str, frozenset[int]]

    def ways(self, axes: Sequence[str]) -> int:
        """Devices along `axes`."""
        return math.prod(self.sizes[axis] for axis in axes)

    def network_ways(self, axes: Sequence[str]) -> int:
        """Slices or nodes along `axes`."""
        return math.prod(self.across.get(axis, 1) for axis in axes)

    def along(self, axes: Sequence[str], *, across_slices: bool) -> float:
        """Bytes/s that a device sends in a collective along `axes`, within its slice or node or over the network."""
        if across_slices:
            return self.network
        if not axes:
            return math.inf
        rates = [self.bandwidth[axis] for axis in axes]
        # Axes on different sides of a torus send at the same time; on one side, or a switch, they share its links.
        if len(set().union(*(self.sides[axis] for axis in axes))) == sum(len(self.sides[axis]) for axis in axes) > 0:
            return sum(rates)
        return max(rates)


def find_topology(name: str, num_slices: int = 1) -> Topology:
    """The machine called `name`.

    Args:
        num_slices: of a TPU topology, joined by the data-center network.

    Raises:
        UserError: there is no such machine, or what describes it is not installed.
    """
    kind, shape = _parse(name)
    if num_slices < 1:
        raise UserError(f'num_slices is {num_slices}', where='Plan.num_slices', fix='Use at least 1.')
    if kind == 'cpu':
        return _cpu(name, shape, num_slices)
    chip = CHIPS[kind]
    if chip.device_kind:
        return _tpu(name, chip, shape, num_slices)
    if num_slices > 1 or len(shape) > 2:
        raise UserError(
            f'{name!r} with {num_slices} slices is no machine of GPUs',
            where='Plan.topology',
            fix=f"Write the GPUs of a node and the nodes: '{kind}:8x4'.",
        )
    shape = (*shape, 1)[:2]
    return Topology(name, 'gpu', chip, shape, 1, (), math.prod(shape), 1.0, compiles=False)


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    found = re.fullmatch(r'([a-z0-9]+):(\d+(?:x\d+)*)', name)
    kinds = ['cpu', *CHIPS]
    if not found or found[1] not in kinds:
        raise UserError(
            f'{name!r} is no topology',
            where='Plan.topology',
            fix=f'Write a chip and its shape, as {_EXAMPLES}; chips are {", ".join(kinds)}.',
        )
    shape = tuple(int(side) for side in found[2].split('x'))
    if 0 in shape:
        raise UserError(f'{name!r} has no chips', where='Plan.topology', fix='Use sides of at least 1.')
    return found[1], shape


def _tpu(name: str, chip: Chip, shape: tuple[int, ...], num_slices: int) -> Topology:
    if len(shape) != chip.torus_dimensions:
        example = 'x'.join(['4'] * chip.torus_dimensions)
        raise UserError(
            f'{name!r} has {len(shape)} sides, and {chip.name} chips are joined in {chip.torus_dimensions}',
            where='Plan.topology',
            fix=f"Write it as '{chip.name}:{example}'.",
        )
    if math.prod(shape) > chip.pod_chips:
        raise UserError(
            f'{name!r} has {math.prod(shape)} chips, and the largest slice of {chip.name} has {chip.pod_chips}',
            where='Plan.topology',
            fix='Use several slices: Plan.num_slices.',
        )
    if jax.default_backend() != 'tpu':
        for variable, value in _WITHOUT_A_TPU.items():
            os.environ.setdefault(variable, value)
    try:
        devices = _described(name, shape, _wraps(chip, shape), num_slices)
    except Exception as error:
        text = str(error)
        if 'INVALID_ARGUMENT' not in text:
            raise UserError(
                'the TPU compiler is not installed or cannot be used here',
                where=f'Plan.topology = {name!r}',
                fix=f"pip install 'llm-jax[tpu]' (it needs no TPU). It says: {text}",
            ) from error
        raise UserError(
            f'{name!r} is no shape that {chip.name} slices have',
            where='Plan.topology',
            fix=f'Use sides that are multiples of 2, as {_EXAMPLES}. The TPU compiler says: {text}',
        ) from error
    return Topology(
        name=name if num_slices == 1 else f'{num_slices} slices of {name}',
        platform='tpu',
        chip=chip,
        shape=shape,
        num_slices=num_slices,
        devices=devices,
        num_devices=len(devices),
        device_share=chip.share(devices[0].num_cores),
        compiles=True,
    )


def _wraps(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Switches between blocks of three dimensions join all sides, or none where one is no whole number of blocks."""
    joined = tuple(side % chip.wraps == 0 for side in shape)
    return joined if len(shape) < 3 else (all(joined),) * len(shape)


@functools.cache
def _described(name: str, shape: tuple[int, ...], wraps: tuple[bool, ...], num_slices: int) -> tuple[jax.Device, ...]:
    """The same devices each time: jax compares programs that it has traced before by their devices."""
    from jax.experimental import topologies

    # A host has 2 x 2 chips; slices of less than that are described by their own shape.
    options: dict[str, Any] = {'wrap': (*wraps, False)[:3]}
    if 1 in shape[:2] and max(shape) <= 2:
        options['chips_per_host_bounds'] = (*shape, 1)[:3]
    if name.startswith('v4:'):
        options['chip_config_name'] = 'megacore'  # one device a chip, as jax has it there
    if num_slices > 1:
        options['num_slices'] = num_slices
    return tuple(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)


def _cpu(name: str, shape: tuple[int, ...], num_slices: int) -> Topology:
    if len(shape) > 1 or num_slices > 1:
        raise UserError(f'{name!r} is no CPU', where='Plan.topology', fix="Write the number of devices: 'cpu:8'.")
    count = shape[0]
    # Read when the first device is asked for; a process that has asked already keeps the number that it has.
    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        with contextlib.suppress(RuntimeError):
            jax.config.update('jax_num_cpu_devices', count)
    devices = jax.devices('cpu')
    if len(devices) < count:
        raise UserError(
            f'this process has {len(devices)} CPU devices, and {name!r} asks for {count}',
            where='Plan.topology',
            fix=f'Start it with XLA_FLAGS=--xla_force_host_platform_device_count={count}.',
        )
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    # Simulated devices share one machine. What they send each other is copied in its memory.
    bandwidth = _measured_memory_bandwidth()
    chip = Chip(
        name='cpu',
        device_kind='cpu',
        cores=count,
        peak_flops=measured_cpu_flops(),
        hbm_bytes=float(memory),
        reserved_bytes=0.0,
        hbm_bandwidth=bandwidth,
        link_bandwidth=bandwidth / count,
        torus_dimensions=0,
        wraps=0,
        host_bandwidth=bandwidth / count,
        network_bandwidth=bandwidth / count,
        pod_chips=1,
        vmem_bytes=0,
        source='measured here: fp32 products of 1024 x 1024 matrices, a copy of 64 MB',
    )
    return Topology(name, 'cpu', chip, shape, 1, tuple(devices[:count]), count, 1 / count, compiles=True)


def _measured_memory_bandwidth() -> float:
    """Bytes/s read and written by the fastest of a few copies of 64 MB."""
    import time

    source = np.ones(2**23)
    target = np.empty_like(source)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


def _torus_links(topology: Topology, mesh: Mesh) -> Links:
    """From the coordinates of the devices along each axis."""
    chip = topology.chip
    bandwidth, sides, across = {}, {}, {}
    for number, axis in enumerate(MESH_AXES):
        line = np.moveaxis(mesh.devices, number, 0).reshape(mesh.devices.shape[number], -1)[:, 0]
        slices = len({getattr(device, 'slice_index', 0) for device in line})
        if slices > 1:
            across[axis] = slices
        along = [side for side in range(len(topology.shape)) if len({device.coords[side] for device in line}) > 1]
        # Both ways round where the ends of the side are joined; a line sends half its ring the long way.
        links = sum(2 if topology.wraps[side] else 1 for side in along)
        # Two devices of one chip reach each other without a link.
        bandwidth[axis] = links * chip.link_bandwidth * topology.device_share if along else math.inf
        sides[axis] = frozenset(along)
    return Links(dict(mesh.shape), bandwidth, across, chip.network_bandwidth * topology.device_share, sides)


def _switch_links(topology: Topology, sizes: dict[str, int]) -> Links:
    """Devices fill one node after the other in the order of the mesh: inner axes stay within a node if they fit."""
    bandwidth, across, reach = {}, {}, 1
    for axis in reversed(MESH_AXES):
        nodes = -(-reach * sizes[axis] // topology.shape[0]) // -(-reach // topology.shape[0])
        reach *= sizes[axis]
        bandwidth[axis] = topology.chip.link_bandwidth
        if nodes > 1:
            across[axis] = nodes
    return Links(sizes, bandwidth, across, topology.chip.network_bandwidth, dict.fromkeys(MESH_AXES, frozenset()))
