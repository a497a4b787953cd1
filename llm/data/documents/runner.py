"""All shards of all sources through one chain, in processes; a run that was stopped goes on with the shards left."""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llm.data.documents.shard_processing import PARTS, ShardCounts, Task, committed, part, process
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
    tasks = [Task(shard, index, _digest(shard, settings)) for index, (_, shard) in enumerate(shards)]
    for left_over in directory.glob('*/*.tmp'):
        left_over.unlink(missing_ok=True)
    _remove_others(directory, len(tasks))
    done = {task.index: counts for task in tasks if (counts := committed(directory, task)) is not None}
    resumed = len(done)
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
    by_source: dict[str, ShardCounts] = {}
    for index, (name, _) in enumerate(shards):
        by_source.setdefault(name, ShardCounts()).add(done[index])
    summary = Summary(total, by_source, len(tasks), resumed)
    _check(directory, summary)
    write_json(directory / SUMMARY, summary.as_json())
    return summary


def _here(tasks: Sequence[Task], chain: Chain, directory: Path) -> Iterator[tuple[Task, ShardCounts]]:
    for task in tasks:
        yield task, process(task, chain, directory, lambda first, count: None)


def _digest(shard: InputShard, settings: str) -> str:
    # Names of files need not be valid Unicode.
    text = f'{shard.name}\0{shard.fingerprint()}\0{settings}'
    return hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()


def _remove_others(directory: Path, count: int) -> None:
    """Files of shards that an earlier run had and this one has not, also of those that it had not committed."""
    for kind in ('shards', *PARTS):
        for path in (directory / kind).glob('*'):
            if path.stem.isdigit() and int(path.stem) >= count:
                path.unlink()


def _check(directory: Path, summary: Summary) -> None:
    """Nothing was lost: the counts balance, and the files have as many rows as were counted."""
    import pyarrow.parquet

    def rows(kind: str) -> int:
        paths = [directory / part(index, kind) for index in range(summary.shards)]
        return sum(pyarrow.parquet.read_metadata(path).num_rows for path in paths)

    counts = summary.counts
    found = {'kept': rows('documents'), 'judged': rows('ledger')}
    if not counts.balanced or found != {'kept': counts.kept, 'judged': counts.documents - counts.quarantined}:
        raise RuntimeError(f'documents were lost: {counts.as_json()}, in files {found}')
