import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from llm.errors import UserError
from llm.parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules, constrain, map_shards, parameter_sharding, use_rules

RULES = AxisRules()


def test_parameter_axes_follow_the_table():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    sharding = parameter_sharding(('layers', 'embed', 'mlp'), (3, 8, 6), mesh, RULES, 'w')
    assert sharding.spec == PartitionSpec(None, 'fsdp', 'tensor')


def test_a_mesh_axis_is_used_once_in_an_array():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    assert RULES.partition(('heads', 'mlp'), mesh, parameters=True) == PartitionSpec('tensor', None)


def test_axes_of_size_one_are_left_out():
    mesh = make_mesh(MeshConfig(data=-1))
    assert RULES.partition(('batch', 'sequence', 'embed'), mesh, parameters=False) == PartitionSpec('data', None, None)
    assert RULES.partition(('embed', 'mlp'), mesh, parameters=True) == PartitionSpec(None, None)


def test_the_batch_is_split_over_all_its_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    assert RULES.partition(('batch',), mesh, parameters=False) == PartitionSpec(('data', 'fsdp'))


def test_a_dimension_that_the_mesh_cannot_divide_is_named():
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    with pytest.raises(UserError, match=r"parameter attention/query: 'heads' of size 3 .* 'tensor' of size 2"):
        parameter_sharding(('embed', 'heads', 'head_dim'), (8, 3, 4), mesh, RULES, 'attention/query')


def test_constrain_places_activations_and_is_nothing_outside_of_rules():
    mesh = make_mesh(MeshConfig(data=8))
    x = jnp.ones((8, 4))
    assert constrain(x, ('batch', 'embed')) is x
    with use_rules(mesh, RULES):
        y = jax.jit(lambda x: constrain(x, ('batch', 'embed')))(x)
    assert y.sharding.spec == PartitionSpec('data', None) or y.sharding.spec == PartitionSpec('data')
    with pytest.raises(ValueError, match='was given axes'):
        constrain(x, ('batch',))


def test_map_shards_gives_each_device_its_part():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x, scale = jnp.arange(24.0).reshape(4, 6), jnp.asarray([1.0, 2, 3, 4, 5, 6])
    seen = []

    def function(x, scale):
        seen.append((x.shape, scale.shape))
        return x * scale

    axes = {'x': ('batch', 'heads'), 'scale': ('heads',)}
    with use_rules(mesh, RULES):
        y = jax.jit(lambda x, scale: map_shards(function, {'x': x, 'scale': scale}, axes, axes['x']))(x, scale)
    assert seen == [((1, 3), (3,))]
    assert y.sharding.spec == PartitionSpec(('data', 'fsdp'), 'tensor')
    assert jnp.array_equal(y, x * scale)
    assert jnp.array_equal(map_shards(function, {'x': x, 'scale': scale}, axes, axes['x']), x * scale)
    assert seen[1:] == [((4, 6), (6,))]


@pytest.mark.parametrize(
    ('axes', 'shape', 'expected'),
    [
        (('layers', 'embed', 'mlp'), (4, 8, 12), ('pipeline', 'fsdp', None)),
        # Six layers over four stages; a layer beside the stack; nothing that four divides; no layer at all.
        (('layers', 'embed', 'mlp'), (6, 8, 12), (None, 'fsdp', 'pipeline')),
        (('remainder', 'embed', 'mlp'), (4, 32, 12), (None, ('pipeline', 'fsdp'), None)),
        (('layers', 'head_dim'), (6, 7), (None, None)),
        (('embed', 'vocab'), (8, 12), ('fsdp', 'pipeline')),
    ],
)
def test_layers_that_stages_cannot_share_are_cut_up_along_another_dimension(axes, shape, expected):
    mesh = AbstractMesh((4, 1, 2, 1, 1, 1), MESH_AXES)
    spec = AxisRules().place(axes, shape, mesh)
    assert spec == PartitionSpec(*expected)
