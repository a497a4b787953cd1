"""Training steps of encoders and encoder-decoders compile for TPUs, sharded, with the kernels that they should use."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from llm.parallel.mesh import MeshConfig
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.models.small_encoders import bert, t5

pytestmark = [pytest.mark.tpu_compile, pytest.mark.slow]
ROWS, LENGTH = 8, 256
DECODER = ('inputs', 'targets', 'segment_ids', 'positions')
ENCODER = ('encoder_inputs', 'encoder_segment_ids', 'encoder_positions')


def program(config, names):
    """The compiled step on four v5e chips."""
    devices = list(topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices)
    trainer = Trainer(
        config,
        OptimizerConfig(kind='adamw'),
        StepConfig(ROWS, LENGTH),
        total_steps=10,
        mesh=MeshConfig(data=1, fsdp=2, tensor=2),
        devices=devices,
    )

    def array(dtype):
        return jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=trainer.batch_sharding)

    batch = dict.fromkeys(names, array(jnp.int32)) | {'loss_weights': array(jnp.float32)}
    text = trainer.train_step.lower(trainer.abstract_state, batch).compile().as_text()
    assert 'all-gather' in text and 'all-reduce' in text
    return text


def at_size(config):
    """With the types and sizes of accelerators, recomputing its layers."""
    config = dataclasses.replace(config.at_width(256), compute_dtype='bfloat16', vocab_size=512)
    stacks = [name for name in ('layers', 'encoder', 'decoder') if hasattr(config, name)]
    changed = {name: dataclasses.replace(getattr(config, name), remat='full') for name in stacks}
    return dataclasses.replace(config, **changed)


def test_an_encoder_runs_the_attention_kernel():
    config = at_size(bert(max_positions=LENGTH, token_types=0))
    assert program(config, DECODER).count('tpu_custom_call') >= 3


def test_an_encoder_decoder_with_relative_positions():
    # Cross-attention has no bias, and is the kernel's; self-attention holds its scores.
    assert program(at_size(t5()), DECODER + ENCODER).count('tpu_custom_call') >= 3
