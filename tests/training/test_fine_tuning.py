"""What fine-tuning changes of a step: adapters, frozen layers, a learning rate per layer."""

import dataclasses

import jax
import numpy as np
import pytest

from llm.models.low_rank import LowRankConfig
from llm.models.parameters import named_specs, parameter_specs
from llm.parallel.mesh import MeshConfig
from llm.training.optimizers import OptimizerConfig
from llm.training.parametrization import by_depth
from llm.training.schedules import ScheduleConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.models.small_encoders import bert, t5
from tests.training.parity_cases import BATCH, GRADIENT, LAYER, LENGTH, SMALL, batch

MODEL = dataclasses.replace(SMALL, num_layers=4)
ADAPTED = dataclasses.replace(MODEL, low_rank=LowRankConfig(rank=2, targets=('query', 'value', 'down')))


def _trainer(model, optimizer=GRADIENT, mesh=MeshConfig(data=1), microbatches=1):
    devices = int(np.prod(list(dataclasses.asdict(mesh).values())[:6]))
    step = StepConfig(BATCH, LENGTH, microbatches)
    return Trainer(model, optimizer, step, total_steps=10, mesh=mesh, devices=jax.devices()[:devices])


def _initial(trainer):
    """In float64, and adapters shaken, so that both factors have gradients."""
    state = jax.device_get(trainer.fresh_state())
    floats = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, state)
    shaken = jax.tree.map(
        lambda x: x + 0.02 * np.random.default_rng(x.size).standard_normal(x.shape), floats['parameters']
    )
    return {**floats, 'parameters': shaken}


def _step(trainer, initial):
    """Parameters after one step."""
    state = jax.device_put(initial, trainer.state_shardings)
    rows = jax.device_put(batch(packed=True), trainer.batch_sharding)
    return jax.device_get(trainer.train_step(state, rows)[0]['parameters'])


def _changes(before, after):
    pairs = zip(named_specs(before), named_specs(after), strict=True)
    return {name: np.abs(old - new).max() for (name, old), (_, new) in pairs}


def test_adapters_alone_are_trained_and_have_optimizer_state():
    adam = OptimizerConfig(schedule=ScheduleConfig('constant'), weight_decay=0.5)
    with jax.enable_x64():
        trainer = _trainer(ADAPTED, adam)
        initial = _initial(trainer)
        changes = _changes(initial['parameters'], _step(trainer, initial))
    adapters = {name for name in changes if name.endswith(('/down', '/up')) and name.count('/') == 4}
    assert len(adapters) == 6
    assert {name for name, change in changes.items() if change > 0} == adapters
    moments = sum(x.size for x in jax.tree.leaves(initial['optimizer']) if x.ndim)
    assert moments == 2 * sum(spec.size for name, spec in named_specs(initial['parameters']) if name in adapters)


