"""A process that watches over one process of a run, and says in a line why it ended where JAX would abort it.

When a process of a run is lost, or does not come in time, JAX's coordination service ends the others from a thread of
its own, with SIGABRT and a page of log that no Python code can prevent. So a process of many is the child of a small
one, which passes its output and signals on, and turns that page into one line and an exit code.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from llm.errors import TRY_AGAIN
from llm.parallel.processes import Processes

_SUPERVISOR = 'LLM_SUPERVISOR'  # a pipe that ends when the supervisor does
# The lines in which JAX's coordination service takes leave, and what its last line says.
_LAST_WORDS = re.compile(
    rb'[WEF]\d{4} \S+ +\d+ (coordination_service(_agent)?|preemption_sync_manager|client)\.(cc|h):\d+\]'
)
_TERMINATING = b'JAX distributed service detected fatal errors'
_UNHEALTHY = re.compile(rb'unhealthy \(stopped sending heartbeats\)[^\n]*\n((?:[^\n]*?\d+\n)+)')
# A process that logs such lines and lives on has had no leave to take: then they are passed on.
_HOLD_SECONDS = 10.0
_POLL_SECONDS = 0.2


def is_supervised() -> bool:
    """Whether this process is the child of `supervise`. If so, it ends when its supervisor has died."""
    pipe = os.environ.pop(_SUPERVISOR, None)  # not for the children of this process
    if pipe is None:
        return False

    def die_with_supervisor() -> None:
        os.read(int(pipe), 1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=die_with_supervisor, name='supervisor', daemon=True).start()
    return True


def supervise(command: Sequence[str], processes: Processes) -> int:
    """Run `command` as process `process_id` of the run, and return its exit code.

    SIGTERM and SIGINT are passed on. Of processes other than 0 only standard error is shown.

    Returns:
        The command's own code; TRY_AGAIN, if another process was lost or did not join; 128 + n, if signal n killed it.
    """
    ours, its = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, its)
        process = subprocess.Popen(
            command,
            env={**os.environ, **processes.variables(), _SUPERVISOR: str(ours)},
            stdin=subprocess.DEVNULL,
            stdout=None if processes.process_id == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(ours,),
            process_group=0,  # or a Ctrl-C would reach it twice
        )
        os.close(ours)
        stack.enter_context(_signals_passed_on(process))
        held = _relay(process)
    code = process.wait()
    if code == -signal.SIGABRT and _TERMINATING in held:
        _say(_explain(held, processes))
        return TRY_AGAIN
    _write(held)
    if code < 0:
        name = signal.Signals(-code).name
        guess = '. If nobody did that, memory ran out' if code == -signal.SIGKILL else ''
        _say(f'process {processes.process_id} of {processes.num_processes} was ended by {name}{guess}')
        return 128 - code
    return code


@contextlib.contextmanager
def _signals_passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def pass_on(number: int, frame: Any) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _relay(process: subprocess.Popen[bytes]) -> bytes:
    """Pass on what the process writes on standard error, until it has ended; returns its last words, if JAX's."""
    assert process.stderr is not None
    descriptor = process.stderr.fileno()
    line, held, held_since = b'', b'', 0.0
    while True:
        ended = process.poll() is not None
        # A grandchild may keep the pipe open: what is in it when the process has ended is all that is waited for.
        readable, _, _ = select.select([descriptor], [], [], 0 if ended else _POLL_SECONDS)
        chunk = os.read(descriptor, 1 << 16) if readable else b''
        if ended and not chunk:
            break
        if readable and not chunk:  # closed, but not ended
            time.sleep(_POLL_SECONDS)
        # After the fatal line comes the end, be it late: dumping the memory of a large process takes minutes.
        if held and not ended and _TERMINATING not in held and time.monotonic() - held_since > _HOLD_SECONDS:
            _write(held)
            held = b''
        *lines, line = (line + chunk).splitlines(keepends=True) or [b'']
        if line.endswith((b'\n', b'\r')) or not (_LAST_WORDS.match(line) or line[:1] in b'WEF'):
            lines, line = [*lines, line], b''
        for each in lines:
            if not held and _LAST_WORDS.match(each):
                held_since = time.monotonic()
            if held or _LAST_WORDS.match(each):
                held += each
            else:
                _write(each)
    return held + line


def _explain(held: bytes, processes: Processes) -> str:
    """One line on why JAX's coordination service ended the process."""
    me, count = processes.process_id, processes.num_processes
    if b'RegisterTask' in held and b'unhealthy' not in held:
        where, seconds = processes.coordinator_address, processes.initialization_timeout_seconds
        if b'DEADLINE_EXCEEDED' not in held:
            reason = re.search(rb'absl::Status: ([^\n]*)', held)
            detail = reason[1].decode(errors='replace') if reason else 'no reason given'
            return f'process {me} of {count} was refused by the coordinator at {where}: {detail}'
        if me == 0:
            what = f'not all of the {count} processes came to {where} within {seconds} s'
        else:
            what = f'process {me} of {count} waited {seconds} s at {where} for the coordinator and the other processes'
        return (
            f'{what}. Start all of them, with different process ids, the same address and the same number; each host '
            'must be able to reach that address. --initialization_timeout_seconds sets how long to wait.'
        )
    found = _UNHEALTHY.search(held)
    lost = ', '.join(re.findall(r'(\d+)\n', found[1].decode(errors='replace'))) if found else ''
    if lost and lost != str(me):
        what = f'process {lost} of {count} was lost: no sign of life for {processes.heartbeat_timeout_seconds} s'
    elif lost:
        what = f'the others gave this process, {me} of {count}, up: its signs of life did not reach process 0'
    elif me != 0:
        what = (
            f'process 0 of {count}, which holds the run together, has ended or cannot be reached; its output says why'
        )
    else:
        what = f'another of the {count} processes failed; its output says why'
    return f'{what}. This process stops too. Start all of them again: the run goes on from its last checkpoint.'


def _say(what: str) -> None:
    _write(f'error: {what}\n'.encode())


def _write(content: bytes) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.buffer.write(content)
        sys.stderr.buffer.flush()
