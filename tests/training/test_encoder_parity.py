"""Encoders, encoder-decoders and prefix language models: the same on every mesh, in float64, scanned or recomputed.

As in test_parity.py: loss and gradients within 1e-9 of one device's, and the collectives are in the program. In
pipelines too, as in test_pipeline.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.models.decoder import DecoderConfig
from llm.models.long_attention import LongAttentionConfig
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.compiling import QUICKLY
from tests.models.small_encoders import H, K, V, bert, hybrid_t5, t5
from tests.training.parity_cases import GRADIENT, LAYER, MOE, SMALL
from tests.training.test_pipeline import permutations

ROWS, S, T = 8, 8, 16


def wider(config):
    """With float64, dropout, and shapes that eight devices can share."""
    layers = {}
    for name in ('layers', 'encoder', 'decoder'):
        stack = getattr(config, name, None)
        if stack is not None:
            pattern = tuple(dataclasses.replace(layer, dropout=0.1) for layer in stack.pattern)
            layers[name] = dataclasses.replace(stack, pattern=pattern)
    return dataclasses.replace(config, vocab_size=64, compute_dtype='float64', **layers)


def recomputed(config, **stack):
    """With other settings of how its layers run."""
    names = [name for name in ('layers', 'encoder', 'decoder') if hasattr(config, name)]
    return dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **stack) for name in names})


LONG = LongAttentionConfig(
    H, H, K, window=3, causal=False, qkv_bias=True, output_bias=True, dilations=(1, 2), global_tokens=3
)


def routed(config):
    """With experts in the place of every feed-forward layer."""
    stacks = {}
    for name in ('layers', 'encoder', 'decoder'):
        if (stack := getattr(config, name, None)) is not None:
            pattern = tuple(dataclasses.replace(layer, feed_forward=MOE) for layer in stack.pattern)
            stacks[name] = dataclasses.replace(stack, num_layers=1, pattern=pattern)
    return dataclasses.replace(config, vocab_size=64, compute_dtype='float64', **stacks)


ALBERT = wider(bert(2, embedding_size=16))
T5 = wider(t5(gated=False))
MODELS = {
    'bert': wider(bert(token_types=0)),
    'albert': recomputed(ALBERT, shared_layers=True),
    # One more layer than stages can share.
    'albert of five': recomputed(ALBERT, shared_layers=True, num_layers=5),
    't5 of three': dataclasses.replace(T5, decoder=dataclasses.replace(T5.decoder, num_layers=3, remat='full')),
    'longformer': wider(bert(token_types=0, mixer=LONG)),
    't5': T5,
    't5 v1.1': wider(t5()),
    't5 hybrid': wider(hybrid_t5()),
    'bert with experts': routed(bert(token_types=0)),
    't5 with experts': routed(t5()),
    'prefix': dataclasses.replace(SMALL, pattern=(dataclasses.replace(LAYER, dropout=0.1),), num_layers=2),
}


def batch(kind):
    rng = np.random.default_rng(0)

    def side(length):
        ids = np.sort(rng.integers(1, 3, (ROWS, length)), axis=1).astype(np.int32)
        ids[1, length // 2 :] = ids[5, length - 2 :] = 0
        starts = np.concatenate([np.ones((ROWS, 1), bool), np.diff(ids, axis=1) != 0], axis=1)
        index = np.arange(length)
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
        return rng.integers(1, V, (ROWS, length)).astype(np.int32), ids, positions.astype(np.int32)

    length = S if kind == 't5' else T
    inputs, ids, positions = side(length)
    weights = ((ids > 0) & (rng.random(ids.shape) < 0.6)).astype(np.float32)
    arrays = {'inputs': inputs, 'targets': rng.integers(1, V, ids.shape).astype(np.int32), 'loss_weights': weights}
    arrays |= {'segment_ids': ids, 'positions': positions}
    if kind == 't5':
        names = ('encoder_inputs', 'encoder_segment_ids', 'encoder_positions')
        arrays |= dict(zip(names, side(T), strict=True))
    if kind == 'bert':  # with logits of so many tokens alone, a mask's weight on some of them
        index = np.sort(np.argsort(rng.random(ids.shape), axis=1)[:, : T // 2], axis=1).astype(np.int32)
        picked = {name: np.take_along_axis(arrays[name], index, 1) for name in ('targets', 'loss_weights')}
        arrays |= {'predicted': index, **picked}
    if kind == 'prefix':
        arrays['prefix'] = (positions < 3).astype(np.int32)
    if kind == 'longformer':
        arrays['global_tokens'] = (positions == 0).astype(np.int32)
    return arrays


@functools.cache
def initial(name):
    one = Trainer(MODELS[name], GRADIENT, StepConfig(ROWS, T), 10, MeshConfig(data=1), devices=jax.devices()[:1])
    # Away from the start, where some gradients are all but zero.
    rng = np.random.default_rng(1)
    state = jax.device_get(one.fresh_state())
    parameters = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), state['parameters'])
    return state | {'parameters': parameters}


@functools.cache
def run(name, mesh, stack=(), microbatches=1, pipeline=PipelineConfig()):
    """(loss, gradients, HLO text) of one step in float64, and the sums of evaluation where there are microbatches."""
    return step_of(name, mesh, batch(name.split()[0]), stack, microbatches, pipeline)


def step_of(name, mesh, rows, stack=(), microbatches=1, pipeline=PipelineConfig()):
    with jax.enable_x64():
        config = recomputed(MODELS[name], **dict(stack)) if stack else MODELS[name]
        trainer = Trainer(
            config,
            GRADIENT,
            StepConfig(ROWS, T, microbatches, z_loss=1e-3),
            10,
            mesh,
            devices=jax.devices()[: int(np.prod(mesh.sizes(8)))],
            pipeline=pipeline,
        )
        state = jax.device_put(initial(name), trainer.state_shardings)
        rows = jax.device_put(rows, trainer.batch_sharding)
        sums = {}
        if microbatches > 1:
            evaluate = trainer.evaluation_step.lower(state['parameters'], rows).compile(QUICKLY)
            sums = evaluate(state['parameters'], rows)
        compiled = trainer.train_step.lower(state, rows).compile(QUICKLY)
        if mesh.pipeline > 1:  # else stages would wait for each other for ever
            size = int(np.prod(mesh.sizes(8))) // mesh.pipeline
            sent = [pair for pairs in permutations(compiled.as_text()) for pair in pairs if pair[0] != pair[1]]
            assert sent
            assert all(a // size != b // size for a, b in sent)
        new, metrics = compiled(state, rows)
        pairs = initial(name)['parameters'], jax.device_get(new['parameters'])
        return float(metrics['loss']), jax.tree.map(jnp.subtract, *pairs), compiled.as_text(), jax.device_get(sums)


def agrees(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-7)  # the metric is stored in fp32
    for (path, exact), actual in zip(jax.tree.leaves_with_path(expected[1]), jax.tree.leaves(found[1]), strict=True):
        # A key's bias shifts all scores of a query alike: nothing but rounding.
        size = 1e-3 if 'key_bias' in jax.tree_util.keystr(path) else np.abs(exact).max()
        assert size > 0, path
        np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-9 * size, err_msg=jax.tree_util.keystr(path))
    for name, exact in expected[3].items():
        assert found[3][name] == pytest.approx(exact, rel=1e-12)


MESHES = {
    'data x fsdp x tensor': MeshConfig(data=2, fsdp=2, tensor=2),
    'expert x tensor': MeshConfig(data=1, expert=2, tensor=2),
    'fsdp x sequence x tensor': MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
}
COLLECTIVES = {
    'expert': 'all-to-all',
    'data': 'all-reduce',
    'fsdp': 'all-gather',
    'tensor': 'all-reduce',
    'sequence': 'all-gather',
}


# Each model on a mesh, and both meshes with both kinds of models.
@pytest.mark.parametrize(
    ('name', 'mesh'),
    [
        ('bert', 'fsdp x sequence x tensor'),
        ('albert', 'data x fsdp x tensor'),
        ('longformer', 'data x fsdp x tensor'),
        ('longformer', 'fsdp x sequence x tensor'),
        ('t5', 'fsdp x sequence x tensor'),
        ('t5 v1.1', 'data x fsdp x tensor'),
        ('t5 hybrid', 'fsdp x sequence x tensor'),
        ('bert with experts', 'expert x tensor'),
        ('t5 with experts', 'expert x tensor'),
    ],
)
def test_meshes_agree_with_one_device(name, mesh):
    found = run(name, MESHES[mesh])
    agrees(found, run(name, MeshConfig(data=1)))
    for axis in mesh.split(' x '):
        for collective in (
            COLLECTIVES[axis],
            *(('collective-permute',) * (name == 'longformer' and axis == 'sequence')),
        ):
            assert f'{collective}(' in found[2] or f'{collective}-start(' in found[2], axis


def test_logits_of_some_tokens_alone_give_the_loss_of_those():
    rows = batch('bert')
    rows |= {name: np.zeros((ROWS, T), rows[name].dtype) for name in ('targets', 'loss_weights')}
    for name in ('targets', 'loss_weights'):
        np.put_along_axis(rows[name], rows['predicted'], batch('bert')[name], 1)
    del rows['predicted']
    agrees(run('bert', MeshConfig(data=1)), step_of('bert', MeshConfig(data=1), rows))


# Layers that share parameters, and some that no stage has; two sides, with relative biases, whose tokens are cut up.
@pytest.mark.parametrize(
    ('name', 'mesh', 'pipeline'),
    [
        ('albert of five', MeshConfig(data=1, fsdp=2, pipeline=2), PipelineConfig('interleaved', 2)),
        ('t5 of three', MeshConfig(data=1, tensor=2, pipeline=2), PipelineConfig('zero_bubble')),
    ],
)
def test_pipelines_agree_with_one_device(name, mesh, pipeline):
    agrees(run(name, mesh, (), 2, pipeline), run(name, MeshConfig(data=1), (), 2))


def test_a_prefix_language_model_on_a_mesh():
    mesh = MeshConfig(data=1, fsdp=2, tensor=2, pipeline=2)
    agrees(run('prefix', mesh, (), 2), run('prefix', MeshConfig(data=1), (), 2))
    with pytest.raises(UserError, match='have no global keys'):
        run('prefix', MESHES['fsdp x sequence x tensor'])


@pytest.mark.parametrize('name', ['albert', 't5 v1.1'])
def test_unrolled_and_recomputed_layers_give_the_same(name):
    expected = run(name, MeshConfig(data=1))
    agrees(run(name, MeshConfig(data=1), stack=(('scan_layers', False),)), expected)
    agrees(run(name, MeshConfig(data=1), stack=(('remat', 'full'),)), expected)


def test_microbatches_of_two_sides():
    """Dropout is drawn by microbatch, so without it."""
    plain = t5(gated=False, vocab_size=64, compute_dtype='float64')
    losses = []
    with jax.enable_x64():
        for accumulation in (1, 4):
            step = StepConfig(ROWS, T, accumulation)
            trainer = Trainer(plain, GRADIENT, step, 10, MeshConfig(data=1), devices=jax.devices()[:1])
            state = jax.device_put(initial('t5'), trainer.state_shardings)
            new, metrics = trainer.train_step(state, batch('t5'))
            losses.append((float(metrics['loss']), jax.device_get(new['parameters'])))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-7)
    for exact, actual in zip(jax.tree.leaves(losses[0][1]), jax.tree.leaves(losses[1][1]), strict=True):
        np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-9 * np.abs(exact).max())


def test_what_encoders_cannot_do_is_named():
    with pytest.raises(UserError, match='sequences of 41 tokens are longer than the 40 learned positions'):
        Trainer(MODELS['bert'], GRADIENT, StepConfig(ROWS, 41), 10, MeshConfig(data=1))
    assert isinstance(MODELS['prefix'], DecoderConfig)
