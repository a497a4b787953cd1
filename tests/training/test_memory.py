"""Training a model that remembers the row before: the same on a mesh, and what it does not go with is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.parallel.mesh import MeshConfig
from llm.training.loop import Evaluation, evaluate
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.models.test_transformer_xl import CONFIG, LAYER, H
from tests.training.parity_cases import GRADIENT

ROWS, S = 8, 4
MODEL = dataclasses.replace(
    CONFIG, vocab_size=16, compute_dtype='float64', pattern=(dataclasses.replace(LAYER, dropout=0.1),)
)


class Streams:
    """Batches whose rows go on from one another."""

    def batch(self, step):
        tokens = np.random.default_rng(0).integers(0, 16, (ROWS, 3 * S + 1)).astype(np.int32)
        here = slice(step * S, step * S + S)
        return {
            'inputs': tokens[:, here],
            'targets': tokens[:, 1:][:, here],
            'loss_weights': np.ones((ROWS, S), np.float32),
            'segment_ids': np.ones((ROWS, S), np.int32),
            'positions': np.broadcast_to(np.arange(3 * S, dtype=np.int32)[here], (ROWS, S)),
        }


@functools.cache
def trained(mesh):
    with jax.enable_x64():
        devices = jax.devices()[: int(np.prod(mesh.sizes(8)))]
        trainer = Trainer(MODEL, GRADIENT, StepConfig(ROWS, S), 10, mesh, devices=devices)
        state = jax.device_put(jax.device_get(trainer.fresh_state()), trainer.state_shardings)
        state = state | {'parameters': jax.tree.map(lambda x: x.astype(jnp.float64), state['parameters'])}
        initial, losses = jax.device_get(state), []
        for step in range(3):
            batch = jax.device_put(Streams().batch(step), trainer.batch_sharding)
            state, metrics = trainer.train_step(state, batch)
            losses.append(float(metrics['loss']))
        score = evaluate(trainer, initial['parameters'], Evaluation(Streams(), 3))
        return losses, jax.device_get(state), score['loss']


def test_a_mesh_agrees_with_one_device():
    one, many = trained(MeshConfig(data=1)), trained(MeshConfig(data=2, fsdp=2, tensor=H))
    np.testing.assert_allclose(many[0], one[0], rtol=1e-6)
    assert one[2] == pytest.approx(many[2], rel=1e-9)
    for exact, found in zip(jax.tree.leaves(one[1]), jax.tree.leaves(many[1]), strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-9 * max(1, np.abs(exact).max()))


@pytest.mark.parametrize(
    ('mesh', 'accumulation', 'where'),
    [
        (MeshConfig(data=1, pipeline=2), 1, 'MeshConfig.pipeline'),
        (MeshConfig(data=1, sequence=2), 1, 'MeshConfig.sequence'),
        (MeshConfig(data=1), 2, 'StepConfig.gradient_accumulation'),
    ],
)
def test_what_it_does_not_go_with_is_refused(mesh, accumulation, where):
    devices = jax.devices()[: int(np.prod(mesh.sizes(8)))]
    with pytest.raises(UserError, match=f'{where}: a model that remembers'):
        Trainer(MODEL, GRADIENT, StepConfig(ROWS, S, accumulation), 10, mesh, devices=devices)
