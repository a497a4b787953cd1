"""Records through the chain in a process of its own, which a document may end or hang: it is quarantined alone."""

import contextlib
import dataclasses
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import apache_beam as beam

from llm.data.documents.beam.records import Records
from llm.data.documents.fork_server import fork_server
from llm.data.documents.shard_processing import judge
from llm.data.documents.stage import Chain
from llm.data.documents.workers import CHANCES, said, serve
from llm.errors import UserError


class Judging(beam.DoFn):
    """Records to (name of the piece, Records that are judged).

    Args:
        seconds_per_batch: a process that takes longer at one batch is ended.
    """

    def __init__(self, chain: Chain, seconds_per_batch: float):
        self._chain, self._seconds = chain, seconds_per_batch
        self._process: Any = None
        self._connection: Connection | None = None

    def process(self, records: Records) -> Iterator[tuple[str, Records]]:
        """One batch; what ends its process, or takes too long, is judged one by one, as on one machine."""
        outcome = self._tried(records)
        yield records.name, outcome if isinstance(outcome, Records) else self._one_by_one(records)

    def teardown(self) -> None:
        """Ends the process."""
        self._end()

    def _one_by_one(self, records: Records) -> Records:
        whole = records.part(records.first, [])
        for number, item in enumerate(records.items, start=records.first):
            one = records.part(number, [item])
            outcome: Records | str = ''
            for _ in range(CHANCES):
                outcome = self._tried(one)
                if isinstance(outcome, Records) or outcome.startswith('took'):
                    break
            if isinstance(outcome, str):
                poison = {**one.task.poison, number: outcome}
                outcome = self._tried(dataclasses.replace(one, task=dataclasses.replace(one.task, poison=poison)))
                assert isinstance(outcome, Records), outcome
            whole.add(outcome)
        return whole

    def _tried(self, records: Records) -> Records | str:
        """The records, judged; or why the process had to be, or was, ended."""
        if self._process is None:
            self._start()
        assert self._connection is not None
        with contextlib.suppress(ConnectionError):  # it is dead, as is found below
            self._connection.send(records)
        ready = wait([self._connection, self._process.sentinel], self._seconds)
        outcome: Any = None
        with contextlib.suppress(EOFError, ConnectionError):
            if self._connection in ready:
                outcome = self._connection.recv()
        if isinstance(outcome, Exception):
            raise outcome
        if isinstance(outcome, Records):
            return outcome
        reason = '' if ready else f'took more than {self._seconds:g} seconds'
        code = self._end()
        return reason or f'ended its process ({said(code)})'

    def _start(self) -> None:
        context = fork_server()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._chain), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._connection.recv()  # the clock of the first batch starts when it is there
        except EOFError:
            raise UserError(
                f'a process that judges documents ended before it had begun ({said(self._end())})',
                fix='What it said is above.',
            ) from None

    def _end(self) -> int:
        """Its exit code."""
        if self._process is None:
            return 0
        if self._connection is not None:
            self._connection.close()
        self._process.join(0.5)  # one that ends by itself has a reason to tell
        self._process.kill()
        self._process.join()
        code, self._process, self._connection = self._process.exitcode, None, None
        return int(code)


def _work(connection: Connection, chain: Chain) -> None:
    def judged(records: Records) -> Records:
        judge(records.items, records.first, records.task, chain, records.counts, records)
        return records.without_items()

    connection.send(None)
    serve(connection, judged)
