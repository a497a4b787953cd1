"""All shards of all sources through one chain, in processes; a run that was stopped goes on with the shards left."""

import concurrent.futures
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llm.data.documents.deduplication.verdicts import withdraw
from llm.data.documents.shard_processing import (
    PARTS,
    ShardCounts,
    Task,
    check_rows,
    committed,
    part,
    process,
    shard_digest,
)
from llm.data.documents.sources import InputShard, Source
from llm.data.documents.stage import Chain
from llm.data.documents.workers import in_processes
from llm.data.sources.files import unwritable
from llm.data.token_cache_building import processors, write_json

SUMMARY = 'summary.json'


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        counts: of all shards. sources: of each, by name. resumed: shards that were done before.
    """

    counts: ShardCounts
    sources: dict[str, ShardCounts]
    shards: int
    resumed: int

    def as_json(self) -> dict[str, Any]:
        """What summary.json holds."""
        sources = {name: counts.as_json() for name, counts in self.sources.items()}
        return {'counts': self.counts.as_json(), 'sources': sources, 'shards': self.shards}


def run(
    sources: Sequence[Source],
    chain: Chain,
    directory: Path,
    *,
    settings: str,
    processes: int = 0,
    seconds_per_batch: float = 600.0,
    progress: bool = True,
) -> Summary:
    """Prepare every document of `sources` into `directory`; see shard_processing for what is written there.

    Args:
        settings: of the chain, as a text; shards that were done with others are done again.
        processes: 0 takes one for each processor; 1 works in this process, which a document can then crash or hang.
        seconds_per_batch: see in_processes.

    Raises:
        UserError: there is nothing to read, a file cannot be opened, or the disk is full.
    """
    shards = [(source.name, shard) for source in sources for shard in source.shards()]
    numbers = numbers_of([shard for _, shard in shards], _known(directory))
    tasks = [Task(shard, number, settings=settings) for (_, shard), number in zip(shards, numbers, strict=True)]
    _remove_left_over(directory)
    done = _done(directory, tasks)
    resumed = len(done)
    others = _others(directory, set(numbers))
    if others or resumed < len(tasks):
        withdraw(directory)
        (directory / SUMMARY).unlink(missing_ok=True)
    for path in others:
        path.unlink()
    missing = [task for task in tasks if task.index not in done]
    workers = min(processes or processors(), len(missing))
    total = ShardCounts()
    for counts in done.values():
        total.add(counts)
    with tqdm(total=len(tasks), initial=resumed, desc='shards', disable=None if progress else True, leave=False) as bar:
        each = _here(missing, chain, directory) if processes == 1 else in_processes(
            missing, chain, directory, workers, seconds_per_batch
        )  # fmt: skip
        try:
            for task, counts in each:
                done[task.index] = counts
                total.add(counts)
                bar.update()
                bar.set_postfix_str(f'{total.documents:,} documents, {total.kept:,} kept')
        except OSError as error:
            raise unwritable(directory, error, 'shards') from error
    _remove_left_over(directory)
    by_source: dict[str, ShardCounts] = {}
    for (name, _), number in zip(shards, numbers, strict=True):
        by_source.setdefault(name, ShardCounts()).add(done[number])
    summary = Summary(total, by_source, len(tasks), resumed)
    files = {kind: [directory / part(number, kind) for number in numbers] for kind in ('documents', 'ledger')}
    check_rows(str(directory), total, files)
    write_json(directory / SUMMARY, summary.as_json())
    return summary


def _remove_left_over(directory: Path) -> None:
    """What processes that were killed had begun to write."""
    for path in directory.glob('*/*.tmp'):
        path.unlink(missing_ok=True)


def _here(tasks: Sequence[Task], chain: Chain, directory: Path) -> Iterator[tuple[Task, ShardCounts]]:
    for task in tasks:
        yield task, process(task, chain, directory, lambda first, count: None)


def _known(directory: Path) -> dict[str, int]:
    """Name of a shard -> number of its files in an earlier run."""
    known: dict[str, int] = {}
    for path in (directory / 'shards').glob('*.json'):
        try:
            known[json.loads(path.read_text())['shard']] = int(path.stem)
        except (OSError, KeyError, TypeError, ValueError):  # damaged: as if it were not there
            continue
    return known


def numbers_of(shards: Sequence[InputShard], known: Mapping[str, int]) -> list[int]:
    """The number of each shard's files: what it had in an earlier run, else its place, or the next that is free.

    So shards that are done keep their files when a file is added or taken away that sorts before them.

    Args:
        known: name of a shard -> number that it had.
    """
    taken = {known[shard.name] for shard in shards if shard.name in known}
    numbers: list[int] = []
    for place, shard in enumerate(shards):
        number = known.get(shard.name, place)
        if shard.name not in known:
            while number in taken:
                number += 1
            taken.add(number)
        numbers.append(number)
    return numbers


def _done(directory: Path, tasks: Sequence[Task]) -> dict[int, ShardCounts]:
    """The counts of shards that were done before. Their inputs are read for it, several at a time."""

    def counts(task: Task) -> ShardCounts | None:
        if not (directory / part(task.index, 'shards')).exists():
            return None
        return committed(directory, dataclasses.replace(task, digest=shard_digest(task.shard, task.settings)))

    with concurrent.futures.ThreadPoolExecutor(processors()) as pool:
        found = list(pool.map(counts, tasks))
    return {task.index: some for task, some in zip(tasks, found, strict=True) if some is not None}


def _others(directory: Path, numbers: set[int]) -> list[Path]:
    """Files of shards that an earlier run had and this one has not, also of those that it had not committed."""
    paths = [path for kind in ('shards', *PARTS) for path in (directory / kind).glob('*')]
    return [path for path in paths if path.stem.isdigit() and int(path.stem) not in numbers]