@pytest.mark.parametrize(
    ('mesh', 'microbatches'),
    [
        (MeshConfig(data=2, fsdp=2, tensor=2), 1),
        (MeshConfig(data=1, fsdp=2, sequence=2), 2),
        (MeshConfig(data=1, pipeline=2, tensor=2), 4),
    ],
    ids=['data2.fsdp2.tensor2', 'fsdp2.sequence2', 'pipeline2.tensor2'],
)
def test_adapters_are_trained_alike_on_any_mesh(mesh, microbatches):
    with jax.enable_x64():
        alone = _trainer(ADAPTED)
        initial = _initial(alone)
        expected = _changes(initial['parameters'], _step(alone, initial))
        found = _step(_trainer(ADAPTED, mesh=mesh, microbatches=microbatches), initial)
        reference = _step(_trainer(ADAPTED), initial)
    assert max(expected.values()) > 1e-3
    for (name, ours), (_, theirs) in zip(named_specs(found), named_specs(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9 * max(expected[name], 1e-3), err_msg=name)


def test_frozen_layers_and_embeddings_stay():
    adam = OptimizerConfig(schedule=ScheduleConfig('constant'), weight_decay=0.5, frozen_layers=3)
    model = dataclasses.replace(MODEL, num_layers=5, pattern=(LAYER, LAYER))
    with jax.enable_x64():
        trainer = _trainer(model, adam)
        initial = _initial(trainer)
        after = _step(trainer, initial)

    def changed(*path):
        old, new = initial['parameters'], after
        for key in path:
            old, new = old[key], new[key]
        return [bool((a != b).any()) for a, b in zip(old, new, strict=True)]

    assert not any(changed('embedding', 'table'))
    # Position 0 holds layers 0 and 2, position 1 layers 1 and 3; layer 4 is left over.
    assert changed('layers', '0', 'mixer', 'query') == [False, False]
    assert changed('layers', '1', 'mixer', 'query') == [False, True]
    assert changed('remainder', '0', 'mixer', 'query') == [True]
    assert all(changed('head', 'kernel'))


def test_frozen_layers_do_not_count_in_clipping():
    clipped = dataclasses.replace(GRADIENT, clip_norm=1e-3, frozen_layers=4)
    with jax.enable_x64():
        trainer = _trainer(MODEL, clipped)
        initial = _initial(trainer)
        changes = jax.tree.map(np.subtract, initial['parameters'], _step(trainer, initial))
        norm = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(changes)))
    np.testing.assert_allclose(norm, 1e-3, rtol=1e-6)


def test_layer_decay_divides_the_rate_by_depth():
    decayed = dataclasses.replace(GRADIENT, layer_decay=0.5)
    with jax.enable_x64():
        plain = _trainer(MODEL)
        initial = _initial(plain)
        whole = jax.tree.map(np.subtract, initial['parameters'], _step(plain, initial))
        part = jax.tree.map(np.subtract, initial['parameters'], _step(_trainer(MODEL, decayed), initial))

    def ratio(*path):
        a, b = part, whole
        for key in path:
            a, b = a[key], b[key]
        return np.asarray(np.sum(a * b, axis=tuple(range(1, a.ndim))) / np.sum(b * b, axis=tuple(range(1, a.ndim))))

    np.testing.assert_allclose(ratio('layers', '0', 'mixer', 'output'), 0.5 ** np.array([4, 3, 2, 1]), rtol=1e-6)
    np.testing.assert_allclose(ratio('head', 'kernel'), 1.0, rtol=1e-6)
    embedding = np.abs(part['embedding']['table']).sum() / np.abs(whole['embedding']['table']).sum()
    np.testing.assert_allclose(embedding, 0.5**5, rtol=1e-6)


def test_a_new_head_is_trained_beside_adapters():
    model = dataclasses.replace(ADAPTED, num_outputs=3)
    specs = parameter_specs(model.build())
    assert specs['head']['kernel'].trainable
    assert not specs['embedding']['table'].trainable


def test_depths_of_encoders_and_encoder_decoders():
    def depths(config):
        rates = dict(named_specs(by_depth(parameter_specs(config.build()), lambda depth, last: depth + 100 * last)))
        return {name: np.ravel(rate).tolist() for name, rate in rates.items()}

    found = depths(dataclasses.replace(bert(2, embedding_size=16), num_outputs=2, pooler=True))
    below = {name for name, (rate, *_) in found.items() if rate == 300}
    # The norm and the widening of the embeddings are as far down as they are.
    assert {name.split('/')[0] for name in below} == {
        *('embedding', 'positions', 'token_types', 'embedding_norm', 'widen', 'widen_bias')
    }
    assert found['encoder/layers/0/mixer/query'] == [301, 302]
    assert found['classifier/kernel'] == found['pooler/dense'] == [303]

    found = depths(t5(2))
    assert found['embedding/table'] == found['encoder/relative_bias/table'] == [500]
    assert found['encoder/layers/0/mixer/query'] == [501, 502]
    assert found['decoder/layers/0/cross/query'] == found['decoder/layers/0/mixer/query'] == [503, 504]
    assert (found['encoder/final_norm/scale'], found['decoder/final_norm/scale']) == ([503], [505])
    assert found['head/kernel'] == [505]
