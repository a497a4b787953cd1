"""Whatever happens to any file of a checkpoint is noticed and named, and the checkpoint before is used."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.training.checkpoints import CheckpointConfig, Checkpointer, restore_parameters
from llm.training.checkpoints.directory import step_path
from llm.training.checkpoints.manifest import find_damage


def state(step):
    return {
        'parameters': {'w': jnp.full((32, 16), step, jnp.float32), 'b': jnp.arange(5) + step},
        'key': jax.random.key(step),
        'step': jnp.int32(step),
    }


ABSTRACT = jax.eval_shape(lambda: state(0))


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    """A run with checkpoints of steps 1, 2 and 3; tests damage a copy."""
    directory = tmp_path_factory.mktemp('run') / 'checkpoints'
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state(step), {'position': step})
    return directory


@pytest.fixture
def run(original, tmp_path):
    return shutil.copytree(original, tmp_path / 'checkpoints')


def files(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob('*') if file.is_file())


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b'')


def append(file):
    file.write_bytes(file.read_bytes() + b'\0')


def assert_restores(run, step, *named):
    """Restoring takes `step` and names each of `named`, a file of a newer checkpoint, in exactly one line."""
    with Checkpointer(run, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore(ABSTRACT)
    assert restored.step == step
    assert restored.metadata == {'position': step}
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(
            *(jax.random.key_data(z) if z.dtype == ABSTRACT['key'].dtype else z for z in (x, y))
        ),
        restored.state,
        state(step),
    )
    for file in named:
        assert [line.split()[0] for line in restored.rejected].count(file) == 1, restored.rejected
    assert len(restored.rejected) == len(named)


def test_a_checkpoint_has_the_files_we_think(original):
    names = files(step_path(original, 3))
    assert {'COMMITTED', 'manifest_00000.json', 'metadata.json', 'state/_METADATA', 'state/manifest.ocdbt'} < set(names)
    assert any(name.startswith('state/ocdbt.process_0/d/') for name in names)
    assert find_damage(step_path(original, 3), 3) == []


def test_damage_to_every_file_is_named_and_the_checkpoint_before_is_used(run, capsys):
    newest = step_path(run, 3)
    rng = np.random.default_rng(0)
    for name in files(newest):
        file = newest / name
        good = file.read_bytes()
        bits = {0, 8 * len(good) - 1, *(int(bit) for bit in rng.integers(0, 8 * len(good), 3))}
        for damage in [lambda file, bit=bit: flip(file, bit) for bit in bits] + [
            truncate,
            empty,
            append,
            type(file).unlink,
        ]:
            damage(file)
            problems = find_damage(newest, 3)
            assert len(problems) == 1, problems
            assert problems[0].startswith(f'{name} ')
            file.write_bytes(good)
        # The whole way for one kind of damage.
        flip(file, 4 * len(good))
        assert_restores(run, 2, f'step_000000003/{name}')
        assert f'step_000000003/{name}' in capsys.readouterr().err
        file.write_bytes(good)
    assert_restores(run, 3)
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('name', ['COMMITTED', 'manifest_00000.json'])
def test_every_single_bit_of_the_marker_and_the_manifest_counts(run, name):
    file = step_path(run, 3) / name
    good = file.read_bytes()
    # Every bit of the marker; every 29th of the manifest, which is ten times longer.
    for bit in range(0, 8 * len(good), 1 if name == 'COMMITTED' else 29):
        flip(file, bit)
        assert [problem.split()[0] for problem in find_damage(step_path(run, 3), 3)] == [name]
        file.write_bytes(good)


def test_extra_files_are_named(run):
    for name in ('extra', 'state/d/extra', 'state/ocdbt.process_0/d/' + '0' * 32, 'manifest_00001.json', '.hidden'):
        file = step_path(run, 3) / name
        file.write_bytes(b'')
        assert_restores(run, 2, f'step_000000003/{name}')
        file.unlink()
    assert_restores(run, 3)


def test_files_of_another_checkpoint_do_not_pass(run):
    # Each file is whole, but not the one of this checkpoint.
    for name in ('metadata.json', 'state/_METADATA', 'manifest_00000.json', 'COMMITTED'):
        file = step_path(run, 3) / name
        good = file.read_bytes()
        other = (step_path(run, 2) / name).read_bytes()
        file.write_bytes(other)
        if other != good:
            assert_restores(run, 2, f'step_000000003/{name}')
        file.write_bytes(good)
    shutil.rmtree(step_path(run, 3))
    shutil.copytree(step_path(run, 2), step_path(run, 3))
    assert_restores(run, 2, 'step_000000003/COMMITTED')


def test_several_damaged_files_of_several_checkpoints_are_all_named(run):
    flip(step_path(run, 3) / 'metadata.json', 100)
    truncate(step_path(run, 3) / 'state/_METADATA')
    (step_path(run, 2) / 'state/manifest.ocdbt').unlink()
    named = ('step_000000003/metadata.json', 'step_000000003/state/_METADATA', 'step_000000002/state/manifest.ocdbt')
    assert_restores(run, 1, *named)


def test_a_directory_of_which_nothing_is_left_is_damage_not_a_fresh_start(run):
    for step in (2, 3):
        shutil.rmtree(step_path(run, step))
        step_path(run, step).mkdir()
    assert_restores(run, 1, 'step_000000002/COMMITTED', 'step_000000003/COMMITTED')


def test_with_no_whole_checkpoint_left_nothing_starts_over(run):
    for step in (1, 2, 3):
        flip(step_path(run, step) / 'state/_METADATA', 7)
    with Checkpointer(run, CheckpointConfig()) as checkpointer:
        assert checkpointer.latest_step() == 3
        with pytest.raises(UserError, match='no checkpoint is whole') as caught:
            checkpointer.restore(ABSTRACT)
    for step in (1, 2, 3):
        assert f'step_00000000{step}/state/_METADATA' in str(caught.value)
    assert [path.name for path in sorted(run.iterdir())] == [f'step_00000000{step}' for step in (1, 2, 3)]


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(run):
    flip(step_path(run, 3) / 'state/_METADATA', 7)
    with (
        Checkpointer(run, CheckpointConfig()) as checkpointer,
        pytest.raises(UserError, match='step_000000003/state/_M'),
    ):
        checkpointer.restore(ABSTRACT, step=3)
    with pytest.raises(UserError, match='step_000000003/state/_METADATA'):
        restore_parameters(step_path(run, 3), ABSTRACT['parameters'])
    assert restore_parameters(run, ABSTRACT['parameters']).step == 2


def test_a_damaged_checkpoint_counts_for_nothing_and_is_replaced_by_the_resumed_run(run):
    for step in (2, 3):
        truncate(step_path(run, step) / 'state/_METADATA')
    with Checkpointer(run, CheckpointConfig(keep_last=1)) as checkpointer:
        assert checkpointer.restore(ABSTRACT).step == 1
        assert checkpointer.steps() == [1]
        # Until something newer is committed nothing is deleted.
        assert [path.name for path in sorted(run.iterdir())] == [f'step_00000000{step}' for step in (1, 2, 3)]
        checkpointer.save(2, state(2), {'position': 2})
        checkpointer.wait()
        assert [path.name for path in run.iterdir()] == ['step_000000002']
    assert_restores(run, 2)


def test_a_damaged_checkpoint_of_a_later_step_does_not_outlive_the_next_save(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        for step in (1, 2, 9):
            checkpointer.save(step, state(step), {'position': step})
    truncate(step_path(tmp_path, 9) / 'state/_METADATA')
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=2)) as checkpointer:
        assert checkpointer.restore(ABSTRACT).step == 2
        checkpointer.save(3, state(3), {'position': 3})
        checkpointer.wait()
        assert checkpointer.steps() == [2, 3]
    # Were it still there, a restart would look at it first, and keep_last would have counted it.
    assert sorted(path.name for path in tmp_path.iterdir()) == ['step_000000002', 'step_000000003']
