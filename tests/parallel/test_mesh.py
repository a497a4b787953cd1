import jax
import pytest

from llm.errors import UserError
from llm.parallel.mesh import MESH_AXES, MeshConfig, make_mesh


def test_free_axis_takes_the_remaining_devices():
    mesh = make_mesh(MeshConfig(data=-1, tensor=2))
    assert dict(mesh.shape) == {'pipeline': 1, 'data': 4, 'fsdp': 1, 'expert': 1, 'sequence': 1, 'tensor': 2}
    assert mesh.axis_names == MESH_AXES
    assert all(kind is jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_one_device_is_a_mesh_of_ones():
    assert set(make_mesh(MeshConfig(), jax.devices()[:1]).shape.values()) == {1}


def test_a_fixed_mesh_may_leave_devices_unused():
    assert make_mesh(MeshConfig(data=1, fsdp=3)).devices.size == 3


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (MeshConfig(data=1, tensor=16), 'needs 16 devices but 8 exist'),
        (MeshConfig(data=-1, tensor=3), 'cannot use 8 devices evenly'),
        (MeshConfig(data=-1, fsdp=-1), 'is not valid'),
        (MeshConfig(data=0), 'is not valid'),
    ],
)
def test_impossible_meshes_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)
