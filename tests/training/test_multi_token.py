"""Training with multi-token prediction: losses by position, means by depth, and the same gradients on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.models.model import layers_of
from llm.models.multi_token import MultiTokenConfig
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.training.loop import Evaluation, evaluate
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.compiling import QUICKLY
from tests.training.parity_cases import BATCH, GRADIENT, LAYER, LENGTH, MOE, SMALL, batch

MODELS = {
    # Stages of one chunk share the layers, and of two leave some over: the last is a stage's, or of all together.
    'parallel': dataclasses.replace(SMALL, num_layers=6, multi_token=MultiTokenConfig(2, 'parallel'), remat='full'),
    # Experts in the modules, as DeepSeek-V3 has them.
    'sequential': dataclasses.replace(
        SMALL,
        num_layers=3,
        tied_embeddings=True,
        multi_token=MultiTokenConfig(2, layer=dataclasses.replace(LAYER, feed_forward=MOE)),
    ),
}
Z_LOSS = 1e-3


def trainer_of(name, mesh=MeshConfig(data=1), accumulation=1, pipeline=PipelineConfig(), **changes):
    devices = jax.devices()[: int(np.prod(mesh.sizes(8)))]
    step = StepConfig(BATCH, LENGTH, accumulation, z_loss=Z_LOSS)
    return Trainer(
        dataclasses.replace(MODELS[name], **changes), GRADIENT, step, 10, mesh, devices=devices, pipeline=pipeline
    )


@functools.cache
def initial(name):
    """Away from the start, where some gradients are all but zero."""
    rng = np.random.default_rng(1)
    state = jax.device_get(trainer_of(name).fresh_state())
    return state | {'parameters': jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), state['parameters'])}


@functools.cache
def run(name, mesh=MeshConfig(data=1), accumulation=1, pipeline=PipelineConfig()):
    """(metrics, gradients) of one step on packed rows, in float64."""
    with jax.enable_x64():
        trainer = trainer_of(name, mesh, accumulation, pipeline)
        state = jax.device_put(initial(name), trainer.state_shardings)
        rows = jax.device_put(batch(packed=True), trainer.batch_sharding)
        new, metrics = trainer.train_step.lower(state, rows).compile(QUICKLY)(state, rows)
        pairs = initial(name)['parameters'], jax.device_get(new['parameters'])
        return jax.device_get(metrics), jax.tree.map(jnp.subtract, *pairs)


def targets_by_hand(rows, depth):
    """(weight, target) of the token `depth` after each input, one position after the other."""
    weights, targets = np.zeros((BATCH, LENGTH)), np.zeros((BATCH, LENGTH), np.int32)
    for row in range(BATCH):
        for position in range(LENGTH - depth + 1):
            there = position + depth - 1
            segment = rows['segment_ids'][row, position]
            if segment > 0 and rows['segment_ids'][row, there] == segment:
                weights[row, position] = rows['loss_weights'][row, there]
                targets[row, position] = rows['targets'][row, there]
    return weights, targets


def test_losses_and_gradients_are_the_definition():
    """Loss of all logits at once, position by position; gradients by differentiating that."""
    rows = batch(packed=True)
    config = MODELS['parallel']
    graph = nnx.split(config.build())[0]
    known = [targets_by_hand(rows, depth) for depth in (1, 2, 3)]
    known[0] = (rows['loss_weights'], rows['targets'])

    def losses(parameters):
        arrays = {name: rows[name] for name in ('positions', 'segment_ids')}
        logits = nnx.merge(graph, parameters).logits_ahead(rows['inputs'], **arrays)
        log_z = jax.nn.logsumexp(logits, -1)
        means, total = [], 0.0
        for depth, (weights, targets) in enumerate(known):
            nll = log_z[:, depth] - jnp.take_along_axis(logits[:, depth], targets[..., None], -1)[..., 0]
            means.append(jnp.sum(weights * nll) / weights.sum())
            total += means[-1] + Z_LOSS * jnp.sum(weights * log_z[:, depth] ** 2) / weights.sum()
        return total, means

    with jax.enable_x64():
        gradients, means = jax.jit(jax.grad(losses, has_aux=True))(initial('parallel')['parameters'])
    metrics, found = run('parallel')
    for name, mean in zip(('loss', 'loss_2_ahead', 'loss_3_ahead'), means, strict=True):
        assert float(metrics[name]) == pytest.approx(float(mean), rel=1e-6)
    # The weights of the batch are in fp32.
    for (path, exact), actual in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(found), strict=True):
        size = np.abs(exact).max()
        np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-6 * size, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ('name', 'mesh', 'accumulation', 'pipeline'),
    [
        ('parallel', MeshConfig(data=1, fsdp=2, sequence=2, tensor=2), 1, PipelineConfig()),
        ('sequential', MeshConfig(data=1, expert=2, sequence=2), 1, PipelineConfig()),
        ('parallel', MeshConfig(data=1, fsdp=2, pipeline=2), 4, PipelineConfig('zero_bubble')),
        ('parallel', MeshConfig(data=1, tensor=2, pipeline=2), 4, PipelineConfig('interleaved', chunks=2)),
        ('sequential', MeshConfig(data=1, expert=2, pipeline=2), 2, PipelineConfig('gpipe')),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_meshes_agree_with_one_device(name, mesh, accumulation, pipeline):
    expected_metrics, expected = run(name)
    metrics, found = run(name, mesh, accumulation, pipeline)
    assert set(metrics) == set(expected_metrics)
    for value, exact in expected_metrics.items():
        assert float(metrics[value]) == pytest.approx(float(exact), rel=1e-6, abs=1e-9), value
    for (path, exact), actual in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        size = np.abs(exact).max()
        assert size > 0, path
        np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-9 * size, err_msg=jax.tree_util.keystr(path))


def test_the_routers_of_modules_are_measured_with_the_others():
    assert len(layers_of(MODELS['sequential'])) == 5
    metrics, gradients = run('sequential')
    assert metrics['load_balance_loss'] > 1
    # A head learns from its own loss: the bias that balances experts moves in every module.
    bias = gradients['multi_token']['heads']['layer']['feed_forward']['router']['bias']
    assert (np.abs(bias).max(-1) > 0).all()


def test_evaluation_measures_every_depth_over_its_own_targets():
    trainer = trainer_of('parallel', compute_dtype='float32')
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float32), initial('parallel')['parameters'])
    one = batch(packed=True)

    class Two:
        def batch(self, step):
            return one if step == 0 else {name: x[::-1] for name, x in one.items()}

    values = evaluate(trainer, parameters, Evaluation(Two(), 2))
    metrics, _ = run('parallel')
    for name in ('loss', 'loss_2_ahead', 'loss_3_ahead'):
        assert values[name] == pytest.approx(float(metrics[name]), rel=1e-4)
