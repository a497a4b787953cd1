"""A corpus in Parquet shards, its documents numbered by preference: the best of any group is its smallest number.

Preference is a rule (preferred source, longest, oldest), then the id, then the text; so numbers depend neither on how
documents are cut into shards nor on their order. They are found by sorting each shard and merging what is sorted.
"""

import bisect
import dataclasses
import datetime
import functools
import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llm.data.documents.deduplication.sorted_runs import Run, runs_in, write_array
from llm.errors import UserError

Rule = Literal['longest', 'shortest', 'oldest', 'newest']
# Sorted files that are merged at once, and rows of their batches.
_FAN_IN, _ROWS = 128, 1 << 12
_NO_DATE = 1 << 62
# Of Parquet, uncompressed, that are read at once.
_BATCH_BYTES = 1 << 24


def preference(rules: Sequence[Rule], sources: Sequence[str], row: dict[str, Any]) -> tuple[int, ...]:
    """A document's place by the rules: smaller is preferred.

    Args:
        sources: from the most to the least preferred; others come after them.
        row: source, date and text of the document.
    """
    source = row['source']
    place = sources.index(source) if source in sources else len(sources)
    return (place, *(_MEASURES[rule](row) for rule in rules))


def text_digest(text: str) -> bytes:
    """What breaks a tie of documents of one place and id."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _seconds(row: dict[str, Any]) -> int | None:
    try:
        date = datetime.datetime.fromisoformat(row['date'] or '')
    except ValueError:
        return None
    return int((date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp())


def _oldest(row: dict[str, Any]) -> int:
    seconds = _seconds(row)
    return _NO_DATE if seconds is None else seconds


def _newest(row: dict[str, Any]) -> int:
    seconds = _seconds(row)
    return _NO_DATE if seconds is None else -seconds


_MEASURES: dict[str, Callable[[dict[str, Any]], int]] = {
    'longest': lambda row: -len(row['text']),
    'shortest': lambda row: len(row['text']),
    'oldest': _oldest,
    'newest': _newest,
}


def batch_rows(metadata: Any) -> int:
    """Rows that are read at once: fewer where documents are long."""
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    return max(1, min(512, _BATCH_BYTES * metadata.num_rows // max(size, 1)))


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Columns of a Parquet file, as lists, a batch of rows at a time."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_rows(file.metadata), columns=list(columns)):
            yield batch.to_pydict()


def sort_shard(path: Path, first: int, target: Path, rules: Sequence[Rule], sources: Sequence[str]) -> None:
    """One shard's documents in order of preference, as (place, id, digest of the text, position in the corpus)."""
    rows: list[tuple[tuple[int, ...], str, bytes, int]] = []
    for batch in parquet_rows(path, ('id', 'source', 'date', 'text')):
        for identity, source, date, text in zip(*batch.values(), strict=True):
            place = preference(rules, sources, {'source': source, 'date': date, 'text': text})
            rows.append((place, identity, text_digest(text), first + len(rows)))
    _write_sorted(target, iter(sorted(rows)), len(rules) + 1)


def merge_shards(paths: Sequence[Path], directory: Path, count: int, base: int, rules: int) -> None:
    """All shards in one order: ids.arrow by number, and arrays from number to position and back, `base` added."""
    import pyarrow

    level = 0
    paths = list(paths)
    while len(paths) > _FAN_IN:
        level += 1
        groups = [paths[i : i + _FAN_IN] for i in range(0, len(paths), _FAN_IN)]
        paths = []
        for i, group in enumerate(groups):
            paths.append(directory / f'work/order/merged-{level}-{i}.arrow')
            _write_sorted(paths[-1], heapq.merge(*map(_read_sorted, group)), rules + 1)
    schema = pyarrow.schema([('id', pyarrow.large_string())])
    position_of = np.zeros(count, np.int64)
    written = 0
    with pyarrow.OSFile(str(directory / 'ids.arrow'), 'wb') as file, pyarrow.ipc.new_file(file, schema) as writer:
        for rows in _batched(heapq.merge(*map(_read_sorted, paths)), _ROWS):
            position_of[written : written + len(rows)] = [row[3] for row in rows]
            written += len(rows)
            writer.write_batch(
                pyarrow.record_batch([pyarrow.array([row[1] for row in rows], pyarrow.large_string())], schema)
            )
    number_of = np.zeros(count, np.int64)
    number_of[position_of] = np.arange(base, base + count)
    write_array(directory / 'position_of.npy', position_of)
    write_array(directory / 'number_of.npy', number_of)


