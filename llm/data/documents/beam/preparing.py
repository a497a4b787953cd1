"""The first pipeline: shards of sources, read, judged by the chain, and written as documents, ledger and quarantine.

A batch of records is the unit: read by one worker, judged by the same or, of large files, by any, and written with the
batches of the same piece of its shard. A piece has a bounded number of records, so no worker holds a whole file.
"""

import contextlib
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam

from llm.data.documents.beam.files import join, publish
from llm.data.documents.beam.groups import watched
from llm.data.documents.beam.judging import Judging
from llm.data.documents.beam.nodes import piece_name
from llm.data.documents.beam.records import Records
from llm.data.documents.beam.shards import Written, commit
from llm.data.documents.document import Document, Ignored
from llm.data.documents.shard_processing import (
    PARTS,
    ShardCounts,
    Task,
    Writer,
    batches,
    check_rows,
    part,
    shard_digest,
)
from llm.data.documents.stage import Chain
from llm.data.sources.files import is_url, open_binary

# A piece ends with the batch that brings it to this: what a worker holds when it writes.
PIECE_CHARACTERS = 64_000_000
# Shards in one of the files that say what is to be done: the graph of a pipeline names these files alone.
_TASKS = 1000


def write_tasks(tasks: Sequence[Task], directory: str) -> list[str]:
    """Files of what is to be done, for `documents`."""
    paths = []
    for first in range(0, len(tasks), _TASKS):
        paths.append(join(directory, f'{first // _TASKS:06d}.pickle'))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'tasks'
            path.write_bytes(pickle.dumps(list(tasks[first : first + _TASKS])))
            publish(path, paths[-1])
    return paths


def documents(
    pipeline: beam.Pipeline,
    tasks: Sequence[str],
    chain: Chain,
    output: str,
    spread_bytes: int,
    piece_documents: int,
    seconds_per_batch: float,
) -> None:
    """Adds all steps to a pipeline; last it writes OUTPUT/shards/N.json, which commits the files of a shard.

    Args:
        tasks: files of `write_tasks`. spread_bytes: records of larger files are judged by other workers than read them.
        piece_documents: records after which a piece ends. seconds_per_batch: see Judging.
    """
    shards = pipeline | 'tasks' >> beam.Create(list(tasks)) | 'shards' >> beam.FlatMap(_tasks) | beam.Reshuffle()
    by_size = shards | 'by size' >> beam.FlatMap(_by_size, spread_bytes).with_outputs('large', main='small')
    near, number = by_size.small | 'read' >> beam.FlatMap(_read, piece_documents).with_outputs('number', main='records')
    far, far_number = by_size.large | 'read large' >> beam.FlatMap(_read, piece_documents).with_outputs(
        'number', main='records'
    )
    spread = far | 'spread' >> beam.Reshuffle()
    records = (near, spread) | 'all records' >> beam.Flatten()
    judged = records | 'judge' >> beam.ParDo(Judging(chain, seconds_per_batch))
    written = judged | 'pieces' >> beam.GroupByKey() | 'write' >> beam.FlatMap(_write, chain.rules, output)
    read = (number, far_number) | 'all numbers' >> beam.Flatten()
    totals = (read, written) | 'totals' >> beam.Flatten() | 'add' >> beam.CombinePerKey(_Total())
    _ = totals | 'commit' >> beam.Map(commit, output)


def _tasks(path: str) -> list[Task]:
    with open_binary(path) as file:
        tasks: list[Task] = pickle.loads(file.read())
    return tasks


def _by_size(task: Task, spread_bytes: int) -> Iterator[Any]:
    yield beam.pvalue.TaggedOutput('large', task) if _bytes(task) > spread_bytes else task


def _bytes(task: Task) -> int:
    """Of the file of a shard; 0 where it has none, or cannot be read, of which reading it tells."""
    path = getattr(task.shard, 'path', None)
    try:
        if path is not None and is_url(path):
            import fsspec

            files, _, (inner,) = fsspec.get_fs_token_paths(path)
            return int(files.size(inner) or 0)
        return os.path.getsize(path) if path is not None else 0
    except OSError:
        return 0


def _read(task: Task, piece_documents: int) -> Iterator[Any]:
    """Records in batches, one at least so that every shard has a file; and how many are or should be documents."""
    digest = task.digest or shard_digest(task.shard, task.settings)
    number = piece = in_piece = characters = 0
    empty = True
    for first, items in batches(task, lambda first, count: None):
        yield Records(task, piece_name(task.index, piece), first, items)
        empty = False
        number += sum(not isinstance(item, Ignored) for item in items)
        in_piece += len(items)
        characters += sum(len(item.text) + len(item.markup or '') for item in items if isinstance(item, Document))
        if in_piece >= piece_documents or characters >= PIECE_CHARACTERS:
            piece, in_piece, characters = piece + 1, 0, 0
    if empty:
        yield Records(task, piece_name(task.index, piece), 0, [])
    yield beam.pvalue.TaggedOutput('number', (task.index, Written(task.shard.name, digest, number)))


def _write(element: tuple[str, Iterable[Records]], rules: Sequence[str], output: str) -> Iterator[tuple[int, Written]]:
    """One piece of a shard into its three files."""
    name, some = element[0], sorted(watched(element[1]), key=lambda records: records.first)
    counts = ShardCounts()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.ExitStack() as stack:
            writer = Writer(Path(folder), name, rules, stack)
            for records in some:
                counts.add(records.counts)
                for row, document in zip(records.ledger, records.documents, strict=True):
                    writer.add(row, document)
                for item in records.quarantined:
                    writer.quarantine(item)
            sizes = writer.commit()
        check_rows(name, counts, {kind: [Path(folder) / part(name, kind)] for kind in ('documents', 'ledger')})
        for kind in PARTS:
            publish(Path(folder) / part(name, kind), join(output, part(name, kind)))
    yield some[0].task.index, Written(counts=counts, sizes=Counter(sizes))


class _Total(beam.CombineFn):
    """What is known of a shard from all its parts."""

    def create_accumulator(self) -> Written:
        return Written()

    def add_input(self, total: Written, some: Written) -> Written:
        total.add(some)
        return total

    def merge_accumulators(self, some: Iterable[Written]) -> Written:
        total = Written()
        for one in some:
            total.add(one)
        return total

    def extract_output(self, total: Written) -> Written:
        return total
