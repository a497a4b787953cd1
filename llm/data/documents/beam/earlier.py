"""What an index of an earlier run tells a pipeline: keys of its documents, sets, ids, and what it removed.

Indexes lie on a disk that all workers reach. Nothing is read as a whole: files are mapped, and read in slices.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np

from llm.data.documents.beam.nodes import earlier_node, earlier_number, piece_name
from llm.data.documents.deduplication.corpus import Index
from llm.data.documents.deduplication.shards import RULE_CODES

# Records of an index that are read at once.
_SLICE = 1 << 16
# Numbers of the shards of documents are below: a run of an earlier index has one as a file of documents has.
_RUNS = 0xFF000000


@dataclasses.dataclass(frozen=True)
class EarlierRun:
    """A file of records of an index.

    Attributes:
        shift: what is added to the numbers in it. state: path of what `write_state` writes.
    """

    path: str
    shift: int
    state: str

    def staying(self, rule: str | None = None) -> Iterator[np.ndarray]:
        """Records, in slices, of documents that no rule has removed; given one, no rule before it."""
        code = RULE_CODES[rule] if rule else len(RULE_CODES) + 1
        found, state = np.load(self.path, mmap_mode='r'), _state(self.state)
        for first in range(0, len(found), _SLICE):
            some = np.array(found[first : first + _SLICE])
            some['node'] += self.shift
            codes = state[some['node']]
            yield some[(codes == 0) | (codes >= code)]


@functools.lru_cache(maxsize=1)
def _state(path: str) -> np.ndarray:
    found: np.ndarray = np.load(path, mmap_mode='r')
    return found


def write_state(indexes: Sequence[Index], rules: Sequence[str], path: Path) -> None:
    """For each document of the indexes, by number, the code of the rule that removed it; 0 for those that stayed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(index.count for index in indexes)
    state = np.lib.format.open_memmap(path, 'w+', np.uint8, (total,))  # type: ignore[no-untyped-call]
    for index in indexes:
        for rule in rules:
            for some in _removed(index, rule):
                state[some['node'] + index.shift] = RULE_CODES[rule]
    state.flush()


def _removed(index: Index, rule: str) -> Iterator[np.ndarray]:
    path = index.directory / f'removed/{rule}.npy'
    if path.exists():
        found = np.load(path, mmap_mode='r')
        for first in range(0, len(found), _SLICE):
            yield np.array(found[first : first + _SLICE])


def runs(pipeline: beam.Pipeline, indexes: Sequence[Index], kind: str, state: str, label: str) -> Any:
    """(name as of a file, EarlierRun) of the records of a kind."""
    return (
        pipeline
        | f'{label} indexes' >> beam.Create(list(enumerate(indexes)))
        | f'{label} runs' >> beam.FlatMap(_runs, kind, state)
        | f'{label} spread' >> beam.Reshuffle()
    )


def _runs(element: tuple[int, Index], kind: str, state: str) -> Iterator[tuple[str, EarlierRun]]:
    number, index = element
    for i, (path, shift) in enumerate(index.runs(kind)):
        yield piece_name(_RUNS + number, i), EarlierRun(str(path), shift, state)


def keyed(element: tuple[str, EarlierRun], rule: str) -> Iterator[tuple[bytes, tuple[bytes, None]]]:
    """(key, (node, None)) of each record, as of a new document; all bits of its hash are the key."""
    for some in element[1].staying(rule):
        checks = some['check'] if 'check' in (some.dtype.names or ()) else None
        for i, (key, number) in enumerate(zip(some['key'], some['node'].tolist(), strict=True)):
            yield key.tobytes() + (b'' if checks is None else checks[i].tobytes()), (earlier_node(number), None)


def lost(pipeline: beam.Pipeline, indexes: Sequence[Index], rules: Sequence[str]) -> Any:
    """(node, (rule, other node)) of what earlier runs removed for another document."""
    return (
        pipeline
        | 'earlier removed' >> beam.Create([(index, rule) for index in indexes for rule in rules])
        | 'earlier lost' >> beam.FlatMap(_lost)
    )


def _lost(element: tuple[Index, str]) -> Iterator[tuple[bytes, tuple[str, bytes]]]:
    index, rule = element
    for some in _removed(index, rule):
        for number, other in zip(some['node'].tolist(), some['other'].tolist(), strict=True):
            if other >= 0:
                yield earlier_node(number + index.shift), (rule, earlier_node(other + index.shift))


def _owner(number: int, indexes: Sequence[Index]) -> Index:
    return indexes[bisect.bisect_right([index.base for index in indexes], number) - 1]


def shingle_set(number: int, indexes: Sequence[Index]) -> bytes:
    """The set of shingles of a document, by its number."""
    return _owner(number, indexes).shingles(number).tobytes()


def block_of(some: bytes) -> int:
    """Documents of one block lie together."""
    return earlier_number(some) >> 12


def identities(members: Any, indexes: Sequence[Index]) -> Iterator[tuple[Any, str]]:
    """(member, id) of each (node, member) of one block."""
    known: dict[int, str] = {}
    for some, member in members:
        number = earlier_number(some)
        if number not in known:
            (known[number],) = _owner(number, indexes).ids(np.array([number]))
        yield member, known[number]
