"""Routers in training: their sums do not depend on how a batch is cut up, and a bias moves by the sign of its load."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llm.models.decoder import Decoder, DecoderConfig
from llm.parallel.mesh import MeshConfig
from llm.training.loop import Evaluation, evaluate
from llm.training.optimizers import OptimizerConfig
from llm.training.schedules import ScheduleConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.models.small_moe import moe, moe_decoder

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SGD = OptimizerConfig(
    kind='sgd', learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=None, schedule=ScheduleConfig('constant')
)
BIASED = moe({'bias_rate': 0.25, 'z_loss': 0.1, 'balance_loss': 1.0})


def batch(rows=4, length=8):
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 31, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[1, 5:] = 0
    segments[3, :] = 0
    weights = segments.astype(np.float32)
    weights[0, :4] = 0  # a prompt
    arrays = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'loss_weights': weights, 'segment_ids': segments}
    arrays['positions'] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return {name: jnp.asarray(x) for name, x in arrays.items()}


class One:
    """An evaluation set of one batch."""

    def __init__(self, arrays):
        self.arrays = arrays

    def batch(self, step):
        return self.arrays


@functools.cache
def initial(config: DecoderConfig, optimizer: OptimizerConfig):
    """The state before the first step, drawn on one device, with float64 for float32."""
    shape = StepConfig(4, 8)
    trainer = Trainer(config, optimizer, shape, 10, mesh=MeshConfig(data=1), devices=jax.devices()[:1])
    state = jax.device_get(trainer.fresh_state())
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, state)


def step(config: DecoderConfig, optimizer=SGD, accumulation=1, rows=None, mesh=MeshConfig(data=1), evaluated=False):
    """(parameters before, parameters after, metrics) of a step in float64; and figures of evaluation before it."""
    with jax.enable_x64():
        arrays = batch() if rows is None else rows
        shape = arrays['inputs'].shape
        config = dataclasses.replace(config, compute_dtype='float64')
        trainer = Trainer(
            config,
            optimizer,
            StepConfig(*shape, gradient_accumulation=accumulation),
            10,
            mesh=mesh,
            devices=jax.devices()[: np.prod(mesh.sizes(8))],
        )
        before = initial(config, optimizer)['parameters']
        state = jax.device_put(initial(config, optimizer), trainer.state_shardings)
        arrays = jax.device_put(arrays, trainer.batch_sharding)
        figures = evaluate(trainer, state['parameters'], Evaluation(One(arrays), 1)) if evaluated else None
        state, metrics = trainer.train_step(state, arrays)
        found = before, jax.device_get(state['parameters']), jax.device_get(metrics)
        return (*found, figures) if evaluated else found


def test_accumulation_and_padding_change_nothing():
    config = moe_decoder(BIASED)
    _, whole, metrics = step(config)
    _, cut, cut_metrics = step(config, accumulation=2)
    padded = {name: jnp.concatenate([x, jnp.zeros_like(x)]) for name, x in batch().items()}
    _, more, more_metrics = step(config, rows=padded)
    for other, found in ((cut, cut_metrics), (more, more_metrics)):
        for path, value in jax.tree_util.tree_leaves_with_path(whole):
            same = dict(jax.tree_util.tree_leaves_with_path(other))[path]
            np.testing.assert_allclose(same, value, atol=1e-12, err_msg=str(path))
        assert set(found) == set(metrics)
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    assert metrics['drop_rate'] == 0
    assert metrics['expert_load'] >= 1
    assert 0 < metrics['routing_entropy'] <= np.log(4) + 1e-6
    assert metrics['load_balance_loss'] >= 0.9


def test_the_gradient_is_of_the_mean_loss_and_the_mean_router_losses():
    """Of one row without a prompt, where all means are over the same tokens: by jax.grad of a plain formula."""
    config = dataclasses.replace(moe_decoder(moe({'z_loss': 0.1, 'balance_loss': 1.0})), compute_dtype='float64')
    rows = {name: x[2:3] for name, x in batch().items()}
    before, after, metrics = step(config, rows=rows)
    with jax.enable_x64():
        graph = nnx.split(Decoder(config))[0]

        def loss(parameters):
            decoder = nnx.merge(graph, parameters)
            hidden, sums = decoder.hidden_and_sums(rows['inputs'])
            log_probs = jax.nn.log_softmax(decoder.logits(hidden))
            nll = -jnp.take_along_axis(log_probs, rows['targets'][..., None], -1).mean()
            return nll + sums['layers']['0']['loss'].sum() / 8

        gradients = jax.grad(loss)(jax.tree.map(jnp.asarray, before))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        moved = dict(jax.tree_util.tree_leaves_with_path(jax.tree.map(np.subtract, before, after)))[path]
        np.testing.assert_allclose(moved, gradient, atol=1e-10, err_msg=str(path))
    np.testing.assert_allclose(metrics['gradient_norm'], optax.tree.norm(gradients), rtol=1e-6)


def test_a_bias_moves_by_its_rate_and_by_nothing_else():
    config = moe_decoder(BIASED)
    adam = OptimizerConfig(learning_rate=1e-3, clip_norm=1e-6, weight_decay=0.5, schedule=ScheduleConfig('constant'))
    _, after, metrics = step(config, adam)
    moved = after['layers']['0']['feed_forward']['router']['bias']
    assert set(np.unique(moved)) <= {-0.25, 0.0, 0.25}
    assert (moved != 0).any()
    # Whichever expert had most goes down.
    assert (moved.min(-1) == -0.25).all()
    plain = step(moe_decoder(dataclasses.replace(BIASED, router=dataclasses.replace(BIASED.router, bias_rate=None))))
    np.testing.assert_allclose(metrics['gradient_norm'], plain[2]['gradient_norm'], rtol=1e-6)


CHOOSING = {
    'experts choose': (moe({'kind': 'expert_choice'}, dispatch='capacity', group_size=4), 'expert x fsdp x sequence'),
    'hash': (moe({'kind': 'hash', 'hash_seed': 3}), 'expert x data x tensor'),
    'balanced hash': (moe({'kind': 'hash', 'hash': 'balanced', 'hash_ids': 31}), 'expert x tensor x pipeline'),
}
MESHES = {
    'expert x fsdp x sequence': MeshConfig(data=1, expert=2, fsdp=2, sequence=2),
    'expert x data x tensor': MeshConfig(data=2, expert=2, tensor=2),
    'expert x tensor x pipeline': MeshConfig(data=1, expert=2, tensor=2, pipeline=2),
}


@pytest.mark.parametrize('name', CHOOSING)
def test_other_routers_choose_alike_on_every_mesh(name):
    layer, mesh = CHOOSING[name]
    config = moe_decoder(layer, vocab_size=32)
    _, one, metrics, figures = step(config, evaluated=True)
    accumulation = MESHES[mesh].pipeline
    _, many, same, same_figures = step(config, SGD, accumulation, mesh=MESHES[mesh], evaluated=True)
    for path, value in jax.tree_util.tree_leaves_with_path(one):
        found = dict(jax.tree_util.tree_leaves_with_path(many))[path]
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-9 * max(1.0, np.abs(value).max()), err_msg=str(path))
    routing = ('routing_entropy', 'expert_load', 'worst_expert_load', 'drop_rate')
    for figure in ('loss', *routing):
        np.testing.assert_allclose(same[figure], metrics[figure], rtol=1e-6, err_msg=figure)
        # Before the step evaluation sees the same model and the same tokens.
        np.testing.assert_allclose(figures[figure], metrics[figure], rtol=1e-6, atol=1e-9, err_msg=figure)
        np.testing.assert_allclose(same_figures[figure], figures[figure], rtol=1e-9, atol=1e-12, err_msg=figure)


def test_leading_layers_come_first():
    """A dense layer before two of experts is what a pattern of it and them would be."""
    dense = moe_decoder().pattern[0]
    first = dataclasses.replace(dense, feed_forward=dataclasses.replace(BIASED.expert, d_ff=40))
    config = moe_decoder(BIASED, leading=(first,), num_layers=3)
    assert [config.location(i) for i in range(3)] == [('leading', '0', 0), ('layers', '0', 0), ('layers', '0', 1)]
    assert [layer.feed_forward for layer in config.layers] == [first.feed_forward, BIASED, BIASED]
    same = dataclasses.replace(config, leading=(), pattern=(first, config.pattern[0], config.pattern[0]))
    before, after, metrics = step(config)
    with jax.enable_x64():
        layers = before['layers']['0']
        moved = {
            **{name: value for name, value in before.items() if name not in ('leading', 'layers')},
            'layers': {
                '0': before['leading']['0'],
                **{str(i + 1): jax.tree.map(lambda x, i=i: x[i : i + 1], layers) for i in range(2)},
            },
        }
        arguments = (same, SGD, StepConfig(4, 8), 10, MeshConfig(data=1))
        trainer = Trainer(dataclasses.replace(same, compute_dtype='float64'), *arguments[1:], devices=jax.devices()[:1])
        state = {'parameters': moved, 'optimizer': trainer.optimizer.init(moved), 'step': jnp.int32(0)}
        state, found = trainer.train_step(jax.tree.map(jnp.asarray, state), batch())
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    ours = after['layers']['0']['feed_forward']['experts']['down'][1]
    np.testing.assert_allclose(
        state['parameters']['layers']['2']['feed_forward']['experts']['down'][0], ours, atol=1e-12
    )
