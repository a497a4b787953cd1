"""Lines, paragraphs and passages that are in a corpus several times, as joins.

Every word begins a passage, so an element each would be most of what a cluster does. First, then, arrays: the hashes of
a file's units, each once with its count, in ranges of keys; of a range come back to each file the hashes that are there
often enough. Few are. Those alone become elements, with their place in the order of preference.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from llm.data.documents.beam.earlier import EarlierRun
from llm.data.documents.beam.groups import Smallest, Tell, Told, watched
from llm.data.documents.beam.nodes import earlier_node, is_earlier, piece_name, position_of
from llm.data.documents.beam.scanning import unit_keys, unit_records
from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.repeats import Repeats
from llm.data.documents.deduplication.sorted_runs import group_sizes, group_starts

Group = tuple[str, dict[str, Any]]
# A unit of one file: the hash, how often it is there, shard and piece.
HELD = np.dtype([('key', 'u8'), ('count', 'u4'), ('shard', 'u4'), ('piece', 'u4')])
# Of these records: what a worker collects before it cuts them into ranges, and about what one range is given.
COLLECTED, RANGE = 1 << 28, 1 << 26
# Bytes at the end of the name of a unit: its place in its document.
_INDEX = 4


def ranges_for(characters: int, least: int) -> int:
    """Ranges of keys for a corpus of so many characters, of which a word has five."""
    return max(least, characters // 5 * HELD.itemsize // RANGE)


class Repeated(beam.PTransform):
    """What a repeats rule is to cut: (name of file, (unit, row, index of the unit)).

    Args:
        ranges: of keys, each held at once by a worker.
    """

    def __init__(self, some: Repeats, config: Deduplication, salts: int, ranges: int):
        super().__init__()
        self._some, self._config, self._salts, self._ranges = some, config, salts, ranges

    def expand(self, alive: Any) -> Any:
        """From (name, path and rows that are gone) of each file, and (name, EarlierRun)."""
        repeated = (
            alive
            | 'hashes' >> beam.ParDo(Hashes(self._some, self._ranges))
            | 'ranges' >> beam.GroupByKey()
            | 'often' >> beam.FlatMap(often, self._some.occurrences)
        )
        return (
            {'file': alive, 'often': repeated}
            | 'back to files' >> beam.CoGroupByKey()
            | 'units' >> beam.FlatMap(_units, self._some, self._config)
            | 'equal' >> Tell(Smallest(1), self._salts, least=self._some.occurrences)
            | 'to go' >> beam.FlatMap(_to_go, self._some)
        )


class Hashes(beam.DoFn):
    """(range, records as bytes), of several files together so that they are not many and small."""

    def __init__(self, some: Repeats, ranges: int):
        super().__init__()
        self._some, self._ranges = some, ranges
        self._held: list[np.ndarray] = []
        self._bytes = 0

    def start_bundle(self) -> None:
        self._held, self._bytes = [], 0

    def process(self, element: tuple[str, tuple[str, set[int]] | EarlierRun]) -> Iterator[tuple[int, bytes]]:
        name, where = element
        if isinstance(where, EarlierRun):
            found = np.concatenate([np.zeros(0, np.uint64), *(some['key'] for some in where.staying())])
        else:
            found = unit_keys(*where, self._some)
        keys, counts = np.unique(found, return_counts=True)
        held = np.zeros(len(keys), HELD)
        held['key'], held['count'] = keys, counts
        held['shard'], held['piece'] = map(int, name.split('-'))
        self._held.append(held)
        self._bytes += held.nbytes
        if self._bytes >= COLLECTED:
            yield from self._cut()

    def finish_bundle(self) -> Iterator[Any]:
        window = GlobalWindow()
        for element in self._cut():
            yield WindowedValue(element, window.max_timestamp(), (window,))

    def _cut(self) -> Iterator[tuple[int, bytes]]:
        if self._held:
            some = np.concatenate(self._held)
            self._held, self._bytes = [], 0
            numbers = some['key'] % np.uint64(self._ranges)
            order = np.argsort(numbers, kind='stable')
            some, numbers = some[order], numbers[order]
            starts = group_starts(numbers)
            for start, size in zip(starts.tolist(), group_sizes(starts, len(some)).tolist(), strict=True):
                yield int(numbers[start]), some[start : start + size].tobytes()


def often(element: tuple[int, Iterable[bytes]], occurrences: int) -> Iterator[tuple[str, bytes]]:
    """(name of file, hashes as bytes) of what is in the corpus often enough."""
    some = np.concatenate([np.frombuffer(part, HELD) for part in watched(element[1])])
    some = some[np.argsort(some['key'], kind='stable')]
    starts = group_starts(some['key'])
    totals = np.add.reduceat(some['count'].astype(np.int64), starts) if len(some) else starts
    some = some[np.repeat(totals >= occurrences, group_sizes(starts, len(some)))]
    some = some[np.lexsort((some['piece'], some['shard']))]
    starts = group_starts(some['shard'], some['piece'])
    for start, size in zip(starts.tolist(), group_sizes(starts, len(some)).tolist(), strict=True):
        first = some[start]
        keys = np.ascontiguousarray(some['key'][start : start + size])
        yield piece_name(int(first['shard']), int(first['piece'])), keys.tobytes()


def _units(element: Group, some: Repeats, config: Deduplication) -> Iterator[tuple[bytes, tuple[bytes, None]]]:
    (where,) = element[1]['file']
    parts = list(element[1]['often'])
    if not parts:
        return
    wanted = np.frombuffer(b''.join(parts), np.uint64)
    if not isinstance(where, EarlierRun):
        path, gone = where
        yield from unit_records(path, gone, some, config, wanted)
        return
    for held in where.staying():
        for unit in held[np.isin(held['key'], wanted)]:
            name = earlier_node(int(unit['node'])) + int(unit['index']).to_bytes(_INDEX, 'big')
            yield unit['key'].tobytes() + unit['check'].tobytes(), (name, None)


def _to_go(told: Told, some: Repeats) -> Iterator[tuple[str, tuple[str, int, int]]]:
    _, (unit, _), (first,), _ = told
    if not is_earlier(unit) and (unit != first or not some.keep_first):
        where = position_of(unit[:-_INDEX])
        yield where.name, (some.unit, where.row, int.from_bytes(unit[-_INDEX:], 'big'))
