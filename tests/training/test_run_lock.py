"""One process per run directory; the kernel lets the lock go whatever becomes of its holder."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from llm.errors import UserError
from llm.training.run_lock import RunLock


def start(directory, program):
    """A Python process that has run `program` up to its line of output."""
    program = f'import sys, os, time\nfrom llm.training.run_lock import RunLock\nrun = {str(directory)!r}\n' + program
    process = subprocess.Popen([sys.executable, '-c', textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().split()


HOLD = 'RunLock(run).acquire(); print("held", os.getpid(), flush=True); time.sleep(600)'


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    process, (_, pid) = start(tmp_path / 'run', 'lock = ' + HOLD)
    try:
        with pytest.raises(UserError, match='another process is using this run directory') as caught:
            RunLock(tmp_path / 'run').acquire()
        assert f'pid {pid} on host {socket.gethostname()}, since 20' in str(caught.value)
        assert str(tmp_path / 'run') in str(caught.value)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    with RunLock(tmp_path / 'run') as lock:
        text = lock.path.read_text()
        assert re.fullmatch(rf'{{"pid": {os.getpid()}, "host": "{socket.gethostname()}", "started": ".*"}}\n', text)


def test_the_lock_does_not_outlive_its_holder_in_forked_workers(tmp_path):
    fork = """
        lock = RunLock(run).acquire()
        reading, writing = os.pipe()
        worker = os.fork()
        if not worker:
            os.write(writing, b'.')
            time.sleep(600)
        os.read(reading, 1)  # the worker is past fork: it has let go of what it inherited
        print(worker, flush=True)
        time.sleep(600)
    """
    process, (worker,) = start(tmp_path, textwrap.dedent(fork))
    try:
        with pytest.raises(UserError):
            RunLock(tmp_path).acquire()
        process.kill()
        process.wait()
        RunLock(tmp_path).acquire().release()
    finally:
        process.kill()
        process.wait()
        os.kill(int(worker), signal.SIGKILL)


def test_a_forked_worker_that_ends_leaves_the_lock_with_its_parent(tmp_path):
    fork = """
        lock = RunLock(run).acquire()
        worker = os.fork()
        if not worker:
            os._exit(0)
        os.waitpid(worker, 0)
        print('ended', flush=True)
        time.sleep(600)
    """
    process, _ = start(tmp_path, textwrap.dedent(fork))
    try:
        with pytest.raises(UserError):
            RunLock(tmp_path).acquire()
    finally:
        process.kill()
        process.wait()


def test_two_locks_in_one_process_exclude_each_other(tmp_path):
    with RunLock(tmp_path), pytest.raises(UserError, match=f'pid {os.getpid()}'):
        RunLock(tmp_path).acquire()
    lock = RunLock(tmp_path).acquire()
    with pytest.raises(RuntimeError, match='already locked'):
        lock.acquire()
    lock.release()
    lock.release()
    RunLock(tmp_path).acquire().release()


def test_the_lock_goes_when_an_error_leaves_its_block(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLock(tmp_path):
        raise ZeroDivisionError
    RunLock(tmp_path).acquire().release()


@pytest.mark.parametrize('content', [b'', b'{"pid": 12', b'\xff\xfe', b'{}'], ids=repr)
def test_a_file_left_behind_means_nothing_and_an_unreadable_one_still_refuses(tmp_path, content):
    path = tmp_path / 'run.lock'
    path.write_bytes(content)
    RunLock(tmp_path).acquire().release()
    with open(path, 'r+b') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        path.write_bytes(content)
        with pytest.raises(UserError, match='pid unknown'):
            RunLock(tmp_path).acquire()


def test_a_directory_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='file: is a file'):
        RunLock(tmp_path / 'file' / 'run').acquire()
    (tmp_path / 'run.lock').mkdir()
    with pytest.raises(UserError, match='cannot lock: Is a directory'):
        RunLock(tmp_path).acquire()
