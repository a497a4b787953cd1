"""The train state and the compiled steps: the same on every mesh, to the bit where no sum is taken."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.models.dropout import Purpose, dropout
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.training.optimizers import OptimizerConfig
from llm.training.schedules import ScheduleConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer
from tests.models.small_decoders import decoder_config, layer, run
from tests.training.random_batches import LENGTH, ROWS, VOCABULARY, random_batch

MODEL = decoder_config(layer(dropout=0.3), vocab_size=VOCABULARY, num_layers=1, embedding_dropout=0.2)
ADAMW = OptimizerConfig(schedule=ScheduleConfig('cosine', warmup_steps=3))
STEP = StepConfig(ROWS, LENGTH, seed=5)
MESHES = (MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2))
ONE = MeshConfig(data=1)


def trainer(mesh=ONE, model=MODEL, optimizer=ADAMW, step=STEP):
    return Trainer(model, optimizer, step, 10, mesh)


@functools.cache
def initial(mesh=ONE, seed=5):
    return named(trainer(mesh, step=dataclasses.replace(STEP, seed=seed)).fresh_state())


def named(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_the_initial_state_is_the_same_bits_on_every_mesh(mesh):
    expected, found = initial(), initial(mesh)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        assert array.dtype == found[name].dtype
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert found["['step']"] == 0


def test_another_seed_is_another_initial_state():
    table = "['parameters']['embedding']['table']"
    assert not np.array_equal(initial()[table], initial(seed=6)[table])


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_dropout_masks_are_the_same_bits_on_every_mesh(mesh):
    def drop(x, key):
        return dropout(x, 0.5, key, Purpose.MIXER)

    x, key = jnp.ones((8, 16, 32)), jax.random.key(3)
    placed = trainer(mesh).batch_sharding.spec
    sharding = jax.sharding.NamedSharding(make_mesh(mesh), jax.sharding.PartitionSpec(*placed, 'tensor'))
    spread = jax.jit(drop, in_shardings=(sharding, None), out_shardings=sharding)(jax.device_put(x, sharding), key)
    np.testing.assert_array_equal(spread, jax.jit(drop)(x, key))
    assert 0.4 < np.mean(np.asarray(spread) == 0) < 0.6


# SGD at rate 1 without clipping: what a parameter changes by is its gradient.
GRADIENT = OptimizerConfig(
    kind='sgd', learning_rate=1.0, momentum=0.0, weight_decay=0.0, clip_norm=None, schedule=ScheduleConfig('constant')
)


@functools.cache
def in_float64(mesh):
    """A trainer in float64, and the initial state on the host."""
    with jax.enable_x64():
        one = trainer(mesh, dataclasses.replace(MODEL, compute_dtype='float64'), GRADIENT)
        state = trainer(optimizer=GRADIENT).fresh_state()
        state = jax.tree.map(lambda x: np.asarray(x, np.float64 if x.dtype == np.float32 else x.dtype), state)
        return one, state


def gradients(mesh, step=0):
    """(loss, gradient by name) of a batch in float64, with the initial parameters but at a step of the run."""
    one, state = in_float64(mesh)
    with jax.enable_x64():
        placed = jax.device_put(state | {'step': np.int32(step)}, one.state_shardings)
        new, metrics = one.train_step(placed, jax.device_put(random_batch(), one.batch_sharding))
        change = jax.tree.map(lambda old, new: old - np.asarray(new), state['parameters'], new['parameters'])
        return float(metrics['loss']), named(change)


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_a_step_with_dropout_is_the_same_on_every_mesh(mesh):
    (loss, expected), (other_loss, found) = gradients(ONE), gradients(mesh)
    assert other_loss == pytest.approx(loss, rel=1e-7)
    for name, gradient in expected.items():
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=1e-9 * np.abs(gradient).max(), err_msg=name)


@pytest.fixture(scope='module')
def plain():
    """A trainer with dropout and an optimizer that does nothing but follow the gradient."""
    schedule = ScheduleConfig('cosine', warmup_steps=3)
    return trainer(
        optimizer=dataclasses.replace(GRADIENT, schedule=schedule), step=dataclasses.replace(STEP, z_loss=0.5)
    )


def test_dropout_is_drawn_anew_at_every_step_and_not_in_evaluation(plain):
    batch = random_batch()
    parameters = plain.fresh_state()['parameters']
    logits = np.asarray(
        run(MODEL, parameters, batch['inputs'], positions=batch['positions'], segment_ids=batch['segment_ids']),
        np.float64,
    )
    chosen = np.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
    losses = np.log(np.exp(logits).sum(-1)) - chosen
    sums = plain.evaluation_step(parameters, batch)
    assert sums['tokens'] == batch['loss_weights'].sum() < batch['loss_weights'].size
    nll = (losses * batch['loss_weights']).sum()
    assert float(sums['nll']) == pytest.approx(nll, rel=1e-6)
    without = nll / batch['loss_weights'].sum()
    first, second = gradients(ONE)[0], gradients(ONE, step=1)[0]
    assert len({round(loss, 5) for loss in (without, first, second)}) == 3
    assert gradients(ONE)[0] == first


def test_the_metrics_of_a_step(plain):
    batch = random_batch()
    state = plain.fresh_state()
    for number in range(3):
        state, metrics = plain.train_step(state, batch)
        assert {name: (x.dtype, x.shape) for name, x in metrics.items()} == dict.fromkeys(
            ('loss', 'z_loss', 'gradient_norm', 'learning_rate', 'tokens'), (jnp.float32, ())
        )
        assert metrics['learning_rate'] == np.float32(plain.schedule(number))
        assert metrics['tokens'] == batch['loss_weights'].sum()
        if number == 0:  # logits are near zero, so that log Z is near log V
            assert float(metrics['z_loss']) == pytest.approx(0.5 * np.log(VOCABULARY) ** 2, rel=0.05)
    assert state['step'] == 3


def test_a_batch_of_padding_alone_changes_nothing_but_counters(plain):
    state = plain.fresh_state()
    before = named(state['parameters'])
    batch = random_batch()
    state, metrics = plain.train_step(state, batch | {'loss_weights': np.zeros_like(batch['loss_weights'])})
    assert (metrics['loss'], metrics['tokens'], metrics['gradient_norm']) == (0, 0, 0)
    for name, array in named(state['parameters']).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@pytest.mark.parametrize('kind', ['adamw', 'muon', 'sgd'])
def test_the_state_goes_through_a_plain_dict_and_back(kind):
    one = trainer(optimizer=OptimizerConfig(kind=kind))
    state = one.fresh_state()
    plain = one.state_dict(state)

    def is_plain(node):
        return all(map(is_plain, node.values())) if isinstance(node, dict) else isinstance(node, jax.Array)

    assert is_plain(plain)
    back = one.from_state_dict(plain)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True))


def test_sequences_longer_than_the_learned_positions():
    model = dataclasses.replace(MODEL, position='learned', max_positions=LENGTH)
    assert trainer(model=model).abstract_state['parameters']['positions']['table'].shape[0] == LENGTH
    with pytest.raises(UserError, match=f'sequences of {LENGTH + 1} tokens are longer than the {LENGTH} learned'):
        trainer(model=model, step=StepConfig(ROWS, LENGTH + 1))