def _batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    some: list[Any] = []
    for row in rows:
        some.append(row)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def _write_sorted(path: Path, rows: Iterator[Any], places: int) -> None:
    import pyarrow

    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pyarrow.schema(
        [(f'place{i}', pyarrow.int64()) for i in range(places)]
        + [('id', pyarrow.large_string()), ('digest', pyarrow.binary()), ('position', pyarrow.int64())]
    )
    with pyarrow.OSFile(str(path), 'wb') as file, pyarrow.ipc.new_file(file, schema) as writer:
        for some in _batched(rows, _ROWS):
            columns = [*zip(*(row[0] for row in some), strict=True), *zip(*(row[1:] for row in some), strict=True)]
            arrays = [pyarrow.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
            writer.write_batch(pyarrow.record_batch(arrays, schema))


def _read_sorted(path: Path) -> Iterator[tuple[tuple[int, ...], str, bytes, int]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        reader = pyarrow.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            *places, ids, digests, positions = (column.to_pylist() for column in reader.get_batch(i).columns)
            yield from zip(zip(*places, strict=True), ids, digests, positions, strict=True)


@dataclasses.dataclass(frozen=True)
class Index:
    """What is known of a corpus on disk: of this run, or of an earlier one whose documents are preferred to all here.

    Attributes:
        directory: of its files. base: number of its first document in this run.
    """

    directory: Path
    base: int

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.directory, self.base)  # without open files

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """index.json: settings, rows of each shard, the base that numbers in its files have, and earlier indexes."""
        try:
            found: dict[str, Any] = json.loads((self.directory / 'index.json').read_text())
            return found
        except (OSError, ValueError) as error:
            raise UserError(
                f'holds no index of a finished run ({error})',
                where=str(self.directory),
                fix='Give the folder deduplication/ in the output directory of an earlier run.',
            ) from error

    @property
    def count(self) -> int:
        """Documents."""
        return sum(self.record['rows'])

    @property
    def shift(self) -> int:
        """What is added to numbers in its files."""
        return self.base - int(self.record['base'])

    @functools.cached_property
    def first_rows(self) -> list[int]:
        """Position of the first document of each shard, and of the end."""
        return [0, *np.cumsum(self.record['rows']).tolist()]

    def runs(self, kind: str) -> list[Run]:
        """Runs of records of a kind."""
        return runs_in(self.directory / 'runs' / kind, self.shift)

    @functools.cached_property
    def position_of(self) -> np.ndarray:
        """Of each document by its number less the base."""
        return np.load(self.directory / 'position_of.npy', mmap_mode='r')

    def numbers(self, shard: int) -> np.ndarray:
        """Of the documents of a shard, by row; of this run alone."""
        numbers = np.load(self.directory / 'number_of.npy', mmap_mode='r')
        return np.array(numbers[self.first_rows[shard] : self.first_rows[shard + 1]])

    def shingles(self, number: int) -> np.ndarray:
        """The set of shingles of a document."""
        position = int(self.position_of[number - self.base])
        shard = bisect.bisect_right(self.first_rows, position) - 1
        values, offsets = self._sets(shard)
        row = position - self.first_rows[shard]
        return np.asarray(values[offsets[row] : offsets[row + 1]])

    @functools.cached_property
    def _opened(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def _sets(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        if shard not in self._opened:
            if len(self._opened) >= 256:
                self._opened.clear()
            offsets = np.load(self.directory / f'sets/{shard:06d}.offsets.npy', mmap_mode='r')
            path = self.directory / f'sets/{shard:06d}.values'
            values = np.memmap(path, np.uint64, 'r') if path.stat().st_size else np.zeros(0, np.uint64)
            self._opened[shard] = values, offsets
        return self._opened[shard]

    def ids(self, numbers: np.ndarray) -> list[str]:
        """Ids of documents by their numbers, which are sorted."""
        import pyarrow

        result: list[str] = []
        with pyarrow.memory_map(str(self.directory / 'ids.arrow')) as file:
            reader = pyarrow.ipc.open_file(file)
            places = numbers - self.base
            batches = places // _ROWS
            for batch in np.unique(batches):
                column = reader.get_batch(int(batch)).column(0)
                result += column.take(pyarrow.array(places[batches == batch] % _ROWS)).to_pylist()
        return result
