"""The decoder on simulated meshes: the numbers of one device, dropout included, and activations where the rules say."""

import jax
import numpy as np
import pytest
from flax import nnx

from llm.models.decoder import Decoder
from llm.models.parameters import parameter_specs
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules, parameter_sharding, use_rules
from tests.models.small_decoders import compiled, decoder_config, layer, parameters, tokens


@pytest.mark.parametrize(
    'mesh_config',
    [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)],
)
def test_every_mesh_gives_the_logits_of_one_device(mesh_config):
    config = decoder_config(
        layer({'window': 5}, dropout=0.3),
        layer(dropout=0.3),
        num_layers=3,
        vocab_size=32,
        embedding_dropout=0.3,
        compute_dtype='float64',
    )
    with jax.enable_x64(True):
        params, inputs = parameters(config), tokens(8, 8)
        graph, _ = nnx.split(Decoder(config))
        rules = AxisRules()

        def logits_on(mesh):
            def forward(params, inputs):
                with use_rules(mesh, rules):
                    return nnx.merge(graph, params)(inputs, dropout_key=jax.random.key(0))

            specs = parameter_specs(Decoder(config))
            shardings = jax.tree.map(lambda spec: parameter_sharding(spec.axes, spec.shape, mesh, rules, ''), specs)
            return compiled(forward)(jax.device_put(params, shardings), inputs)

        expected = logits_on(make_mesh(MeshConfig(data=1), jax.devices()[:1]))
        logits = logits_on(make_mesh(mesh_config))
        np.testing.assert_allclose(logits, expected, rtol=1e-9, atol=1e-9)
        batch = mesh_config.data * mesh_config.fsdp
        shard = logits.addressable_shards[0].data.shape
        assert shard == (8 // batch, 8 // mesh_config.sequence, 32 // mesh_config.tensor)
