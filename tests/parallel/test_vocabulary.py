"""Lookup and loss with the vocabulary cut up over manual axes: the numbers and gradients of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules, use_rules
from llm.parallel.vocabulary import lookup_in_parts, token_negative_log_likelihood

V, D, B, S = 16, 6, 2, 4
MESHES = [MeshConfig(data=1, pipeline=4), MeshConfig(data=1, pipeline=2, tensor=2, sequence=2)]


def _manual(config, function, specs):
    """`function` of arrays cut up over `pipeline`; what each stage returns, stacked."""
    mesh = make_mesh(config, jax.devices()[: config.pipeline * config.tensor * config.sequence])

    def body(*arguments):
        with use_rules(jax.sharding.get_abstract_mesh(), AxisRules()):
            return jax.tree.map(lambda x: x[None], function(*arguments))

    out = PartitionSpec('pipeline')
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out, axis_names={'pipeline'}, check_vma=False)
    )


@pytest.mark.parametrize('config', MESHES, ids=['one axis', 'three axes'])
def test_lookup(config):
    table = jax.random.normal(jax.random.key(0), (V, D))
    ids = jnp.asarray([[0, 3, 15, 7], [8, 3, -2, 40]])  # the last two are clamped

    def both(table, ids):
        x, vjp = jax.vjp(lambda table: lookup_in_parts(table, ids, 'vocab', table.dtype), table)
        # The result is on all stages, and is used on one.
        used = jnp.where(jax.lax.axis_index('pipeline') == 1, 1.0, 0.0)
        return x, vjp(used * jnp.cos(x))[0]

    found, gradient = _manual(config, both, (PartitionSpec('pipeline'), PartitionSpec()))(table, ids)
    expected, vjp = jax.vjp(lambda table: jnp.take(table, ids, axis=0, mode='clip'), table)
    for stage in range(config.pipeline):
        np.testing.assert_array_equal(found[stage], expected)
    np.testing.assert_allclose(gradient.reshape(V, D), vjp(jnp.cos(expected))[0], rtol=1e-6)


@pytest.mark.parametrize('config', MESHES, ids=['one axis', 'three axes'])
def test_token_negative_log_likelihood(config):
    logits = 5 * jax.random.normal(jax.random.key(0), (B, S, V))
    targets = jnp.asarray([[0, 3, 15, 7], [8, 3, 4, 12]])

    def loss(nll, log_z):
        return jnp.sum(nll * jnp.arange(1.0, S + 1)) + 0.1 * jnp.sum(jnp.square(log_z))

    def both(logits, targets):
        found, vjp = jax.vjp(lambda logits: token_negative_log_likelihood(logits, targets, ('pipeline',)), logits)
        used = jnp.where(jax.lax.axis_index('pipeline') == 0, 1.0, 0.0)
        return found, vjp(jax.tree.map(lambda g: used * g, jax.grad(loss, (0, 1))(*found)))[0]

    specs = (PartitionSpec(None, None, 'pipeline'), PartitionSpec())
    (nll, log_z), gradient = _manual(config, both, specs)(logits, targets)

    def plain(logits):
        log_z = jax.nn.logsumexp(logits, -1)
        return log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], log_z

    for stage in range(config.pipeline):
        np.testing.assert_allclose(nll[stage], plain(logits)[0], rtol=1e-5)
        np.testing.assert_allclose(log_z[stage], plain(logits)[1], rtol=1e-5)
    expected = jax.grad(lambda logits: loss(*plain(logits)))(logits)
    np.testing.assert_allclose(jnp.concatenate(list(gradient), -1), expected, rtol=1e-4, atol=1e-6)
