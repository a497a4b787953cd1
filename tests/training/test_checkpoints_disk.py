"""A full disk and missing permissions: said clearly, nothing good lost, and the run stops or goes on as set."""

import contextlib
import os
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.training.checkpoints import CheckpointConfig, Checkpointer

NOBODY = 65534


def state(step):
    """Half a megabyte in one array and in many, so that different files are the ones to hit the limit."""
    many = {str(i): jnp.full((i + 1, 100), step, jnp.float32) for i in range(40)}
    return {'big': jax.random.normal(jax.random.key(step), (60, 1000)), 'many': many}


ABSTRACT = jax.eval_shape(lambda: state(0))


@contextlib.contextmanager
def largest_file(size):
    """Within this context no file can grow beyond `size` bytes: writes fail with EFBIG, by the kernel."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def small_disk(directory, size):
    """Within this context `directory` is a file system of `size` bytes.

    Yields a context manager: within `only(n)`, n bytes are left; without the right to mount, n / 3 to each file.
    """
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield lambda free: largest_file(free // 3)
        return

    @contextlib.contextmanager
    def only(free):
        filler = directory / 'filler'
        with open(filler, 'wb') as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(directory).free - free)
        try:
            yield
        finally:
            filler.unlink()

    try:
        yield only
    finally:
        subprocess.run(['umount', '--lazy', str(directory)], check=True)


@contextlib.contextmanager
def as_nobody():
    """Within this context root's privilege to write everywhere is laid down, if there is any."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)


def assert_holds(directory, steps):
    """Exactly these checkpoints, the newest with its bits, and nothing else."""
    assert sorted(path.name for path in directory.iterdir()) == [f'step_{step:09d}' for step in steps]
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore(ABSTRACT)
    assert (restored.step, restored.rejected) == (steps[-1], [])
    jax.tree.map(np.testing.assert_array_equal, restored.state, state(steps[-1]))


@pytest.mark.parametrize('asynchronous', [True, False], ids=['asynchronous', 'synchronous'])
@pytest.mark.parametrize('size', [0, 100, 500, 2_000, 30_000, 200_000])
def test_a_save_without_space_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path, size, asynchronous, capfd):
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1, asynchronous=asynchronous)) as checkpointer:
        checkpointer.save(1, state(1), {})
        checkpointer.wait()
        with pytest.raises(UserError, match='step 2 was not saved: the disk is full') as caught, largest_file(size):
            checkpointer.save(2, state(2), {})
            checkpointer.wait()
        assert str(tmp_path) in str(caught.value)
        assert_holds(tmp_path, [1])
        # The object is as good as new: with space again, the same step is saved.
        checkpointer.save(2, state(2), {})
    assert_holds(tmp_path, [2])
    # One line for the person, from whoever catches the error, and no tracebacks beside it.
    assert 'Traceback' not in capfd.readouterr().err


def test_a_failed_save_in_the_background_surfaces_at_the_next_call(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    with largest_file(200_000):
        checkpointer.save(1, state(1), {})
        checkpointer._thread.join()
    with pytest.raises(UserError, match='step 1 was not saved'):
        checkpointer.check()
    checkpointer.check()
    with largest_file(200_000):
        checkpointer.save(2, state(2), {})
        checkpointer._thread.join()
    with pytest.raises(UserError, match='step 2 was not saved'):
        checkpointer.save(3, state(3), {})
    with largest_file(200_000):
        checkpointer.save(4, state(4), {})
        checkpointer._thread.join()
    with pytest.raises(UserError, match='step 4 was not saved'):
        checkpointer.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('size', [0, 2_000, 200_000])
def test_a_run_set_to_continue_goes_on_and_says_so(tmp_path, size, capsys):
    with Checkpointer(tmp_path, CheckpointConfig(on_full_disk='continue')) as checkpointer:
        checkpointer.save(1, state(1), {})
        checkpointer.wait()
        with largest_file(size):
            for step in (2, 3):
                checkpointer.save(step, state(step), {})
            checkpointer.wait()
        printed = capsys.readouterr().err
        for step in (2, 3):
            assert f'step {step} was not saved: the disk is full' in printed
        assert printed.count('the newest checkpoint is that of step 1') == 2
        assert_holds(tmp_path, [1])
        checkpointer.save(4, state(4), {})
    assert_holds(tmp_path, [1, 4])


def test_a_disk_that_fills_up_at_any_point_of_a_save(tmp_path, capfd):
    outcomes = []
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(ABSTRACT))
    config = CheckpointConfig(keep_last=1)
    with small_disk(tmp_path, 4 * size) as only, Checkpointer(tmp_path / 'checkpoints', config) as checkpointer:
        checkpointer.save(1, state(1), {})
        checkpointer.wait()
        # From not worth beginning to about enough, in steps of a few pages.
        for free in range(size - 16384, size + 120_000, 12288):
            try:
                with only(free):
                    checkpointer.save(2, state(2), {})
                    checkpointer.wait()
                break
            except UserError as error:
                assert 'step 2 was not saved: the disk is full' in str(error)
                outcomes.append('refused' if 'needed' in str(error) else 'failed')
            assert_holds(tmp_path / 'checkpoints', [1])
        checkpointer.save(2, state(2), {})
        checkpointer.wait()
        assert_holds(tmp_path / 'checkpoints', [2])
    assert 'failed' in outcomes
    assert 'Traceback' not in capfd.readouterr().err


def test_an_error_of_the_run_is_not_hidden_by_a_failing_save(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        largest_file(200_000),
        Checkpointer(tmp_path, CheckpointConfig()) as checkpointer,
    ):
        checkpointer.save(1, state(1), {})
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_save_in_flight_when_the_run_fails_is_finished(tmp_path):
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, state(1), {})
        raise ZeroDivisionError
    assert_holds(tmp_path, [1])


def test_a_directory_without_permission(tmp_path):
    locked = tmp_path / 'locked'
    locked.mkdir()
    locked.chmod(0o555)
    tmp_path.chmod(0o755)
    with as_nobody(), pytest.raises(UserError, match='Permission denied') as caught:
        Checkpointer(locked / 'checkpoints', CheckpointConfig())
    assert str(locked / 'checkpoints') in str(caught.value)


def test_permission_lost_while_running(tmp_path):
    for path in [tmp_path, *tmp_path.parents][:3]:
        path.chmod(path.stat().st_mode | 0o055)
    with Checkpointer(tmp_path, CheckpointConfig(on_full_disk='continue')) as checkpointer:
        checkpointer.save(1, state(1), {})
        checkpointer.wait()
        tmp_path.chmod(0o555)
        # Not a matter of space: on_full_disk does not excuse it.
        with as_nobody(), pytest.raises(UserError, match='step 2 was not saved: Permission denied'):
            checkpointer.save(2, state(2), {})
        tmp_path.chmod(0o755)
        checkpointer.save(2, state(2), {})
    assert_holds(tmp_path, [1, 2])


def test_a_file_where_the_directory_should_be(tmp_path):
    (tmp_path / 'checkpoints').write_text('')
    with pytest.raises(UserError, match='File exists'):
        Checkpointer(tmp_path / 'checkpoints', CheckpointConfig())
