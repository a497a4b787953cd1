"""What the TPU compiler makes of a pipeline: how its temporaries grow with microbatches, and that buffers stay put."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.scaling.program import read_program
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.scaling.abstract_meshes import mesh_of

LENGTH, STAGES = 512, 4
LAYER = LayerConfig(
    mixer=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=128, implementation='reference'),
    feed_forward=FeedForwardConfig(d_ff=1024),
)
MODEL = DecoderConfig(vocab_size=2048, d_model=512, num_layers=8, pattern=(LAYER,), compute_dtype='bfloat16')

pytestmark = [pytest.mark.tpu_compile, pytest.mark.slow]


@functools.cache
def _compiled(
    schedule: str, microbatches: int, remat: str = 'full', stages: int = STAGES, attention: str = 'reference'
) -> jax.stages.Compiled:
    """A training step of 4 rows a microbatch on four v5e chips; those that share a stage share its parameters."""
    topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')
    layer = dataclasses.replace(LAYER, mixer=dataclasses.replace(LAYER.mixer, implementation=attention))
    trainer = Trainer(
        dataclasses.replace(MODEL, remat=remat, pattern=(layer,)),
        OptimizerConfig(kind='adamw'),
        StepConfig(4 * microbatches, LENGTH, microbatches),
        total_steps=10,
        mesh=MeshConfig(data=1, fsdp=4 // stages, pipeline=stages),
        devices=list(topology.devices),
        pipeline=PipelineConfig(schedule),
    )

    def array(dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((4 * microbatches, LENGTH), dtype, sharding=trainer.batch_sharding)

    batch = {name: array(jnp.int32) for name in ('inputs', 'targets', 'segment_ids', 'positions')}
    return trainer.train_step.lower(trainer.abstract_state, {**batch, 'loss_weights': array(jnp.float32)}).compile()


def _temporaries(schedule: str, microbatches: int, remat: str = 'full') -> int:
    # Not the peak, which counts VMEM too: much of so small a program.
    return _compiled(schedule, microbatches, remat).memory_analysis().temp_size_in_bytes


# One microbatch's activations on one stage: the inputs of its two layers.
ACTIVATIONS = 2 * 4 * LENGTH * 512 * 2


def test_temporaries_of_1f1b_do_not_grow_with_microbatches():
    sizes = [_temporaries('1f1b', microbatches) for microbatches in (8, 16, 32)]
    print(f'temporaries of 1F1B with 8, 16 and 32 microbatches: {sizes}')
    # The table of the schedule grows, by a few numbers a tick.
    assert max(sizes) - min(sizes) < ACTIVATIONS / 20


def test_without_remat_more_is_kept_and_it_does_not_grow_either():
    sizes = [_temporaries('1f1b', microbatches, 'none') for microbatches in (16, 32)]
    print(f'temporaries of 1F1B without remat, with 16 and 32 microbatches: {sizes}')
    assert max(sizes) - min(sizes) < ACTIVATIONS / 20
    # For four microbatches, of each of two layers: attention probabilities, and twice what is inside of the gate.
    probabilities, hidden = 4 * 4 * LENGTH * LENGTH, 4 * LENGTH * 1024
    assert sizes[0] - _temporaries('1f1b', 16) > 4 * 2 * 2 * (probabilities + 2 * hidden)


def test_gpipe_keeps_every_microbatch():
    more = _temporaries('gpipe', 16) - _temporaries('1f1b', 16)
    assert more > 11 * ACTIVATIONS  # 16 microbatches instead of 4


@pytest.mark.parametrize(('remat', 'widths'), [('full', [512]), ('none', [512, 1024])])
def test_activations_are_not_copied_from_tick_to_tick(remat, widths):
    """The buffers that are carried around are updated in place: they are in the program, and no copy of them."""
    program = _compiled('1f1b', 16, remat).as_text()
    for width in widths:
        buffer = rf'bf16\[4,2,4,{LENGTH},{width}\]'
        assert re.search(buffer, program)
        assert not re.search(rf'= {buffer}\S* copy\(', program)


def test_stages_whose_chips_share_parameters_compile_with_the_attention_kernel():
    program = _compiled('1f1b', 4, stages=2, attention='auto').as_text()
    assert 'flash_attention_backward' in program
    found = {(each.kind, each.axes) for each in read_program(program, mesh_of(fsdp=2, pipeline=2)).collectives}
    assert {('all-gather', ('fsdp',)), ('collective-permute', ('pipeline',))} <= found
