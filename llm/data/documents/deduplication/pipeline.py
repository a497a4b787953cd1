"""The phases of deduplication and decontamination over Parquet shards: resumable, in processes, in bounded memory.

Below `output/deduplication/` lie an order of all documents, records of each, what each phase removed, and a mark of
each phase that is done; a run that was stopped goes on with the first that is not. What is kept there is the index for
later runs. In memory are ten bytes a document, and the records of one range of keys in each process.
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llm.data.documents.deduplication.components import connected, stars
from llm.data.documents.deduplication.config import EXACT, NEAR, NOTHING, Deduplication
from llm.data.documents.deduplication.corpus import Index, merge_shards, sort_shard
from llm.data.documents.deduplication.decontamination import CommonNgrams, Decontamination
from llm.data.documents.deduplication.exact import equal_to_first
from llm.data.documents.deduplication.near_duplicates import NearDuplicates, candidate_pairs, similarities
from llm.data.documents.deduplication.repeats import Repeats, repeated
from llm.data.documents.deduplication.scan import scan_shard
from llm.data.documents.deduplication.shards import RULE_CODES, decide_shard, find_shard, finish_shard, staying
from llm.data.documents.deduplication.sorted_runs import (
    BANDED,
    GROUPED,
    PAIRED,
    PLACED,
    Run,
    RunWriter,
    group_sizes,
    group_starts,
    ranges,
    read_range,
    records,
    runs_in,
    write_array,
)
from llm.data.documents.deduplication.verdicts import FinalCounts, withdraw
from llm.data.documents.deduplication.words import mixed
from llm.data.documents.fork_server import fork_server
from llm.data.sources.files import unwritable
from llm.data.token_cache_building import processors, write_json
from llm.errors import UserError


def finish(
    output: Path,
    deduplication: Deduplication | None,
    decontamination: Decontamination | None,
    *,
    processes: int = 0,
) -> FinalCounts:
    """From output/documents/*.parquet to output/final, output/verdicts and output/contamination, with counts.

    Raises:
        UserError: an earlier index does not fit, an evaluation set cannot be read, or the disk is full.
    """
    try:
        return _Pipeline(output, deduplication or NOTHING, decontamination, processes or processors()).run()
    except BrokenProcessPool as error:
        raise UserError(
            'a process was ended, perhaps for want of memory',
            where=str(output),
            fix='Set processes or Deduplication.memory_bytes lower, and start again: finished phases are kept.',
        ) from error
    except OSError as error:
        raise unwritable(output, error, 'phases') from error


class _Pipeline:
    def __init__(self, output: Path, config: Deduplication, against: Decontamination | None, processes: int):
        import pyarrow.parquet

        self._output, self._config, self._against, self._processes = output, config, against, processes
        self._directory = output / 'deduplication'
        self._shards = sorted((output / 'documents').glob('*.parquet'))
        self._rows = [pyarrow.parquet.read_metadata(path).num_rows for path in self._shards]
        self._earlier = earlier_indexes(config)
        self._base = sum(index.count for index in self._earlier)
        self._index = Index(self._directory, self._base)
        self._now = ''
        self._stack = contextlib.ExitStack()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._count = sum(self._rows)
        decontaminating = ('contamination',) if against else ()
        first = tuple(rule for rule in config.rules if rule in (*EXACT, NEAR))
        self._rules = (*first, *decontaminating)
        self._removed = np.zeros(self._base + self._count, np.uint8)
        self._representative = np.full(self._base + self._count, -1, np.int64)

    def run(self) -> FinalCounts:
        with self._stack:
            return self._run()

    def _run(self) -> FinalCounts:
        self._begin()
        self._phase('order', self._order)
        if self._config.rules:
            self._phase('scan', self._scan)
        for rule in self._rules:
            work = {NEAR: self._near, 'contamination': self._contamination}.get(
                rule, functools.partial(self._equal, rule)
            )
            self._phase(rule, work)
            self._apply(rule)
        for some in self._config.repeats:
            self._phase(some.unit, functools.partial(self._repeats, some))
        if any(self._written(shard) is None for shard in range(len(self._shards))):
            (self._directory / 'phases/final.json').unlink(missing_ok=True)
        self._phase('final', self._write)
        shutil.rmtree(self._directory / 'work', ignore_errors=True)
        counts = FinalCounts()
        for shard in range(len(self._shards)):
            written = self._written(shard)
            assert written is not None
            counts.add(written)
        self._check(counts)
        write_json(self._output / 'final.json', counts.as_json())
        return counts

    def _begin(self) -> None:
        """Starts anew where documents or settings are others than those of what lies there."""
        files = sorted((self._output / 'shards').glob('*.json'))
        content = [path.read_text() for path in files] + [repr(dataclasses.replace(self._config, memory_bytes=1))]
        content += [json.dumps(index_settings(self._config)), repr(self._against)] + (
            self._against.identities() if self._against else []
        )
        content += [json.dumps(index.record, sort_keys=True) for index in self._earlier]
        self._digest = hashlib.sha256('\0'.join(content).encode()).hexdigest()
        mark = self._directory / 'index.json'
        try:
            same = _read(mark)['digest'] == self._digest
        except (OSError, ValueError, KeyError):
            same = False
        if not same:
            withdraw(self._output)
            shutil.rmtree(self._directory, ignore_errors=True)
            (self._directory / 'phases').mkdir(parents=True)
            record = {
                'digest': self._digest,
                'rows': self._rows,
                'base': self._base,
                'earlier': [index.record['digest'] for index in self._earlier],
                'settings': index_settings(self._config),
            }
            write_json(mark, record)

    def _phase(self, name: str, work: Callable[[], None]) -> None:
        mark = self._directory / 'phases' / f'{name}.json'
        if not mark.exists():
            self._now = name
            work()
            write_json(mark, {'done': name})

    def _each(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """What a function gives for each task, in order."""
        todo = list(tasks)
        name = f'{self._now}: {function.__name__.strip("_")}'
        yield from tqdm(self._given(function, todo), name, len(todo), leave=False, disable=None)

    def _given(self, function: Callable[..., Any], todo: list[tuple[Any, ...]]) -> Iterator[Any]:
        if self._processes == 1 or len(todo) <= 1:
            for task in todo:
                yield function(*task)
            return
        if self._pool is None:
            pool = concurrent.futures.ProcessPoolExecutor(self._processes, fork_server())
            self._pool = self._stack.enter_context(pool)
        yield from self._pool.map(function, *zip(*todo, strict=True))

    def _order(self) -> None:
        firsts = np.cumsum([0, *self._rows])[:-1].tolist()
        sorted_files = [self._directory / f'work/order/{i:06d}.arrow' for i in range(len(self._shards))]
        config = self._config
        tasks = [
            (path, first, target, config.prefer, config.sources)
            for path, first, target in zip(self._shards, firsts, sorted_files, strict=True)
        ]
        list(self._each(sort_shard, tasks))
        merge_shards(sorted_files, self._directory, self._count, self._base, len(config.prefer))

    def _scan(self) -> None:
        tasks = [(path, i, self._index, self._config) for i, path in enumerate(self._shards)]
        list(self._each(scan_shard, tasks))

    def _runs(self, kind: str) -> list[Run]:
        return [run for index in (*self._earlier, self._index) for run in index.runs(kind)]

    def _saved(self) -> Path:
        """The state of all documents as a file that workers read."""
        path = self._directory / 'work/removed.npy'
        write_array(path, self._removed)
        return path

    def _apply(self, rule: str) -> None:
        """Into the state what a finished phase removed, here and in earlier runs."""
        for index in (*self._earlier, self._index):
            path = index.directory / f'removed/{rule}.npy'
            if path.exists():
                some = np.load(path)
                self._removed[some['node'] + index.shift] = RULE_CODES[rule]
                known = some['other'] >= 0
                self._representative[some['node'][known] + index.shift] = some['other'][known] + index.shift

    def _save(self, rule: str, nodes: np.ndarray, others: np.ndarray) -> None:
        here = nodes >= self._base
        nodes, others = nodes[here], others[here]
        write_array(
            self._directory / f'removed/{rule}.npy',
            records(PAIRED, key=nodes.astype(np.uint64), node=nodes, other=others),
        )

    def _equal(self, rule: str) -> None:
        runs, state = self._runs(rule), self._saved()
        found = list(self._each(_equal, [(runs, keys, state) for keys in ranges(runs, self._config.memory_bytes)]))
        self._save(rule, *(np.concatenate(column) for column in zip(*found, strict=True)))

    def _near(self) -> None:
        near, limit, work = self._config.near, self._config.memory_bytes, self._directory / 'work'
        assert near is not None
        for name in ('pairs', 'edges'):
            shutil.rmtree(work / name, ignore_errors=True)
        runs, state = self._runs(NEAR), self._saved()
        tasks = [
            (runs, keys, state, self._base, near.bucket, work / 'pairs', f'{i:06d}')
            for i, keys in enumerate(ranges(runs, limit))
        ]
        list(self._each(_candidates, tasks))
        pairs = runs_in(work / 'pairs')
        indexes = (*self._earlier, self._index)
        checking = [
            (pairs, keys, indexes, near, work / 'edges', f'{i:06d}')
            for i, keys in enumerate(ranges(pairs, min(limit, 1 << 24)))
        ]
        list(self._each(_verify, checking))

        def edges() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for path, _ in runs_in(work / 'edges'):
                some = np.load(path)
                yield some['node'], some['other']

        self._save(NEAR, *stars(connected(edges(), work / 'components', limit)))

    def _repeats(self, some: Repeats) -> None:
        target = self._directory / 'cuts' / some.unit
        shutil.rmtree(target, ignore_errors=True)
        runs, state = self._runs(some.unit), self._saved()
        tasks = [
            (runs, keys, state, self._index, some, target, f'{i:06d}')
            for i, keys in enumerate(ranges(runs, self._config.memory_bytes))
        ]
        list(self._each(_repeated, tasks))

    def _contamination(self) -> None:
        against, work = self._against, self._directory / 'work'
        assert against is not None
        state = self._saved()
        runs_directory, decisions = work / 'ngrams', self._directory / 'contamination'
        tasks = [
            (path, i, self._index, state, against, self._digest, runs_directory) for i, path in enumerate(self._shards)
        ]
        suspects = list(self._each(find_shard, tasks))
        most = next((rule.most_documents for rule in against.rules if isinstance(rule, CommonNgrams)), 0)
        runs = runs_in(runs_directory)
        counting = [(runs, keys, most) for keys in ranges(runs, self._config.memory_bytes)]
        ignored = np.concatenate(list(self._each(_frequent, counting)))
        judging = [
            (
                path,
                rows,
                against,
                self._digest,
                ignored,
                decisions / f'{i:06d}.json',
                self._output / 'contamination' / path.name,
            )
            for i, (path, rows) in enumerate(zip(self._shards, suspects, strict=True))
        ]
        removed = list(self._each(decide_shard, judging))
        nodes = np.concatenate([self._index.numbers(i)[rows] for i, rows in enumerate(removed)])
        self._save('contamination', nodes, np.full(len(nodes), -1))

    def _write(self) -> None:
        for name in ('final', 'verdicts'):
            for path in (self._output / name).glob('*'):
                if path.name not in {shard.name for shard in self._shards}:
                    path.unlink()
        todo = [i for i in range(len(self._shards)) if self._written(i) is None]
        state = self._saved()
        others = self._directory / 'work/representative.npy'
        write_array(others, self._representative)
        indexes = (*self._earlier, self._index)
        settings = self._config.repeats
        tasks = [(self._shards[i], i, state, others, indexes, settings, self._output) for i in todo]
        (self._directory / 'written').mkdir(exist_ok=True)
        for shard, counts in zip(todo, self._each(finish_shard, tasks), strict=True):
            record = {'counts': counts.as_json(), 'sizes': self._sizes(shard)}
            write_json(self._directory / f'written/{shard:06d}.json', record)

    def _sizes(self, shard: int) -> list[int]:
        return [(self._output / kind / self._shards[shard].name).stat().st_size for kind in ('final', 'verdicts')]

    def _written(self, shard: int) -> FinalCounts | None:
        """The counts of a shard whose final files are there and have their sizes."""
        try:
            record = _read(self._directory / f'written/{shard:06d}.json')
            return FinalCounts.from_json(record['counts']) if record['sizes'] == self._sizes(shard) else None
        except (OSError, ValueError, KeyError):
            return None

    def _check(self, counts: FinalCounts) -> None:
        """Nothing was lost: the counts balance, and the files have as many rows as were counted."""
        import pyarrow.parquet

        def rows(kind: str) -> int:
            return sum(pyarrow.parquet.read_metadata(self._output / kind / path.name).num_rows for path in self._shards)

        expected = {
            'final': counts.kept,
            'verdicts': counts.documents,
            'documents': counts.kept + counts.removed.total(),
        }
        found = {kind: rows(kind) for kind in expected}
        if found != expected or found['documents'] != self._count:
            raise RuntimeError(f'documents were lost: {counts.as_json()}, in files {found}')


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def index_settings(config: Deduplication) -> dict[str, Any]:
    """What must be equal for records of one run to be compared with those of another."""
    near = config.near
    repeats: dict[str, Any] = {some.unit: some.words if some.unit == 'passages' else 0 for some in config.repeats}
    bands = [near.shingle, near.bands.bands, near.bands.rows, near.seed] if near else None
    return {
        'version': 2,
        'documents': config.documents,
        'near': bands,
        'ids': config.ids,
        'urls': config.urls,
        **repeats,
    }


def earlier_indexes(config: Deduplication) -> tuple[Index, ...]:
    """The indexes of earlier runs, after a look at whether they fit this one and each other."""
    found: list[Index] = []
    wanted = json.loads(json.dumps(index_settings(config)))
    for name in config.earlier:
        index = Index(Path(name), sum(other.count for other in found))
        settings = index.record['settings']
        differing = [key for key, value in wanted.items() if value and settings.get(key) != value]
        if differing or not (index.directory / 'phases/final.json').exists():
            what = f'was made with another {", ".join(differing)}' if differing else 'is of a run that has not ended'
            raise UserError(what, where=name, fix='Use the same settings in both runs, or leave this one out.')
        before = [other.record['digest'] for other in found]
        if index.record['earlier'] and index.record['earlier'] != before:
            raise UserError(
                'was made against other earlier runs', where=name, fix='Give those before it, in the same order.'
            )
        found.append(index)
    return tuple(found)


def _equal(runs: Sequence[Run], keys: tuple[int, int], state: Path) -> tuple[np.ndarray, np.ndarray]:
    some = staying(read_range(runs, keys, GROUPED), state)
    return equal_to_first(some['key'], some['check'], some['node'])


def _candidates(
    runs: Sequence[Run], keys: tuple[int, int], state: Path, base: int, bucket: int, target: Path, name: str
) -> None:
    some = staying(read_range(runs, keys, BANDED), state)
    first, second = candidate_pairs(some['key'], some['node'], bucket)
    new = second >= base  # two earlier documents have been compared before
    first, second = first[new], second[new]
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    once = group_starts(first, second)
    first, second = first[once], second[once]
    writer = RunWriter(target, name, PAIRED)
    # By the first document, so that its set is read once for all its pairs.
    writer.add(records(PAIRED, key=mixed(first.astype(np.uint64)), node=first, other=second))
    writer.close()


def _verify(
    runs: Sequence[Run], keys: tuple[int, int], indexes: Sequence[Index], near: NearDuplicates, target: Path, name: str
) -> None:
    some = read_range(runs, keys, PAIRED)
    some = some[np.lexsort((some['other'], some['node']))]
    some = some[group_starts(some['node'], some['other'])]
    bases = [index.base for index in indexes]

    def shingles(number: int) -> np.ndarray:
        return indexes[bisect.bisect_right(bases, number) - 1].shingles(number)

    alike = similarities(some['node'], some['other'], shingles) >= near.threshold
    writer = RunWriter(target, name, PAIRED)
    writer.add(some[alike])
    writer.close()


def _repeated(
    runs: Sequence[Run], keys: tuple[int, int], state: Path, index: Index, some: Repeats, target: Path, name: str
) -> None:
    units = staying(read_range(runs, keys, PLACED), state)
    goes = repeated(
        units['key'],
        units['check'],
        units['node'],
        units['index'],
        occurrences=some.occurrences,
        keep_first=some.keep_first,
    )
    units = units[goes]
    units = units[units['node'] >= index.base]
    units['key'] = index.position_of[units['node'] - index.base]
    writer = RunWriter(target, name, PLACED)
    writer.add(units)
    writer.close()


def _frequent(runs: Sequence[Run], keys: tuple[int, int], most: int) -> np.ndarray:
    """Hashes of n-grams that more than `most` documents have."""
    found = read_range(runs, keys, BANDED)['key']
    starts = group_starts(found)
    return found[starts[group_sizes(starts, len(found)) > most]]
