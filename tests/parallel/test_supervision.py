"""The process that watches over one of a run: what it passes on, what it says, and that none outlives the other."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.parallel.real_processes import ROOT

SUPERVISE = """
import sys
from llm.parallel.processes import Processes
from llm.parallel.supervision import supervise
code = "import os, sys, time, signal, llm.parallel.supervision as s; s.is_supervised()\\n" + sys.argv[2]
sys.exit(supervise([sys.executable, '-c', code], Processes('localhost:8476', 4, int(sys.argv[1]))))
"""


def start(code: str, process_id: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, '-c', SUPERVISE, str(process_id), code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )


def finish(code: str, process_id: int = 0) -> tuple[int, str, str]:
    process = start(code, process_id)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# As JAX 0.10 and 0.12 write them, shortened.
PREFIX = 'E1124 08:45:57.333260   22652 coordination_service_agent.cc:289] Polled an error from coordination service.\n'
FATAL = (
    'F1124 08:45:57.333441   22652 client.h:80] Terminating process because the JAX distributed service detected fatal '
    'errors. absl::Status: '
)
UNHEALTHY = (
    'UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\nThe tasks have crashed.\n'
)
STACK = '*** Check failure stack trace: ***\n    @     0x7fd868a40634  absl::lts::LogMessage::SendToLog()\n'
AGAIN = 'This process stops too. Start all of them again: the run goes on from its last checkpoint.\n'


@pytest.mark.parametrize(
    ('status', 'process_id', 'line'),
    [
        (UNHEALTHY.format(1), 0, f'process 1 of 4 was lost: no sign of life for 100 s. {AGAIN}'),
        (UNHEALTHY.format('1\n3'), 2, f'process 1, 3 of 4 was lost: no sign of life for 100 s. {AGAIN}'),
        (
            UNHEALTHY.format(2),
            2,
            f'the others gave this process, 2 of 4, up: its signs of life did not reach process 0. {AGAIN}',
        ),
        (
            'UNAVAILABLE: Failed to send RPC to coordination service.\n',
            3,
            'process 0 of 4, which holds the run together, has ended or cannot be reached; its output says why. '
            + AGAIN,
        ),
        (
            'INVALID_ARGUMENT: Unexpected task registered with task=7\n\nRPC: /x/RegisterTask\n',
            3,
            'process 3 of 4 was refused by the coordinator at localhost:8476: INVALID_ARGUMENT: Unexpected task '
            'registered with task=7\n',
        ),
    ],
)
def test_a_page_of_log_becomes_a_line(status, process_id, line):
    code = f'sys.stderr.write("before\\n" + {PREFIX + FATAL + status + STACK!r}); sys.stderr.flush(); os.abort()'
    assert finish(code, process_id) == (75, '', f'before\nerror: {line}')


def test_other_ends_are_passed_on_as_they_are():
    assert finish('print("out"); print("err", file=sys.stderr); sys.exit(3)') == (3, 'out\n', 'err\n')
    # Only process 0 has a standard output.
    assert finish('print("out"); print("err", file=sys.stderr)', 1) == (0, '', 'err\n')
    # The same words from a process that ends otherwise are nobody's last.
    code, _, err = finish(f'sys.stderr.write({PREFIX + FATAL + STACK!r}); sys.exit(1)')
    assert (code, err) == (1, PREFIX + FATAL + STACK)
    code, _, err = finish(f'sys.stderr.write({PREFIX!r} + "Error, unfinished"); sys.stderr.flush(); os.abort()')
    assert (code, err) == (134, PREFIX + 'Error, unfinishederror: process 0 of 4 was ended by SIGABRT\n')


def test_a_killed_process_is_told_of():
    line = 'error: process 2 of 4 was ended by SIGKILL. If nobody did that, memory ran out\n'
    assert finish('os.kill(os.getpid(), signal.SIGKILL)', 2) == (137, '', line)


def test_what_a_process_says_is_passed_on_at_once():
    process = start('print("step 1\\n  50%", end="", file=sys.stderr, flush=True); time.sleep(600)')
    try:
        assert process.stderr.read(len('step 1\n  50%')) == 'step 1\n  50%'
    finally:
        process.kill()
        process.communicate(timeout=120)


def test_words_of_a_process_that_lives_on_are_not_kept_back():
    process = start(f'sys.stderr.write({PREFIX!r}); sys.stderr.flush(); time.sleep(600)')
    try:
        assert process.stderr.read(len(PREFIX)) == PREFIX
    finally:
        process.kill()
        process.communicate(timeout=120)


def test_signals_are_passed_on():
    code = """
got = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: (got.append(number), print(number, flush=True)))
print('ready', flush=True)
while len(got) < 2:
    time.sleep(0.05)
"""
    process = start(code)
    assert process.stdout.readline() == 'ready\n'
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        assert process.stdout.readline() == f'{int(number)}\n'
    process.communicate(timeout=120)
    assert process.returncode == 0


def test_the_process_dies_with_its_supervisor():
    process = start('print(os.getpid(), flush=True); time.sleep(600)')
    child = psutil.Process(int(process.stdout.readline()))
    process.kill()
    process.communicate(timeout=120)
    child.wait(timeout=120)  # raises if it is still there
    assert not child.is_running()


def test_children_of_the_process_do_not_take_themselves_for_supervised():
    code = 'import subprocess; print(subprocess.run(["env"], capture_output=True, text=True).stdout)'
    code, out, _ = finish(code)
    assert code == 0
    assert 'JAX_PROCESS_ID=0\n' in out
    assert 'LLM_SUPERVISOR' not in out
    assert 'LLM_SUPERVISOR' not in os.environ
