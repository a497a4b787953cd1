"""Training a model that remembers the row before: the same on a mesh, and what it does not go with is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.parallel.mesh import MeshConfig
from llm.parallel.sharding import AxisRules
from llm.training.loop import Evaluation, evaluate
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.models.test_transformer_xl import CONFIG, LAYER, MIXER, H
from tests.training.parity_cases import GRADIENT

ROWS, S = 8, 4
MODEL = dataclasses.replace(CONFIG, vocab_size=16, compute_dtype='float64')
MODELS = {
    'plain': MODEL,
    'dropout': dataclasses.replace(MODEL, pattern=(dataclasses.replace(LAYER, dropout=0.1),)),
    # Shorter than a row, and of no length that devices can share.
    'short': dataclasses.replace(
        MODEL, pattern=(dataclasses.replace(LAYER, mixer=dataclasses.replace(MIXER, memory_length=3)),)
    ),
}


class Streams:
    """Batches whose rows go on from one another; in every other one a document ends after six tokens."""

    def batch(self, step):
        tokens = np.random.default_rng(0).integers(0, 16, (ROWS, 3 * S + 1)).astype(np.int32)
        here = slice(step * S, step * S + S)
        index = np.broadcast_to(np.arange(3 * S, dtype=np.int32)[here], (ROWS, S))
        second = (index >= 6) & (np.arange(ROWS) % 2 == 0)[:, None]
        return {
            'inputs': tokens[:, here],
            'targets': tokens[:, 1:][:, here],
            'loss_weights': np.ones((ROWS, S), np.float32),
            'segment_ids': 1 + (second & ~second[:, :1]).astype(np.int32),
            'positions': index - 6 * second,
        }


@functools.cache
def trained(model, mesh, accumulation=1, method='ring'):
    with jax.enable_x64():
        devices = jax.devices()[: int(np.prod(mesh.sizes(8)))]
        rules = AxisRules(sequence_method=method)
        trainer = Trainer(MODELS[model], GRADIENT, StepConfig(ROWS, S, accumulation), 10, mesh, rules, devices=devices)
        state = jax.device_put(jax.device_get(trainer.fresh_state()), trainer.state_shardings)
        state = state | {'parameters': jax.tree.map(lambda x: x.astype(jnp.float64), state['parameters'])}
        initial, losses = jax.device_get(state), []
        for step in range(3):
            batch = jax.device_put(Streams().batch(step), trainer.batch_sharding)
            state, metrics = trainer.train_step(state, batch)
            losses.append(float(metrics['loss']))
        score = evaluate(trainer, initial['parameters'], Evaluation(Streams(), 3))
        return losses, jax.device_get(state), score['loss']


@pytest.mark.parametrize(
    ('model', 'mesh', 'accumulation', 'method'),
    [
        ('dropout', MeshConfig(data=2, fsdp=2, tensor=H), 1, 'ring'),
        ('plain', MeshConfig(data=2, sequence=2, tensor=H), 2, 'ring'),  # in zig-zag
        ('short', MeshConfig(data=1, sequence=4), 1, 'ulysses'),  # in order
    ],
)
def test_a_mesh_agrees_with_one_device(model, mesh, accumulation, method):
    one, many = trained(model, MeshConfig(data=1)), trained(model, mesh, accumulation, method)
    np.testing.assert_allclose(many[0], one[0], rtol=1e-6)
    assert one[2] == pytest.approx(many[2], rel=1e-9)
    assert np.abs(jax.tree.leaves(one[1]['memory'])[0]).min(axis=(1, 3)).min() > 0  # every place is taken
    for (path, exact), found in zip(jax.tree.leaves_with_path(one[1]), jax.tree.leaves(many[1]), strict=True):
        atol = 1e-9 * max(1, np.abs(exact).max())
        np.testing.assert_allclose(found, exact, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_a_pipeline_is_refused():
    devices = jax.devices()[:2]
    with pytest.raises(UserError, match='MeshConfig.pipeline: a model that remembers'):
        Trainer(MODEL, GRADIENT, StepConfig(ROWS, S, 2), 10, MeshConfig(data=1, pipeline=2), devices=devices)
