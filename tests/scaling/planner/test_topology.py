import math

import pytest

from llm.errors import UserError
from llm.parallel.mesh import MeshConfig
from llm.scaling.planner.topology import find_topology


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('v5e', 'is no topology'),
        ('v9:4x4', 'is no topology'),
        ('v5e:4x', 'is no topology'),
        ('V5E:4x4', 'is no topology'),
        ('', 'is no topology'),
        ('v5e:0x4', 'has no chips'),
        ('v5e:4x4x4', 'has 3 sides'),
        ('v5p:4x4', 'has 2 sides'),
        ('h100:8x4x2', 'is no machine of GPUs'),
        ('cpu:2x2', 'is no CPU'),
        ('cpu:4096', 'this process has'),
        ('v5e:64x64', 'the largest slice of v5e has 256'),
    ],
)
def test_bad_names_are_refused(name, message):
    with pytest.raises(UserError, match=message) as error:
        find_topology(name)
    assert error.value.where.startswith('Plan.topology') and error.value.fix


@pytest.mark.tpu_compile
def test_shape_that_no_slice_has_is_refused():
    with pytest.raises(UserError, match='no shape that v5e slices have'):
        find_topology('v5e:3x4')


def test_slices_must_be_at_least_one():
    with pytest.raises(UserError, match='num_slices is 0'):
        find_topology('h100:8', 0)


def test_nodes_of_gpus_have_no_compiler():
    topology = find_topology('h100:8x4')
    assert (topology.num_devices, topology.num_chips, topology.compiles) == (32, 32, False)
    assert topology.memory_per_device == 80e9
    assert find_topology('h100:8').num_devices == 8


def test_cpu_shares_its_memory():
    topology = find_topology('cpu:8')
    assert topology.num_devices == 8 and topology.compiles
    assert topology.memory_per_device * 8 == topology.chip.hbm_bytes > 1e9
    assert topology.peak_flops_per_device * 8 == topology.chip.peak_flops > 1e8


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ('name', 'slices', 'chips', 'devices'),
    [
        ('v5e:4x4', 1, 16, 16),
        ('v5e:1x1', 1, 1, 1),
        ('v5p:2x2x2', 3, 24, 24),
        ('tpu7x:2x2x1', 1, 4, 8),
        ('v4:2x2x1', 1, 4, 4),
    ],
)
def test_tpu_slices(name, slices, chips, devices):
    topology = find_topology(name, slices)
    assert (topology.num_chips, topology.num_devices) == (chips, devices)
    assert topology.peak_flops_per_device * devices == pytest.approx(topology.chip.peak_flops * chips)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (MeshConfig(data=1, fsdp=8), 'leaves some of the 32 devices'),
        (MeshConfig(data=64), 'needs 64 devices but 32 are in h100:8x4'),
        (MeshConfig(data=-1, tensor=3), 'cannot use 32 devices'),
    ],
)
def test_mesh_that_does_not_suit_the_topology(config, message):
    with pytest.raises(UserError, match=message):
        find_topology('h100:8x4').sizes(config)


def test_links_of_nodes():
    """32 GPUs as fsdp 8 x tensor 4: tensor and a part of fsdp are within a node."""
    links = find_topology('h100:8x4').links(MeshConfig(data=1, fsdp=8, tensor=4))
    assert links.along(('tensor',), across_slices=False) == 450e9
    assert links.along(('fsdp',), across_slices=True) == 50e9
    assert links.across == {'fsdp': 4}
    assert links.network_ways(('fsdp', 'tensor')) == 4 and links.ways(('fsdp', 'tensor')) == 32


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ('name', 'mesh', 'axis', 'links'),
    [
        ('v5e:16x16', {'data': 1, 'fsdp': 256}, 'fsdp', 4),  # two rings, both ways round
        ('v5e:16x16', {'data': 1, 'fsdp': 16, 'tensor': 16}, 'tensor', 2),
        ('v5e:4x4', {'data': 1, 'fsdp': 16}, 'fsdp', 2),  # sides of 4 have ends
        ('v5p:4x4x4', {'data': 1, 'fsdp': 64}, 'fsdp', 6),
        ('v5p:4x4x4', {'data': 1, 'fsdp': 16, 'tensor': 4}, 'tensor', 2),
    ],
)
def test_links_of_a_torus(name, mesh, axis, links):
    topology = find_topology(name)
    found = topology.links(MeshConfig(**mesh))
    assert found.along((axis,), across_slices=False) == links * topology.chip.link_bandwidth
    assert found.along((), across_slices=False) == math.inf
    assert not found.across


@pytest.mark.tpu_compile
def test_axes_on_different_sides_send_at_once():
    links = find_topology('v5e:16x16').links(MeshConfig(data=1, fsdp=16, tensor=16))
    assert links.along(('fsdp', 'tensor'), across_slices=False) == 4 * 50e9


@pytest.mark.tpu_compile
def test_slices_are_joined_by_the_network():
    topology = find_topology('v5e:4x4', 2)
    links = topology.links(MeshConfig(data=2, dcn_data=2, fsdp=16))
    assert links.across == {'data': 2}
    assert links.along(('data',), across_slices=True) == 3.125e9
    with pytest.raises(UserError, match='goes over 1 slices, and there are 2'):
        topology.sizes(MeshConfig(data=1, fsdp=32))
    assert topology.links(MeshConfig(data=1, fsdp=32, dcn_fsdp=2)).across == {'fsdp': 2}


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ('name', 'joined'),
    [
        ('v5e:4x4', (False, False)),
        ('v6e:8x16', (False, True)),
        ('v5e:16x16', (True, True)),
        ('v5p:4x4x8', (True, True, True)),
        ('v5p:2x4x4', (False, False, False)),
        ('v4:4x4x4', (True, True, True)),
    ],
)
def test_ends_of_a_side_are_joined_as_google_publishes_it(name, joined):
    """cloud.google.com/tpu/docs: cubes of 4 for v4 and v5p, sides of 16 for v5e and v6e."""
    assert find_topology(name).wraps == joined
