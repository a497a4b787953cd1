"""Looking up in a table that is cut over eight devices, against one device: values and the gradient of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm.parallel.lookup import lookup
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules, use_rules

MESHES = {
    'data': MeshConfig(data=8),
    'fsdp': MeshConfig(data=1, fsdp=8),
    'rows': MeshConfig(data=1, tensor=8),
    'sequence': MeshConfig(data=1, sequence=8),
    'all': MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    'data, rows, sequence': MeshConfig(data=2, sequence=2, tensor=2),
}
WIDTH_OVER_TENSOR = AxisRules(parameters=(('embed', 'tensor'),))
ROWS_OVER_FSDP = AxisRules(parameters=(('embed', 'tensor'), ('vocab', 'fsdp')))


def run(table, ids, weight, mesh, rules):
    def loss(table):
        with use_rules(mesh, rules):
            found = lookup(table, ids, ('vocab', 'embed'), jnp.float32)
        return jnp.sum(found * weight), found

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(table)
    return found, gradient


@pytest.mark.parametrize('shape', [(8, 16), (1, 16), (8, 1)], ids=['tokens', 'shared by rows', 'one a row'])
@pytest.mark.parametrize(
    ('mesh', 'rules'),
    [(mesh, AxisRules()) for mesh in MESHES.values()]
    + [(MESHES['all'], WIDTH_OVER_TENSOR), (MESHES['all'], ROWS_OVER_FSDP)],
    ids=[*MESHES, 'width over an axis that tokens are not over', 'rows over an axis that tokens are over'],
)
def test_equals_one_device(mesh, rules, shape):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((16, 24)).astype(np.float32)
    # Each id several times, and ids outside of the table, which are clamped.
    ids = rng.integers(-2, 19, shape).astype(np.int32)
    weight = rng.standard_normal((*ids.shape, 24)).astype(np.float32)
    found, gradient = run(table, ids, weight, make_mesh(mesh), rules)
    inside = np.clip(ids, 0, 15)
    np.testing.assert_array_equal(found, table[inside])
    expected = np.zeros_like(table)
    np.add.at(expected, inside, weight)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5)


def test_neither_the_table_nor_all_results_are_gathered():
    mesh = make_mesh(MESHES['all'])
    table, ids = jax.ShapeDtypeStruct((4096, 64), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.int32)

    def value_and_gradient(table, ids):
        def loss(table):
            with use_rules(mesh, AxisRules()):
                return jnp.sum(lookup(table, ids, ('vocab', 'embed'), jnp.float32) ** 2)

        return jax.grad(loss)(table)

    specs = [
        jax.NamedSharding(mesh, AxisRules().partition(axes, mesh, parameters=parameters))
        for axes, parameters in ((('vocab', 'embed'), True), (('batch', 'sequence'), False))
    ]
    program = jax.jit(value_and_gradient, in_shardings=specs, out_shardings=specs[0]).lower(table, ids).compile()
    lines = [line for line in program.as_text().splitlines() if ' all-gather(' in line or ' all-gather-start(' in line]
    assert lines
    assert all('s32[' in line.split(' all-gather')[0] for line in lines)


@pytest.mark.parametrize(
    'config',
    [MeshConfig(data=1, pipeline=4), MeshConfig(data=1, pipeline=2, tensor=2, sequence=2)],
    ids=['one axis', 'three axes'],
)
def test_rows_over_a_manual_axis(config):
    table = jax.random.normal(jax.random.key(0), (16, 6))
    ids = jnp.asarray([[0, 3, 15, 7], [8, 3, -2, 40]])  # the last two are clamped

    def both(table, ids):
        with use_rules(jax.sharding.get_abstract_mesh(), AxisRules()):
            return jax.tree.map(lambda x: x[None], value_and_gradient(table, ids))

    def value_and_gradient(table, ids):
        x, vjp = jax.vjp(lambda table: lookup(table, ids, ('vocab', 'embed'), table.dtype), table)
        # The result is on all stages, and is used on one.
        used = jnp.where(jax.lax.axis_index('pipeline') == 1, 1.0, 0.0)
        return x, vjp(used * jnp.cos(x))[0]

    mesh = make_mesh(config, jax.devices()[: config.pipeline * config.tensor * config.sequence])
    stages = PartitionSpec('pipeline')
    mapped = jax.shard_map(
        both,
        mesh=mesh,
        in_specs=(stages, PartitionSpec()),
        out_specs=stages,
        axis_names={'pipeline'},
        check_vma=False,
    )
    found, gradient = jax.jit(mapped)(table, ids)
    expected, vjp = jax.vjp(lambda table: jnp.take(table, ids, axis=0, mode='clip'), table)
    for stage in range(config.pipeline):
        np.testing.assert_array_equal(found[stage], expected)
    np.testing.assert_allclose(gradient.reshape(16, 6), vjp(jnp.cos(expected))[0], rtol=1e-6)
