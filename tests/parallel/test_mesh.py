from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import topologies

from llm.configuration import load_job
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


def test_slices_hold_what_must_be_near_and_the_factor_of_an_axis_goes_across():
    mesh = make_mesh(MeshConfig(data=4, dcn_data=2, fsdp=2))
    devices = mesh.devices.reshape(4, 2)
    first, second = set(jax.devices()[:4]), set(jax.devices()[4:])
    assert set(devices[:2].flat) == first
    assert set(devices[2:].flat) == second


def test_two_axes_go_across_slices():
    mesh = make_mesh(MeshConfig(pipeline=2, dcn_pipeline=2, data=2, dcn_data=2, tensor=2))
    index = np.vectorize(lambda device: device.id)(mesh.devices).reshape(2, 2, 2)
    np.testing.assert_array_equal(index, np.arange(8).reshape(2, 2, 2))


@pytest.mark.tpu_compile
def test_real_slices_are_told_apart():
    devices = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2', num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=2, dcn_data=2, fsdp=2, tensor=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices).reshape(2, 4)
    np.testing.assert_array_equal(slices, [[0] * 4, [1] * 4])
    with pytest.raises(UserError, match='goes over 4 slices, but the devices are 2 of 4, 4 devices'):
        make_mesh(MeshConfig(data=4, dcn_data=4, fsdp=2), devices)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (MeshConfig(data=8, dcn_data=3), 'axis data of size 8 cannot go over 3 slices'),
        (MeshConfig(data=1, tensor=16), 'needs 16 devices but 8 exist'),
        (MeshConfig(data=-1, tensor=3), 'cannot use 8 devices evenly'),
        (MeshConfig(data=-1, fsdp=-1), 'is not valid'),
        (MeshConfig(data=0), 'is not valid'),
    ],
)
def test_impossible_meshes_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_mesh(config)


@pytest.mark.parametrize(
    ('piece', 'sizes'),
    [
        ('data_parallel', {'data': 8}),
        ('fsdp', {'fsdp': 8}),
        ('sequence', {'sequence': 2, 'fsdp': 4}),
        ('multi_slice', {'data': 2, 'fsdp': 4}),
        ('pipeline', {'pipeline': 4, 'fsdp': 2}),
    ],
)
def test_the_pieces_for_gin_make_these_meshes(piece, sizes, tmp_path):
    job = tmp_path / 'job.gin'
    job.write_text(
        'from __gin__ import dynamic_registration\nfrom tests.parallel import mesh_job\nfrom llm.parallel import mesh\n'
        'JOB = @mesh_job.Hold()\nmesh_job.Hold.mesh = @mesh.MeshConfig()\n' + USED.get(piece, '')
    )
    folder = Path(__file__).parents[2] / 'gin_configs' / 'meshes'
    config = load_job([str(folder / f'{piece}.gin'), str(job)])[0].mesh
    assert {axis: size for axis, size in make_mesh(config).shape.items() if size > 1} == sizes


# What a piece configures besides the mesh must be used by the job.
USED = {
    'sequence': 'from llm.parallel import sharding\nmesh_job.Hold.more = @sharding.AxisRules()\n',
    'pipeline': 'from llm.parallel.pipeline import schedules\nmesh_job.Hold.more = @schedules.PipelineConfig()\n',
}
