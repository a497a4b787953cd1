"""Killed at any instant, the newest committed checkpoint restores bit for bit and nothing else looks committed.

The processes that are killed come from a fork server that has imported everything already, so that they start in
milliseconds and most of their life is spent saving.
"""

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.training.checkpoints import CheckpointConfig, Checkpointer, committed_steps

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['jax', 'orbax.checkpoint', 'llm.training.checkpoints', __name__])


def state(step):
    """Two megabytes that depend on the step in every element."""
    rng = np.random.default_rng(step)
    return {
        'parameters': {'w': jnp.asarray(rng.standard_normal((400, 1000), dtype=np.float32))},
        'optimizer': {str(i): jnp.asarray(rng.integers(0, 2**16, (100, 10 + i)), jnp.uint32) for i in range(5)},
        'step': jnp.int32(step),
    }


ABSTRACT = jax.eval_shape(lambda: {**state(0)})


def assert_whole(directory, least):
    """The newest checkpoint is of step `least` or later, and it, and every other, has exactly the bits saved."""
    newest = max(committed_steps(directory), default=0)
    assert newest >= least
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        assert {path.suffix for path in directory.iterdir()} <= {''}
        for step in checkpointer.steps():
            restored = checkpointer.restore(ABSTRACT, step=step)
            assert (restored.metadata, restored.rejected) == ({'position': step}, [])
            jax.tree.map(np.testing.assert_array_equal, restored.state, state(step))
    return newest


def save_for_ever(directory, first, committed):
    """Save every step from `first` on, without a pause, and tell which are certainly committed."""
    with Checkpointer(directory, CheckpointConfig(keep_last=2)) as checkpointer:
        for step in itertools.count(first):
            checkpointer.save(step, state(step), {'position': step})
            committed.send(step - 1)  # save has waited for the one before


def test_killed_at_random_instants(tmp_path):
    rng = random.Random(0)
    newest, in_flight = 0, 0
    for _ in range(10):
        reports, reporting = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=save_for_ever, args=(tmp_path, newest + 1, reporting))
        process.start()
        reporting.close()
        least = reports.recv()  # it has begun to save
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        while reports.poll():
            try:
                least = reports.recv()
            except EOFError:
                break
        in_flight += any(path.suffix == '.partial' for path in tmp_path.iterdir())
        newest = assert_whole(tmp_path, least)
    assert newest >= 1
    # Nearly always: a checkpoint is being written all the time.
    assert in_flight >= 5


def save_and_die(directory, instant):
    """Save step 3, which lets 1 and 2 go, dying at the `instant`-th time Python touches a file below `directory`."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        # Deletion names files relative to an open directory, so the path does not tell whose they are: all count.
        changes = event in {'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir'}
        if changes or (event == 'open' and str(arguments[0]).startswith(str(directory))):
            count += 1
            if count == instant:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with Checkpointer(directory, CheckpointConfig(keep_last=1)) as checkpointer:
        checkpointer.save(3, state(3), {'position': 3})


@pytest.mark.slow
def test_killed_at_every_instant_at_which_a_file_is_touched(tmp_path):
    with Checkpointer(tmp_path / 'before', CheckpointConfig()) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), {'position': step})
    reached = []
    for instant in itertools.count(1):
        directory = shutil.copytree(tmp_path / 'before', tmp_path / str(instant))
        process = SERVER.Process(target=save_and_die, args=(directory, instant))
        process.start()
        process.join()
        reached.append(assert_whole(directory, 2))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    # First nothing new, then, from the rename on, the new one, through all of the deletion of the old ones.
    assert reached == sorted(reached)
    assert set(reached) == {2, 3}
    assert min(reached.count(2), reached.count(3)) > 20
