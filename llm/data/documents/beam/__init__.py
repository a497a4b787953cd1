"""prepare_data as Apache Beam pipelines: on one machine, or on a cluster through a runner of Beam.

The stages, and the functions of a document or of a key with its group, are those of the runner for one machine; here
are what reads, groups and writes. Nothing below is imported, nor Beam, before a pipeline is run.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm.data.documents.beam.files import (
    check_reachable,
    join,
    listed,
    read_record,
    remove,
    remove_files,
    sizes,
    write_record,
)
from llm.data.documents.beam.shards import Shards
from llm.data.documents.deduplication.config import EXACT, NEAR, NOTHING, Deduplication
from llm.data.documents.deduplication.corpus import Index
from llm.data.documents.deduplication.decontamination import Decontamination
from llm.data.documents.deduplication.pipeline import earlier_indexes, index_settings
from llm.data.documents.deduplication.verdicts import FinalCounts, withdraw
from llm.data.documents.runner import SUMMARY, Summary, numbers_of
from llm.data.documents.shard_processing import ShardCounts, Task
from llm.data.documents.sources import Source
from llm.data.documents.stage import Chain
from llm.data.sources.files import is_url
from llm.data.token_cache_building import write_json
from llm.errors import UserError

# More turns of rounds than any graph of documents takes: a round at least halves the longest way.
_TURNS = 40


@dataclasses.dataclass(frozen=True)
class Beam:
    """Runs the phases of prepare_data as Beam pipelines; what has been done is not done again.

    Args:
        options: of the pipelines, as on a command line: ('--runner=DataflowRunner', '--project=...').
        directory: where workers write what they make, by a path or URL that all of them reach; empty takes
            output_directory, which has the records of the run in any case.
        spread_bytes: files of more bytes are read by one worker and judged by all; smaller ones by who reads them,
            so that raw pages are not sent around.
        salts: parts of a group, of equal URLs or of one line in a million documents, that workers do by themselves.
        piece_documents: records of a shard that one worker writes into one file; fewer if they are long.
        rounds: of large-star and small-star in one pipeline; most graphs need no second.
        index: whether the index for later runs is written, deduplication/, which takes two more pipelines.
    """

    options: tuple[str, ...] = ('--runner=DirectRunner',)
    directory: str = ''
    spread_bytes: int = 1 << 30
    salts: int = 256
    piece_documents: int = 4096
    rounds: int = 3
    index: bool = False

    def __post_init__(self) -> None:
        if self.spread_bytes < 0 or not 1 <= self.salts <= 1 << 16 or min(self.rounds, self.piece_documents) < 1:
            raise UserError(
                'spread_bytes must not be negative, salts from 1 to 65,536, rounds and piece_documents positive',
                where='Beam',
            )

    def check(self, deduplication: Deduplication | None = None) -> None:
        """Starts nothing.

        Raises:
            UserError: Beam is not installed or refuses an option, or an index is asked for and `directory` is a URL.
        """
        from llm.data.documents.beam.running import new_pipeline

        if is_url(self.directory) and (self.index or (deduplication is not None and deduplication.earlier)):
            raise UserError(
                'an index lies on a disk that all workers reach, and this is a URL',
                where=f'Beam.directory {self.directory}',
                fix='Give a path, or leave out Beam.index and Deduplication.earlier.',
            )
        new_pipeline(self.options)

    def prepare(
        self, sources: Sequence[Source], chain: Chain, directory: Path, settings: str, seconds_per_batch: float = 600.0
    ) -> Summary:
        """As `runner.run`, but for the names of files: a shard has several, N-M for piece M of shard N.

        A shard that is done is not done again, also after a pipeline that failed or was stopped.

        Raises:
            UserError: Beam is not installed or refuses an option, or what `runner.run` raises.
        """
        self.check()
        output = self._claimed(directory)
        mark = join(output, 'beam/prepared.json')
        shards = [(source.name, shard) for source in sources for shard in source.shards()]
        before = Shards(output)
        numbers = numbers_of([shard for _, shard in shards], before.known)
        tasks = [Task(shard, number, settings=settings) for (_, shard), number in zip(shards, numbers, strict=True)]
        done = before.done(tasks)
        stale = before.stale(done, set(numbers))
        if stale or len(done) < len(tasks):
            _withdraw(directory, output)
            (directory / SUMMARY).unlink(missing_ok=True)
            write_record(mark, {})
            remove(join(output, 'beam/tasks'))
            remove_files(stale)
        missing = [task for task in tasks if task.index not in done]
        if missing:
            from llm.data.documents.beam import preparing

            add = functools.partial(
                preparing.documents,
                tasks=preparing.write_tasks(missing, join(output, 'beam/tasks')),
                chain=chain,
                seconds_per_batch=seconds_per_batch,
                output=output,
                spread_bytes=self.spread_bytes,
                piece_documents=self.piece_documents,
            )
            self._run('prepare', add)
        after = Shards(output) if missing else before
        total = ShardCounts()
        by_source = {source.name: ShardCounts() for source in sources}
        for (source, _), number in zip(shards, numbers, strict=True):
            counts = ShardCounts.from_json(after.records[number]['counts'])
            by_source[source].add(counts)
            total.add(counts)
        summary = Summary(total, by_source, len(tasks), len(done))
        content = {'digest': after.digest(numbers), 'kept': total.kept, 'kept_characters': total.kept_characters}
        write_record(mark, content)
        write_json(directory / SUMMARY, summary.as_json())
        return summary

    def finish(
        self, directory: Path, deduplication: Deduplication | None, decontamination: Decontamination | None
    ) -> FinalCounts:
        """As `deduplication.pipeline.finish`; an index for later runs where `index` is set.

        Raises:
            UserError: an earlier index does not fit, or an evaluation set cannot be read.
        """
        self.check(deduplication)
        config, output = deduplication or NOTHING, self.directory or str(directory)
        work = join(output, 'beam')
        prepared = _required(join(work, 'prepared.json'))
        identities = decontamination.identities() if decontamination else []
        indexes = earlier_indexes(config)
        said = [repr(dataclasses.replace(config, memory_bytes=1)), repr(decontamination), *identities]
        said += [json.dumps(index.record, sort_keys=True) for index in indexes]
        said.append(prepared['digest'])
        now = hashlib.sha256('\0'.join(said).encode()).hexdigest()
        if read_record(join(work, 'deduplication.json')) != {'digest': now}:
            _withdraw(directory, output)
            for folder in ('lost', 'edges'):
                remove(join(work, folder))
            write_record(join(work, 'deduplication.json'), {'digest': now})
        from llm.data.documents.beam import components, deduplicating, finishing

        state = join(work, 'earlier.npy')
        if indexes:
            from llm.data.documents.beam.earlier import write_state

            rules = [rule for rule in config.rules if rule in (*EXACT, NEAR)]
            write_state(indexes, [*rules, *(['contamination'] if decontamination else [])], Path(state))
        find = functools.partial(
            deduplicating.duplicates,
            output=output,
            work=work,
            config=config,
            salts=self.salts,
            indexes=indexes,
            state=state,
        )
        self._once(work, 'duplicates', find, writes=('lost', 'edges'))
        turn = 0
        if config.near is not None:
            for turn in range(_TURNS):
                join_up = functools.partial(
                    components.stars, work=work, turn=turn, rounds=self.rounds, salts=self.salts
                )
                self._once(work, f'stars-{turn}', join_up, writes=(f'edges/{turn + 1}',))
                if not _required(join(work, f'changed-{turn}.json'))['changed']:
                    break
            else:
                raise RuntimeError('components did not end')
        last = finishing.Finish(
            output,
            work,
            turn + 1,
            config,
            decontamination,
            now,
            self.salts,
            prepared['kept_characters'],
            indexes,
            state,
        )
        written = join(work, 'written.json')
        intact = read_record(written) == _written(output)
        self._once(work, 'final', last.build, again=not intact)
        if not intact:
            write_record(written, _written(output))
        counts = FinalCounts.from_json(_required(join(output, 'final-counts.json')))
        if counts.documents != prepared['kept']:
            raise RuntimeError(
                f'documents were lost: {prepared["kept"]:,} were prepared, {counts.documents:,} are judged'
            )
        if self.index:
            self._write_index(output, work, turn + 1, config, indexes, now, decontaminated=decontamination is not None)
        write_json(directory / 'final.json', counts.as_json())
        return counts

    def _write_index(
        self,
        output: str,
        work: str,
        turn: int,
        config: Deduplication,
        indexes: Sequence[Index],
        digest: str,
        *,
        decontaminated: bool,
    ) -> None:
        from llm.data.documents.beam import indexing

        index = Index(Path(output) / 'deduplication', sum(other.count for other in indexes))
        if (index.directory / 'phases/final.json').exists():
            return
        before = [other.record['digest'] for other in indexes]
        indexing.begin(output, index, {'digest': digest, 'earlier': before, 'settings': index_settings(config)})
        self._run('order', functools.partial(indexing.order, output=output, index=index, config=config))
        indexing.merge(index, config)
        self._run('scan', functools.partial(indexing.scan, output=output, index=index, config=config))
        indexing.end(output, work, turn, index, config, decontaminated=decontaminated)

    def _claimed(self, directory: Path) -> str:
        """Where workers write: a folder that is this run's, since what a stopped attempt left there is deleted."""
        output = self.directory
        if not output:
            return str(directory)  # which the job has claimed
        check_reachable(output)
        mark, owner = join(output, 'beam/run.json'), {'output_directory': str(directory.absolute())}
        found = read_record(mark)
        if found not in (None, owner) or (found is None and listed(join(output, '*'))):
            whose = f'belongs to the run in {found["output_directory"]}' if found else 'is not empty, and of no run'
            raise UserError(whose, where=f'Beam.directory {output}', fix='Use a new directory for each run.')
        if found is None:
            write_record(mark, owner)
        return output

    def _once(
        self, work: str, name: str, build: Callable[[Any], None], writes: Sequence[str] = (), *, again: bool = False
    ) -> None:
        mark = join(work, f'done/{name}.json')
        if again or read_record(mark) is None:
            for folder in writes:  # of an attempt that was stopped
                remove(join(work, folder))
            write_record(mark, self._run(name, build))

    def _run(self, name: str, build: Callable[[Any], None]) -> dict[str, Any]:
        from llm.data.documents.beam.running import run

        return run(name, self.options, build)


def _withdraw(directory: Path, output: str) -> None:
    """As `verdicts.withdraw`, wherever the folders are; and what says of steps that they are done."""
    withdraw(directory)
    if is_url(output):  # stores rename nothing
        for folder in ('final', 'verdicts', 'contamination'):
            remove(join(output, folder))
    elif Path(output) != directory:
        withdraw(Path(output))
    remove(join(output, 'beam/done'))


def _written(output: str) -> dict[str, str]:
    """Changes when a file of the last pipeline is not there, or has another size."""
    found = [sizes(join(output, kind)) for kind in ('final', 'verdicts', 'contamination')]
    whole = [{name: size for name, size in some.items() if not name.endswith('.tmp')} for some in found]
    return {'digest': hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()}


def _required(path: str) -> Any:
    content = read_record(path)
    if not content:
        raise UserError('is not there or not readable', where=path, fix='Start again in a new output directory.')
    return content
