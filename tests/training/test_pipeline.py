"""Pipelines against accumulation on one device: float64 loss and gradients within 1e-9, and stages really talk."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.compiling import QUICKLY
from tests.training.parity_cases import BATCH, GRADIENT, LENGTH, batch

LAYER = LayerConfig(
    mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), feed_forward=FeedForwardConfig(d_ff=48)
)
WINDOWED = dataclasses.replace(LAYER, mixer=dataclasses.replace(LAYER.mixer, window=5), dropout=0.2)
# With remat 'none' stages keep all that the backward pass reads, with the others what the policy says.
MODELS = {
    'dense': DecoderConfig(vocab_size=64, d_model=32, num_layers=8, pattern=(LAYER,), compute_dtype='float64'),
    # Two layers a repeat, one of them windowed; dropout; everything that is tied or added at the ends.
    'windowed': DecoderConfig(
        vocab_size=64,
        d_model=32,
        num_layers=8,
        pattern=(dataclasses.replace(LAYER, dropout=0.1), WINDOWED),
        position='learned',
        max_positions=16,
        tied_embeddings=True,
        embedding_dropout=0.1,
        final_logit_soft_cap=5.0,
        compute_dtype='float64',
        remat='full',
    ),
}
# 5 repeats of two layers, which no number of stages divides, and one more layer.
MODELS['uneven'] = dataclasses.replace(
    MODELS['windowed'], num_layers=11, remat='names', remat_names=('attention', 'feed_forward_hidden')
)


def _to_float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def _trainer(model, microbatches, mesh, pipeline=PipelineConfig()):
    sizes = [size for size in dataclasses.asdict(mesh).values() if size != -1]
    with jax.enable_x64():
        return Trainer(
            MODELS[model],
            GRADIENT,
            StepConfig(BATCH, LENGTH, microbatches, z_loss=1e-3),
            total_steps=10,
            mesh=mesh,
            devices=jax.devices()[: int(np.prod(sizes))],
            pipeline=pipeline,
        )


@functools.cache
def _initial_state(model):
    return jax.device_get(_to_float64(_trainer(model, 1, MeshConfig(data=1)).fresh_state()))


def _run(trainer, model, packed):
    """(loss, gradients, HLO text) of one step in float64."""
    with jax.enable_x64():
        state = jax.device_put(_initial_state(model), trainer.state_shardings)
        rows = jax.device_put(batch(packed), trainer.batch_sharding)
        compiled = trainer.train_step.lower(state, rows).compile(QUICKLY)
        state, metrics = compiled(state, rows)
        before, after = _initial_state(model)['parameters'], jax.device_get(state['parameters'])
        return float(metrics['loss']), jax.tree.map(lambda old, new: old - new, before, after), compiled.as_text()


@functools.cache
def _one_device(model, microbatches, packed):
    return _run(_trainer(model, microbatches, MeshConfig(data=1)), model, packed)[:2]


def permutations(program: str) -> list[list[tuple[int, int]]]:
    """(source, target) devices of every collective-permute."""
    found = re.findall(r'collective-permute(?:-start)?\(.*?source_target_pairs=\{(\{.*?\})\}', program)
    return [[(int(a), int(b)) for a, b in re.findall(r'\{(\d+),(\d+)\}', pairs)] for pairs in found]


ONE_F_ONE_B, GPIPE, ZERO = PipelineConfig('1f1b'), PipelineConfig('gpipe'), PipelineConfig('zero_bubble')
INTERLEAVED = PipelineConfig('interleaved', chunks=2)
# Every value of every column meets every value of the schedule and of the mesh, or nearly so.
CASES = [
    # schedule, model, microbatches, packed, mesh
    (GPIPE, 'dense', 4, False, MeshConfig(data=1, pipeline=2)),
    (GPIPE, 'windowed', 8, True, MeshConfig(data=1, fsdp=2, pipeline=4)),
    (GPIPE, 'windowed', 4, False, MeshConfig(data=2, tensor=2, pipeline=2)),
    (ONE_F_ONE_B, 'windowed', 8, False, MeshConfig(data=2, pipeline=4)),
    (ONE_F_ONE_B, 'dense', 4, True, MeshConfig(data=1, fsdp=2, tensor=2, pipeline=2)),
    (ONE_F_ONE_B, 'dense', 8, True, MeshConfig(data=1, tensor=2, pipeline=4)),
    (INTERLEAVED, 'dense', 8, True, MeshConfig(data=2, pipeline=4)),
    (INTERLEAVED, 'windowed', 4, True, MeshConfig(data=1, tensor=2, pipeline=2)),
    (INTERLEAVED, 'windowed', 8, False, MeshConfig(data=1, fsdp=2, tensor=2, pipeline=2)),
    (ZERO, 'dense', 8, False, MeshConfig(data=1, fsdp=2, pipeline=4)),
    (ZERO, 'windowed', 4, True, MeshConfig(data=2, fsdp=2, pipeline=2)),
    (ZERO, 'windowed', 8, True, MeshConfig(data=1, tensor=2, pipeline=4)),
    (ZERO, 'dense', 4, True, MeshConfig(data=1, sequence=2, tensor=2, pipeline=2)),
    # Rows that the stages share, 4 or 2 of them, and that they cannot share, 1 or 2 for 4 stages.
    (GPIPE, 'uneven', 4, True, MeshConfig(data=2, pipeline=4)),
    (ONE_F_ONE_B, 'uneven', 4, True, MeshConfig(data=1, fsdp=2, tensor=2, pipeline=2)),
    (ONE_F_ONE_B, 'uneven', 8, False, MeshConfig(data=1, fsdp=2, pipeline=4)),
    (INTERLEAVED, 'uneven', 4, False, MeshConfig(data=2, fsdp=2, pipeline=2)),
    (INTERLEAVED, 'uneven', 4, True, MeshConfig(data=1, sequence=2, tensor=2, pipeline=2)),
    (ZERO, 'uneven', 4, True, MeshConfig(data=1, tensor=2, pipeline=4)),
]


def _name(case):
    schedule, model, microbatches, packed, mesh = case
    axes = '.'.join(f'{axis}{size}' for axis, size in dataclasses.asdict(mesh).items() if size > 1)
    return f'{schedule.schedule}-{model}-{microbatches}-{"packed" if packed else "whole"}-{axes}'


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=_name)
def test_pipelines_agree_with_one_device(case):
    schedule, model, microbatches, packed, mesh = case
    loss, gradients = _one_device(model, microbatches, packed)
    parallel_loss, parallel_gradients, program = _run(_trainer(model, microbatches, mesh, schedule), model, packed)
    assert parallel_loss == pytest.approx(loss, rel=1e-7)  # the metric is stored in fp32
    for path, expected in jax.tree_util.tree_leaves_with_path(gradients):
        actual = functools.reduce(lambda tree, key: tree[key.key], path, parallel_gradients)
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=1e-9 * np.abs(expected).max(), err_msg=jax.tree_util.keystr(path)
        )
    stage_size = int(np.prod(list(dataclasses.asdict(mesh).values()))) // mesh.pipeline
    found = permutations(program)
    assert any(a // stage_size != b // stage_size for pairs in found for a, b in pairs), 'no stage sends'
    # One stage may do what another does not: a collective-permute within stages would wait for all of them.
    within = [(a, b) for pairs in found for a, b in pairs if a != b and a // stage_size == b // stage_size]
    assert within == []


@pytest.mark.parametrize('model', ['windowed', 'uneven'])
@pytest.mark.parametrize('schedule', [ONE_F_ONE_B, INTERLEAVED], ids=lambda config: config.schedule)
def test_evaluation_agrees_with_one_device(schedule, model):
    with jax.enable_x64():
        sums = []
        for mesh, pipeline in ((MeshConfig(data=1), PipelineConfig()), (MeshConfig(data=2, pipeline=2), schedule)):
            trainer = _trainer(model, 4, mesh, pipeline)
            state = jax.device_put(_initial_state(model), trainer.state_shardings)
            rows = jax.device_put(batch(True), trainer.batch_sharding)
            sums.append(jax.device_get(trainer.evaluation_step(state['parameters'], rows)))
        assert sums[0]['tokens'] == sums[1]['tokens']
        assert sums[1]['nll'] == pytest.approx(sums[0]['nll'], rel=1e-12)


@pytest.mark.parametrize('model', ['windowed', 'uneven'])
def test_nothing_is_replicated_over_stages_but_norms(model):
    trainer = _trainer(model, 4, MeshConfig(data=1, pipeline=4), ONE_F_ONE_B)
    whole = [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(trainer.abstract_state['parameters'])
        if 'pipeline' not in str(x.sharding.spec)
    ]
    assert whole == ["['final_norm']['scale']"]


def test_schedules_store_the_same():
    """A checkpoint of any schedule restores under any other, and without a pipeline: same shapes, same meaning."""
    trees = [
        jax.tree.map(lambda x: (x.shape, x.dtype), _trainer('dense', 4, mesh, schedule).abstract_state)
        for mesh, schedule in (
            (MeshConfig(data=1), PipelineConfig()),
            (MeshConfig(data=1, pipeline=2), INTERLEAVED),
            (MeshConfig(data=1, pipeline=4), ZERO),
        )
    ]
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.parametrize(
    ('changes', 'microbatches', 'stages', 'schedule', 'message'),
    [
        ({'num_layers': 3}, 4, 4, ONE_F_ONE_B, '3 repeats of the layer pattern are fewer than the 4 blocks'),
        ({'num_layers': 3}, 4, 2, INTERLEAVED, '3 repeats .* 4 blocks of 2 pipeline stages of 2 chunks'),
        ({'pattern': (LAYER, WINDOWED), 'num_layers': 3}, 4, 2, ONE_F_ONE_B, '1 repeats .* fewer than the 2 blocks'),
        ({}, 1, 2, GPIPE, '1 microbatches are fewer than 2 pipeline stages'),
        ({'remat': 'offload', 'remat_names': ('query',)}, 4, 2, GPIPE, 'in its stages'),
        ({'vocab_size': 63}, 4, 2, GPIPE, "'vocab' of size 63 cannot be divided over mesh axis 'pipeline'"),
    ],
)
def test_what_does_not_fit_is_named(changes, microbatches, stages, schedule, message):
    with jax.enable_x64(), pytest.raises(UserError, match=message):
        Trainer(
            dataclasses.replace(MODELS['dense'], **changes),
            GRADIENT,
            StepConfig(BATCH, LENGTH, microbatches),
            10,
            MeshConfig(data=1, pipeline=stages),
            devices=jax.devices()[:stages],
            pipeline=schedule,
        )
