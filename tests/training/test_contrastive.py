"""Contrastive training: the losses of published implementations, and the same on any mesh and in microbatches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.models.feed_forward import FeedForwardConfig
from llm.models.moe import MoeConfig
from llm.models.pooling import PoolingConfig
from llm.models.routing import RouterConfig
from llm.parallel.mesh import MeshConfig
from llm.training.contrastive import ContrastiveConfig, contrastive_loss
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.compiling import QUICKLY
from tests.models.small_encoders import bert
from tests.training.parity_cases import GRADIENT, LAYER, SMALL

ROWS, S = 8, 8


@pytest.mark.oracle
@pytest.mark.parametrize('sides', [2, 3], ids=['pairs', 'hard negatives'])
@pytest.mark.parametrize('symmetric', [False, True])
def test_losses_and_gradients_are_those_of_the_published_ones(sides, symmetric):
    """SimCSE's code: CrossEntropyLoss of cos(z1, z2) / temp with cos(z1, z3) / temp beside; sentence-transformers'
    MultipleNegativesRankingLoss is the same with scale = 1 / temp, and its symmetric form adds the transpose."""
    import torch

    values = np.random.default_rng(0).standard_normal((5, sides, 7))
    theirs = torch.tensor(values, requires_grad=True)
    unit = torch.nn.functional.normalize(theirs, dim=-1)
    scores = torch.cat([unit[:, 0] @ unit[:, side].T for side in range(1, sides)], dim=1) / 0.05
    cross_entropy, own = torch.nn.CrossEntropyLoss(), torch.arange(5)
    expected = cross_entropy(scores, own)
    if symmetric:
        expected = (expected + cross_entropy(scores[:, :5].T, own)) / 2
    expected.backward()

    def loss(values):
        vectors = values / jnp.linalg.norm(values, axis=-1, keepdims=True)
        total, sums = contrastive_loss(vectors, jnp.ones(5), ContrastiveConfig(0.05, symmetric))
        return total / sums['tokens']

    with jax.enable_x64():
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(values))
        # Rows of padding are nobody's negatives.
        padded = jnp.concatenate([jnp.asarray(values), jnp.zeros((3, sides, 7))])
        padded = padded / jnp.maximum(jnp.linalg.norm(padded, axis=-1, keepdims=True), 1e-9)
        weights = jnp.array([1.0] * 5 + [0] * 3)
        same, sums = contrastive_loss(padded, weights, ContrastiveConfig(0.05, symmetric))
    assert float(value) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=0, atol=1e-12)
    assert float(same / sums['tokens']) == pytest.approx(expected.item(), rel=1e-12)


ENCODER = bert(1, vocab_size=64, compute_dtype='float64', token_types=0, num_outputs=0)
# The bias that balances experts moves by the routers' losses alone.
MOE = MoeConfig(
    num_experts=4,
    experts_per_token=2,
    expert=FeedForwardConfig(d_ff=16),
    router=RouterConfig(balance_loss=0.1, bias_rate=0.125),
)
EXPERTS = tuple(dataclasses.replace(layer, feed_forward=MOE) for layer in ENCODER.layers.pattern)
MODELS = {
    'encoder': (
        dataclasses.replace(ENCODER, layers=dataclasses.replace(ENCODER.layers, pattern=EXPERTS)),
        ContrastiveConfig(0.1, True),
    ),
    'encoder of two layers': (
        dataclasses.replace(ENCODER, layers=dataclasses.replace(ENCODER.layers, num_layers=2)),
        ContrastiveConfig(0.1, True),
    ),
    'decoder': (
        dataclasses.replace(
            SMALL, num_layers=2, pattern=(dataclasses.replace(LAYER, feed_forward=MOE, dropout=0.2),), num_outputs=0
        ),
        ContrastiveConfig(0.1, pooling=PoolingConfig('last', normalize=True)),
    ),
}


def pairs():
    rng = np.random.default_rng(0)
    arrays = {'loss_weights': np.zeros((ROWS, S), np.float32)}
    arrays['loss_weights'][:7, 0] = 1
    for side in ('', 'positive_', 'negative_'):
        real = np.arange(S) < rng.integers(2, S + 1, (ROWS, 1))
        real[7] = False
        arrays[f'{side}inputs'] = rng.integers(1, 30, (ROWS, S)).astype(np.int32)
        arrays[f'{side}segment_ids'] = real.astype(np.int32)
        arrays[f'{side}positions'] = np.where(real, np.arange(S), 0).astype(np.int32)
    return arrays


def run(name, mesh=MeshConfig(data=1), accumulation=1):
    """(metrics, gradients, what is predicted) of one step in float64."""
    with jax.enable_x64():
        config, contrastive = MODELS[name]
        devices = jax.devices()[: int(np.prod(mesh.sizes(8)))]
        step = StepConfig(ROWS, S, accumulation)
        trainer = Trainer(config, GRADIENT, step, 10, mesh, devices=devices, contrastive=contrastive)
        rng = np.random.default_rng(1)
        state = jax.device_get(trainer.fresh_state())
        parameters = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape), state['parameters'])
        state = jax.device_put(state | {'parameters': parameters}, trainer.state_shardings)
        rows = jax.device_put(pairs(), trainer.batch_sharding)
        arguments = state['parameters'], rows
        predicted = trainer.prediction_step.lower(*arguments).compile(QUICKLY)(*arguments)
        new, metrics = trainer.train_step.lower(state, rows).compile(QUICKLY)(state, rows)
        return (
            jax.device_get(metrics),
            jax.tree.map(np.subtract, parameters, jax.device_get(new['parameters'])),
            jax.device_get(predicted),
        )


def agrees(found, expected):
    assert set(found[0]) == set(expected[0])
    for name, value in expected[0].items():  # which is stored in fp32
        assert float(found[0][name]) == pytest.approx(float(value), rel=1e-6, abs=1e-9), name
    assert float(found[2]['nll']) == pytest.approx(float(expected[2]['nll']), rel=1e-12)
    np.testing.assert_allclose(found[2]['predicted'], expected[2]['predicted'], rtol=0, atol=1e-12)
    for (path, exact), actual in zip(jax.tree.leaves_with_path(expected[1]), jax.tree.leaves(found[1]), strict=True):
        # A key's bias shifts all scores of a query alike: nothing but rounding.
        size = 1e-3 if 'key_bias' in jax.tree_util.keystr(path) else np.abs(exact).max()
        assert size > 0, path
        np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-9 * size, err_msg=jax.tree_util.keystr(path))


def test_every_mesh_and_every_microbatch_compares_with_the_whole_batch():
    """Seven rows and one of padding, in one go, over two meshes, and in four microbatches (GradCache)."""
    expected = run('encoder')
    # The loss of the batch: the mean over rows that is not that of parts of it.
    assert float(expected[2]['nll']) / 7 == pytest.approx(float(expected[0]['loss']), rel=1e-6)
    assert expected[0]['load_balance_loss'] > 0.9  # a mean over tokens of all sides
    agrees(run('encoder', MeshConfig(data=2, fsdp=2, tensor=2)), expected)
    agrees(run('encoder', accumulation=4), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'mesh'),
    [
        ('decoder', MeshConfig(data=1, sequence=2, pipeline=2)),  # its devices share rows
        ('encoder of two layers', MeshConfig(data=1, fsdp=2, pipeline=2)),
    ],
)
def test_on_stages(name, mesh):
    """With dropout, which is that of the same microbatches one after the other, in both passes."""
    agrees(run(name, mesh, 2), run(name, accumulation=2))


def test_microbatches_of_a_model_with_dropout_are_the_same_in_both_passes():
    """At a rate of zero gradients are exact; with dropout they are those of the loss that is reported, by its
    differences."""
    config, contrastive = ENCODER, MODELS['encoder'][1]
    config = dataclasses.replace(config, embedding_dropout=0.3)
    with jax.enable_x64():
        step = StepConfig(ROWS, S, 2)
        mesh, devices = MeshConfig(data=1), jax.devices()[:1]
        trainer = Trainer(config, GRADIENT, step, 10, mesh, devices=devices, contrastive=contrastive)
        state = jax.tree.map(
            lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, jax.device_get(trainer.fresh_state())
        )
        rows = jax.device_put(pairs(), trainer.batch_sharding)
        gradients_of = jax.jit(trainer._under_rules(trainer._gradients_of_sums()))
        key, table = jax.random.key(3), state['parameters']['embedding']['table']
        gradients, sums = gradients_of(state['parameters'], rows, key)
        direction = np.random.default_rng(0).standard_normal(table.shape)

        def moved(by):
            parameters = state['parameters'] | {'embedding': {'table': table + by * direction}}
            return float(gradients_of(parameters, rows, key)[1]['nll'])

        slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert float(np.sum(gradients['embedding']['table'] * direction)) == pytest.approx(slope, rel=1e-6)
    assert float(sums['tokens']) == 7


def test_what_cannot_be_trained_so_is_named():
    with pytest.raises(UserError, match='temperature is 0'):
        ContrastiveConfig(0)
