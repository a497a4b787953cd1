"""Training steps of decoders with experts and with recurrences compile for TPUs, and exchange what they should."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.moe import MoeConfig
from llm.parallel.mesh import MeshConfig
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer

pytestmark = [pytest.mark.tpu_compile, pytest.mark.slow]
ROWS, LENGTH, WIDTH = 8, 384, 256


def program(layers, mesh):
    """The compiled step on four v5e chips."""
    config = DecoderConfig(512, WIDTH, len(layers), layers, compute_dtype='bfloat16', remat='full')
    trainer = Trainer(
        config,
        OptimizerConfig(kind='adamw'),
        StepConfig(ROWS, LENGTH),
        total_steps=10,
        mesh=mesh,
        devices=list(topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices),
    )

    def array(dtype):
        return jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=trainer.batch_sharding)

    names = ('inputs', 'targets', 'segment_ids', 'positions')
    batch = dict.fromkeys(names, array(jnp.int32)) | {'loss_weights': array(jnp.float32)}
    return trainer.train_step.lower(trainer.abstract_state, batch).compile().as_text()


def test_experts_exchange_tokens_and_no_device_gathers_them():
    experts = MoeConfig(num_experts=4, experts_per_token=2, expert=FeedForwardConfig(384))
    text = program((LayerConfig(AttentionConfig(4, 4, 64), experts),), MeshConfig(data=1, fsdp=2, expert=2))
    assert 'all-to-all' in text
    gathered = [
        math.prod(map(int, shape.split(',')))
        for line in text.splitlines()
        if re.search(r' all-gather(-start)?\(', line)
        for shape in re.findall(r'\w+\[([\d,]+)\]', line.split(' all-gather')[0])
    ]
    assert gathered and max(gathered) < ROWS * LENGTH * WIDTH // 2
    # Of attention three; of experts three forward, three again and six backward.
    assert text.count('tpu_custom_call') >= 15
    assert 'ragged-dot' not in text


def test_mamba_runs_its_kernels_on_every_mesh_axis_it_has():
    mixers = (MambaConfig(512, 16), Mamba2Config(8, 64, 128))
    text = program(tuple(LayerConfig(each, None) for each in mixers), MeshConfig(data=1, fsdp=2, tensor=2))
    assert 'all-gather' in text and ('all-reduce' in text or 'reduce-scatter' in text)
    for name in ('selective_scan_forward', 'selective_scan_backward', 'ssd_forward', 'ssd_backward'):
        assert name in text
