"""Blocks of layers travel to the stages that run them, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.pipeline.layout import from_chunks, to_chunks


@pytest.mark.parametrize(('stages', 'chunks'), [(2, 2), (2, 3), (3, 2), (4, 2), (4, 3), (4, 4), (8, 2)])
def test_stage_s_gets_every_stages_th_block(stages, chunks):
    mesh = make_mesh(MeshConfig(data=1, pipeline=stages), jax.devices()[:stages])
    size = 2  # repeats in a block
    stored = jnp.arange(stages * chunks * size, dtype=jnp.float32)[:, None] + jnp.zeros((1, 3))

    def mapped(function):
        spec = PartitionSpec('pipeline')
        return jax.jit(
            jax.shard_map(lambda x: function(x, stages, chunks, 'pipeline'), mesh=mesh, in_specs=spec, out_specs=spec)
        )

    run = mapped(to_chunks)(stored)
    blocks = np.asarray(run)[:, 0].reshape(stages, chunks, size)
    for stage in range(stages):
        for chunk in range(chunks):
            first = (chunk * stages + stage) * size
            assert blocks[stage, chunk].tolist() == list(range(first, first + size))
    np.testing.assert_array_equal(mapped(from_chunks)(run), stored)
