"""Saving and restoring: the same bits on any mesh, donation, what is kept, what does not fit."""

import json
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm.errors import UserError
from llm.training import checkpoints
from llm.training.checkpoints import CheckpointConfig, Checkpointer, restore_parameters
from llm.training.environment import environment


def make_mesh(*shape):
    names = ('a', 'b')[: len(shape)]
    return jax.make_mesh(
        shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=jax.devices()[: math.prod(shape)]
    )


def place(tree, mesh):
    """Arrays split along their first dimension over all of the mesh where that is possible, else replicated."""

    def sharding(x):
        divides = x.ndim and x.size and x.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec(mesh.axis_names) if divides else PartitionSpec())

    return jax.tree.map(lambda x: jax.device_put(x, sharding(x)), tree)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return x.shape, str(x.dtype), np.asarray(x).tobytes()


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_equal(bits(x), bits(y)), a, b)


def every_kind():
    """One array of each kind that a train state holds, with the values that careless code would change."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, (16, 24), dtype=np.uint32)
    return {
        'parameters': {
            # Every bit pattern is a value here: NaN payloads, both zeros, denormals and infinities among them.
            'float32': jnp.asarray(
                np.concatenate([anything.ravel(), [0, 1 << 31, 0x7F800000, 0xFFC12345]])
                .astype(np.uint32)
                .view(np.float32)
            ),
            'bfloat16': jax.lax.bitcast_convert_type(jnp.asarray(anything.astype(np.uint16)), jnp.bfloat16),
            'layers': {'0': {'w': jnp.asarray(rng.standard_normal((8, 3, 4), dtype=np.float32))}},
        },
        'optimizer': ({'count': jnp.int32(-7)}, None, [jnp.asarray(anything.view(np.int32))], {}),
        'step': jnp.uint32(2**32 - 1),
        'scale': jnp.float32(-0.0),
        'flag': jnp.asarray([True, False]),
        'key': jax.random.key(5),
        'keys': jax.random.split(jax.random.key(6), 8),
        'key_data': jax.random.key_data(jax.random.key(7)),
        'nothing': jnp.zeros((8, 0), jnp.float32),
    }


@pytest.fixture
def checkpointer(tmp_path):
    with Checkpointer(tmp_path / 'checkpoints', CheckpointConfig()) as it:
        yield it


@pytest.mark.parametrize('target', [(8,), (2, 4), (1,)], ids=str)
@pytest.mark.parametrize('source', [(8,), (2, 4), (1,)], ids=str)
def test_every_mesh_gives_back_the_same_bits_on_every_other(checkpointer, source, target):
    state = place(every_kind(), make_mesh(*source))
    checkpointer.save(1, state, {})
    wanted = abstract(place(every_kind(), make_mesh(*target)))
    restored = checkpointer.restore(wanted)
    assert_same_bits(restored.state, state)
    for x, y in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_what_was_saved_comes_back_with_it(checkpointer):
    metadata = {'position': {'epoch': 2, 'index': 2**53 + 1}, 'rate': 0.1 + 0.2, 'note': 'naïve\n'}
    checkpointer.save(3, every_kind(), metadata, {'validation/loss': 2.5, 'worst': math.nan})
    restored = checkpointer.restore(abstract(every_kind()))
    assert (restored.step, restored.rejected) == (3, [])
    assert restored.metadata == metadata
    assert restored.metrics['validation/loss'] == 2.5
    assert math.isnan(restored.metrics['worst'])
    assert restored.environment == environment()
    assert restored.path == checkpointer.directory / 'step_000000003'


def test_arrays_without_a_sharding_go_to_one_device(checkpointer):
    checkpointer.save(1, place(every_kind(), make_mesh(8)), {})
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), every_kind())
    state = checkpointer.restore(wanted).state
    assert_same_bits(state, every_kind())
    assert {x.sharding.num_devices for x in jax.tree.leaves(state)} == {1}


@pytest.mark.parametrize('shape', [(8,), (1,)], ids=str)
def test_buffers_may_be_donated_as_soon_as_save_returns(checkpointer, shape):
    mesh = make_mesh(*shape)

    def fresh():
        tree = {
            'big': jnp.arange(2_000_000, dtype=jnp.float32).reshape(8, -1),
            'small': jnp.arange(8),
            'n': jnp.int32(1),
        }
        return place(tree, mesh)

    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    # Without a save, the donated buffers are really overwritten: the test below would notice.
    state = jax.block_until_ready(fresh())
    before = [shard.data.unsafe_buffer_pointer() for shard in state['big'].addressable_shards]
    after = step(state)
    assert state['big'].is_deleted()
    assert [shard.data.unsafe_buffer_pointer() for shard in after['big'].addressable_shards] == before

    for number in (1, 2):
        state = jax.block_until_ready(fresh())
        expected = jax.tree.map(np.array, state)
        checkpointer.save(number, state, {})
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        restored = checkpointer.restore(abstract(state)).state
        assert_same_bits(restored, place(expected, mesh))


def test_restored_arrays_may_be_donated(checkpointer):
    checkpointer.save(1, every_kind()['parameters'], {})
    state = checkpointer.restore(abstract(every_kind()['parameters'])).state
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)(state)
    assert_same_bits(doubled, jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree))(every_kind()['parameters']))
    assert_same_bits(checkpointer.restore(abstract(every_kind()['parameters'])).state, every_kind()['parameters'])


def test_save_returns_before_the_files_are_committed(tmp_path):
    state = {'x': jnp.arange(4_000_000, dtype=jnp.float32)}
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, state, {})
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith('checkpoint')]
        checkpointer.wait()
        assert checkpointer.latest_step() == 1
    with Checkpointer(tmp_path, CheckpointConfig(asynchronous=False)) as checkpointer:
        checkpointer.restore(abstract(state))
        checkpointer.save(2, state, {})
        assert checkpointer.steps() == [1, 2]


def test_keep_last_best_and_every(tmp_path):
    config = CheckpointConfig(keep_last=2, keep_best=2, best_metric='loss', keep_every=4, asynchronous=False)
    losses = {1: 9.0, 2: 1.0, 3: 5.0, 4: 4.0, 5: 6.0, 6: math.nan, 7: 3.0, 8: 7.0, 9: 8.0, 10: 8.5}
    with Checkpointer(tmp_path, config) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, {'x': jnp.int32(step)}, {}, {'loss': loss} if step != 9 else None)
        assert checkpointer.steps() == [2, 4, 7, 8, 9, 10]
    # What was best is remembered by a new process.
    with Checkpointer(tmp_path, config) as checkpointer:
        checkpointer.save(11, {'x': jnp.int32(11)}, {}, {'loss': 0.5})
        assert checkpointer.steps() == [2, 4, 8, 10, 11]


def test_a_step_is_saved_once_and_never_beside_later_ones(tmp_path):
    state = {'x': jnp.int32(1)}
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        assert checkpointer.save(5, state, {})
        assert not checkpointer.save(5, {'x': jnp.int32(2)}, {})
        assert checkpointer.restore(abstract(state)).state['x'] == 1
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        for step in (4, 5):
            with pytest.raises(UserError, match=rf'step {step} cannot be saved beside .* later steps: \[5\]'):
                checkpointer.save(step, state, {})
        assert sorted(path.name for path in tmp_path.iterdir()) == ['step_000000005']


def test_a_chosen_step(checkpointer):
    for step in (1, 2):
        checkpointer.save(step, {'x': jnp.int32(step)}, {})
    assert checkpointer.restore({'x': jax.ShapeDtypeStruct((), jnp.int32)}, step=1).state['x'] == 1
    with pytest.raises(UserError, match=r'no checkpoint of step 3.*\[1, 2\]'):
        checkpointer.restore({'x': jax.ShapeDtypeStruct((), jnp.int32)}, step=3)


def test_an_empty_directory_has_no_checkpoint(checkpointer):
    assert checkpointer.latest_step() is None
    assert checkpointer.steps() == []
    with pytest.raises(UserError, match='there is no checkpoint'):
        checkpointer.restore({'x': jax.ShapeDtypeStruct((), jnp.int32)})


@pytest.mark.parametrize(
    ('change', 'complaint'),
    [
        ({'w': ((4, 9), 'float32')}, r'layer/w is float32\[4, 8\] in the checkpoint, expected float32\[4, 9\]'),
        ({'w': ((4, 8), 'bfloat16')}, r'layer/w is float32\[4, 8\] in the checkpoint, expected bfloat16\[4, 8\]'),
        ({'v': ((3,), 'int32')}, r'layer/v is not in the checkpoint, expected int32\[3\]'),
        ({'b': None}, r'layer/b int32\[\] is in the checkpoint and not expected'),
    ],
)
def test_a_state_that_does_not_fit_is_named(checkpointer, change, complaint):
    checkpointer.save(1, {'layer': {'w': jnp.ones((4, 8)), 'b': jnp.int32(1)}}, {})
    wanted = {'w': ((4, 8), 'float32'), 'b': ((), 'int32')} | change
    structs = {name: jax.ShapeDtypeStruct(*value) for name, value in wanted.items() if value}
    with pytest.raises(UserError, match=complaint):
        checkpointer.restore({'layer': structs})


@pytest.mark.parametrize('where', ['', 'checkpoints', 'checkpoints/step_000000002'])
def test_parameters_alone_from_another_run_on_another_mesh(tmp_path, where):
    parameters = {'layers': {'0': {'w': jax.random.normal(jax.random.key(0), (16, 8))}}, 'b': jnp.arange(8.0)}
    with Checkpointer(tmp_path / 'checkpoints', CheckpointConfig()) as checkpointer:
        for step in (1, 2):
            state = {'parameters': jax.tree.map(lambda x: x * step, parameters), 'optimizer': {'m': jnp.ones(5)}}  # noqa: B023
            checkpointer.save(step, place(state, make_mesh(8)), {'vocabulary': 'abc'})
    expected = jax.tree.map(lambda x: x * 2, parameters)
    restored = restore_parameters(tmp_path / where, abstract(place(parameters, make_mesh(2, 2))))
    assert (restored.step, restored.metadata) == (2, {'vocabulary': 'abc'})
    assert_same_bits(restored.state, expected)
    assert restored.state['b'].sharding.mesh.shape == {'a': 2, 'b': 2}
    # Another float type: rounded once, as astype rounds.
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), parameters)
    assert_same_bits(
        restore_parameters(tmp_path / where, half).state, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
    )


def test_parameters_that_do_not_fit_are_named(tmp_path):
    with Checkpointer(tmp_path / 'checkpoints', CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {'parameters': {'w': jnp.ones((4, 8)), 'b': jnp.ones(3)}, 'step': jnp.int32(1)}, {})
    with pytest.raises(UserError) as caught:
        restore_parameters(
            tmp_path, {'w': jax.ShapeDtypeStruct((4, 6), jnp.float32), 'c': jax.ShapeDtypeStruct((), jnp.int32)}
        )
    text = str(caught.value)
    assert 'parameters/w is float32[4, 8] in the checkpoint, expected float32[4, 6]' in text
    assert 'parameters/c is not in the checkpoint, expected int32[]' in text
    assert 'parameters/b float32[3] is in the checkpoint and not expected' in text
    assert 'step' not in text.replace('step_000000001', '')
    integers = {'w': jax.ShapeDtypeStruct((4, 8), jnp.int32), 'b': jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(UserError, match='parameters/w is float32'):
        restore_parameters(tmp_path, integers)


def test_no_parameters_where_there_is_no_run(tmp_path):
    for path in (tmp_path, tmp_path / 'absent', tmp_path / 'step_000000001'):
        with pytest.raises(UserError, match='there is no checkpoint'):
            restore_parameters(path, {})


def test_what_cannot_be_saved_is_refused_before_anything_is_written(checkpointer):
    for state in ({'x': 1.0}, {'x': np.ones(3)}, {'x': {'y': 'text'}}):
        with pytest.raises(TypeError, match='not a jax array'):
            checkpointer.save(1, state, {})
    with pytest.raises(TypeError, match='JSON'):
        checkpointer.save(1, {'x': jnp.ones(3)}, {'bad': {1, 2}})
    # On disk the keys are joined by dots: one of these would overwrite the other.
    with pytest.raises(ValueError, match=r'a\.b'):
        checkpointer.save(1, {'a.b': jnp.ones(3), 'a': {'b': jnp.zeros(3)}}, {})
    assert list(checkpointer.directory.iterdir()) == []


def test_leftovers_of_killed_saves_and_deletions_are_removed_at_start(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {'x': jnp.int32(1)}, {})
    for name in ('step_000000002.partial', 'step_000000000.deleting'):
        (tmp_path / name / 'state').mkdir(parents=True)
        (tmp_path / name / 'COMMITTED').write_text('anything')
    (tmp_path / 'notes.partial').write_text('not ours')
    assert checkpoints.committed_steps(tmp_path) == [1]
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        assert checkpointer.steps() == [1]
        assert sorted(path.name for path in tmp_path.iterdir()) == ['notes.partial', 'step_000000001']


def test_a_change_of_environment_is_warned_about(checkpointer, capsys):
    checkpointer.save(1, place({'x': jnp.arange(8.0)}, make_mesh(8)), {})
    checkpointer.restore(abstract(place({'x': jnp.arange(8.0)}, make_mesh(8))))
    assert capsys.readouterr().err == ''
    checkpointer.restore(abstract(place({'x': jnp.arange(8.0)}, make_mesh(2, 4))))
    assert "mesh was {'a': 8}, is {'a': 2, 'b': 4}" in capsys.readouterr().err


def test_a_bucket_is_refused():
    with pytest.raises(UserError, match='rename a directory'):
        Checkpointer('gs://bucket/run', CheckpointConfig())


@pytest.mark.parametrize(
    'values',
    [
        {'keep_last': 0},
        {'save_every': 0},
        {'keep_best': -1},
        {'keep_every': 0},
        {'keep_best': 1},
        {'best_mode': 'least'},
        {'on_full_disk': 'ignore'},
    ],
    ids=json.dumps,
)
def test_a_config_that_makes_no_sense_is_refused(values):
    with pytest.raises(UserError, match=f'CheckpointConfig.{next(iter(values))}'):
        CheckpointConfig(**values)


def test_best_by_the_largest_value():
    config = CheckpointConfig(keep_last=1, keep_best=2, best_metric='accuracy', best_mode='max')
    metrics = {step: {'accuracy': value} for step, value in {1: 0.9, 2: 0.5, 3: 0.9, 4: 0.9, 5: 0.1}.items()}
    assert config.expired(metrics) == [2, 4]
    assert [step for step in range(9) if CheckpointConfig(save_every=4).is_due(step)] == [0, 4, 8]
