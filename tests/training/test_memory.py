"""Training a model that remembers the row before: the same on every mesh, and in microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.sharding import AxisRules
from llm.training.loop import Evaluation, evaluate
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.compiling import QUICKLY
from tests.models.test_transformer_xl import CONFIG, LAYER, MIXER, H
from tests.training.parity_cases import GRADIENT

ROWS, S = 8, 4
MODEL = dataclasses.replace(CONFIG, vocab_size=16, compute_dtype='float64')
MODELS = {
    # It remembers less than a row, and of no length that devices can share.
    'short': dataclasses.replace(
        MODEL, pattern=(dataclasses.replace(LAYER, mixer=dataclasses.replace(MIXER, memory_length=3)),)
    ),
    # More than a row. In a pipeline of four chunks one layer comes before the stages', and two after them.
    'long': dataclasses.replace(MODEL, num_layers=7, leading=(LAYER,), remat='full'),
}
ONE = PipelineConfig()


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
def trained(model, mesh, accumulation=1, method='ring', pipeline=PipelineConfig()):
    with jax.enable_x64():
        devices = jax.devices()[: int(np.prod(mesh.sizes(8)))]
        rules = AxisRules(sequence_method=method)
        trainer = Trainer(
            MODELS[model], GRADIENT, StepConfig(ROWS, S, accumulation), 10, mesh, rules, devices, pipeline
        )
        state = jax.device_put(jax.device_get(trainer.fresh_state()), trainer.state_shardings)
        state = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
        initial, losses = jax.device_get(state), []
        batch = jax.device_put(Streams().batch(0), trainer.batch_sharding)
        compiled = trainer.train_step.lower(state, batch).compile(QUICKLY)
        for step in range(3):
            batch = jax.device_put(Streams().batch(step), trainer.batch_sharding)
            state, metrics = compiled(state, batch)
            losses.append(float(metrics['loss']))
        score = evaluate(trainer, initial['parameters'], Evaluation(Streams(), 3))
        return losses, jax.device_get(state), score['loss'], compiled.as_text()


@pytest.mark.parametrize(
    ('model', 'mesh', 'accumulation', 'method', 'schedule'),
    [
        ('short', MeshConfig(data=2, fsdp=2, tensor=H), 1, 'ring', ONE),
        ('short', MeshConfig(data=2, sequence=2, tensor=H), 2, 'ring', ONE),  # in zig-zag
        (
            'long',
            MeshConfig(data=2, sequence=2, pipeline=2),
            2,
            'ulysses',
            PipelineConfig('interleaved', 2),
        ),  # in order
    ],
)
def test_a_mesh_agrees_with_one_device(model, mesh, accumulation, method, schedule):
    one, many = trained(model, MeshConfig(data=1)), trained(model, mesh, accumulation, method, schedule)
    np.testing.assert_allclose(many[0], one[0], rtol=1e-6)
    assert one[2] == pytest.approx(many[2], rel=1e-9)
    assert np.abs(jax.tree.leaves(one[1]['memory'])[0]).min(axis=(1, 3)).min() > 0  # every place is taken
    wanted = {'sequence': 'all-gather', 'pipeline': 'collective-permute'}
    for collective in (wanted[axis] for axis in wanted if getattr(mesh, axis) > 1):
        assert f'{collective}(' in many[3] or f'{collective}-start(' in many[3], collective
    for (path, exact), found in zip(jax.tree.leaves_with_path(one[1]), jax.tree.leaves(many[1]), strict=True):
        atol = 1e-9 * max(1, np.abs(exact).max())
        np.testing.assert_allclose(found, exact, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_heads_are_not_divided_over_the_devices_that_share_rows():
    rules = AxisRules(sequence_method='ulysses')
    mesh, step = MeshConfig(data=1, sequence=4), StepConfig(ROWS, S)
    with jax.enable_x64():
        trainer = Trainer(MODELS['short'], GRADIENT, step, 10, mesh, rules, jax.devices()[:4])
    assert H % 4 and trainer.mesh.shape['sequence'] == 4
