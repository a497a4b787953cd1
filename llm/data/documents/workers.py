"""Processes that work through tasks and may die: one that crashes, is killed, or hangs costs one record, not the run.

Each worker tells in shared memory which records it is at. When it dies there, its task is done again, those records one
by one; the record at which a worker has then died twice is quarantined. A hanging worker is killed.
"""

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from llm.data.documents.fork_server import fork_server
from llm.data.documents.shard_processing import ShardCounts, Task, process
from llm.data.documents.stage import Chain
from llm.errors import UserError

# How often a death while a record was read, or judged alone, is taken for chance.
CHANCES = 2
# And before it had begun, which is the fault of no record: three times in a row for a task, all else is a mistake.
_STARTS = 3
_POLL_SECONDS = 0.5
# In place of the first record, before a worker has come to its task.
_NOT_BEGUN = -1.0


@dataclasses.dataclass
class _Worker:
    """A process, and where it is: position is [first record, records, seconds on the clock]."""

    process: Any
    connection: Connection
    position: Any
    task: Task | None = None


def in_processes(
    tasks: Sequence[Task], chain: Chain, directory: Path, processes: int, seconds_per_batch: float
) -> Iterator[tuple[Task, ShardCounts]]:
    """Tasks as they are done, by `processes` workers.

    Args:
        seconds_per_batch: a worker that is longer at one batch is taken to hang.

    Raises:
        Exception: what `process` raises in a worker. The others are stopped; what is committed stays.
    """
    context = fork_server()
    waiting, deaths = deque(tasks), Counter[tuple[int, int, bool]]()
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            while len(workers) < processes and waiting:
                workers.append(_start(context, chain, directory))
            for worker in workers:
                if worker.task is None and waiting:
                    worker.task = waiting.popleft()
                    worker.position[:] = _NOT_BEGUN, 0.0, math.inf  # the clock starts when the worker does
                    with contextlib.suppress(ConnectionError):  # it is dead, as is found below
                        worker.connection.send(worker.task)
            wait([x for worker in workers for x in (worker.connection, worker.process.sentinel)], _POLL_SECONDS)
            for worker in list(workers):
                if worker.connection.poll():
                    try:
                        outcome = worker.connection.recv()
                    except (EOFError, ConnectionError):  # it is dead, perhaps before it has read its task
                        outcome = None
                    if isinstance(outcome, Exception):
                        raise outcome
                    if outcome is not None:
                        assert worker.task is not None
                        task, worker.task = worker.task, None
                        yield task, outcome
                        continue
                hangs = worker.task is not None and time.monotonic() - worker.position[2] > seconds_per_batch
                if hangs:
                    worker.process.kill()
                    worker.process.join()
                    reason = f'took more than {seconds_per_batch:g} seconds'
                elif not worker.process.is_alive():
                    worker.process.join()
                    reason = f'ended its process ({said(worker.process.exitcode)})'
                else:
                    continue
                workers.remove(worker)
                if worker.task is not None:
                    waiting.appendleft(_again(worker.task, worker.position, reason, deaths, by_chance=not hangs))
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()


def said(exit_code: int) -> str:
    """How a process ended."""
    return signal.Signals(-exit_code).name if exit_code < 0 else f'exit code {exit_code}'


def _again(
    task: Task, position: Any, reason: str, deaths: 'Counter[tuple[int, int, bool]]', *, by_chance: bool
) -> Task:
    """The task to do in place of one whose worker died at `position`.

    Args:
        by_chance: whether what it did there may go well another time.
    """
    first, count = int(position[0]), int(position[1])
    if count > 1:
        return dataclasses.replace(task, alone=task.alone | {first})
    key = task.index, first, count == 0
    deaths[key] += 1
    if by_chance and deaths[key] < (_STARTS if first < 0 else CHANCES):
        return task
    if first < 0:
        raise UserError(
            f'a worker {reason} {deaths[key]} times before it had begun to read',
            fix='What it said is above. A script of your own needs `if __name__ == "__main__":` around the call.',
        )
    if count == 1:
        return dataclasses.replace(task, poison={**task.poison, first: reason})
    return dataclasses.replace(task, unreadable=(first, f'reading it {reason}; nothing behind it was read'))


def _set(position: Any, first: int, count: int) -> None:
    position[0], position[1], position[2] = first, count, time.monotonic()


def _start(context: Any, chain: Chain, directory: Path) -> _Worker:
    ours, theirs = context.Pipe()
    position = context.Array('d', [_NOT_BEGUN, 0.0, math.inf], lock=False)
    process = context.Process(target=_work, args=(theirs, chain, directory, position), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, position)


def _work(connection: Connection, chain: Chain, directory: Path, position: Any) -> None:
    serve(connection, lambda task: process(task, chain, directory, lambda first, count: _set(position, first, count)))


def serve(connection: Connection, answer: Callable[[Any], Any]) -> None:
    """The body of a worker: a task in, its answer or the exception out, until who asks closes or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    _die_with_parent()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            connection.send(answer(task))
        except Exception as error:
            if not isinstance(error, (OSError, UserError)):
                error.add_note(traceback.format_exc())  # a bug; pickling drops where it was
            connection.send(error)


def _die_with_parent() -> None:
    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
