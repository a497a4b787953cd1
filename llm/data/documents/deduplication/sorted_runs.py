"""Keyed records on disk, in runs that are sorted by key: written as they come, read by ranges of keys.

This is the shuffle between phases. A phase writes runs of bounded size; the next reads, one range of keys at a time,
all records of those keys from all runs. Keys are hashes, so ranges of equal width hold about as many records each.
"""

import bisect
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# A node is a document's number. check: further bits of the key's hash. index: of a word, line or paragraph.
GROUPED = np.dtype([('key', 'u8'), ('check', 'u8'), ('node', 'i8')])
BANDED = np.dtype([('key', 'u8'), ('node', 'i8')])
PLACED = np.dtype([('key', 'u8'), ('node', 'i8'), ('check', 'u4'), ('index', 'u4')])
PAIRED = np.dtype([('key', 'u8'), ('node', 'i8'), ('other', 'i8')])

# Bytes that a writer holds before it writes a run, and that a reader is given at a time.
RUN_BYTES = 1 << 26
# A run, and what is added to the nodes in it: an earlier corpus has its own place among the nodes.
Run = tuple[Path, int]


def records(dtype: np.dtype[Any], **columns: Any) -> np.ndarray:
    """Records of these columns; one number stands for a column of it."""
    length = next(len(column) for column in columns.values() if np.ndim(column))
    result = np.zeros(length, dtype)
    for name, column in columns.items():
        result[name] = column
    return result


class RunWriter:
    """Collects records and writes them as runs `directory/name-K.npy`, each whole or not at all."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype[Any], run_bytes: int = RUN_BYTES):
        self._directory, self._name, self._dtype, self._run_bytes = directory, name, dtype, run_bytes
        self._waiting: list[np.ndarray] = []
        self._bytes = self._runs = 0
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob(f'{name}-*.npy*'):  # of an attempt that was stopped
            path.unlink()

    def add(self, some: np.ndarray) -> None:
        """Records, in any order."""
        if len(some):
            self._waiting.append(some)
            self._bytes += some.nbytes
        if self._bytes >= self._run_bytes:
            self.close()

    def close(self) -> None:
        """Write what waits."""
        if self._waiting:
            some = np.concatenate(self._waiting)
            some = np.take(some, np.argsort(some['key']))
            write_array(self._directory / f'{self._name}-{self._runs}.npy', some)
            self._runs += 1
        self._waiting, self._bytes = [], 0


def write_array(path: Path, array: np.ndarray) -> None:
    """An array as a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            # Not by np.save: its stream of its own ends in silence where the last bytes find no space.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def runs_in(directory: Path, base: int = 0) -> list[Run]:
    """All runs of a directory."""
    return [(path, base) for path in sorted(directory.glob('*.npy'))]


def ranges(runs: Sequence[Run], limit: int) -> list[tuple[int, int]]:
    """Ranges [first, last) of keys, over all 64-bit keys, each of about `limit` bytes of records or fewer."""
    total = sum(path.stat().st_size for path, _ in runs)
    count = max(1, -(-total // limit))
    edges = [(i << 64) // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def read_range(runs: Sequence[Run], keys: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
    """All records of a range of keys, sorted by key, then node."""
    parts = []
    for path, base in runs:
        run = np.load(path, mmap_mode='r')
        first, last = (bisect.bisect_left(run, key, key=lambda record: int(record['key'])) for key in keys)
        part = np.array(run[first:last])
        part['node'] += base
        if dtype == PAIRED:
            part['other'] += base
        parts.append(part)
    some = np.concatenate(parts) if parts else np.zeros(0, dtype)
    # Runs are sorted by key, which this kind of sort makes use of; most keys are there once.
    some = np.take(some, np.argsort(some['key'], kind='stable'))
    shared = in_groups(some['key'], 2)
    group = some[shared]
    some[shared] = group[np.lexsort((group['node'], group['key']))]
    return some


def in_groups(keys: np.ndarray, least: int) -> np.ndarray:
    """Where in sorted keys those are that are there at least so often."""
    starts = group_starts(keys)
    sizes = group_sizes(starts, len(keys))
    return np.flatnonzero(np.repeat(sizes >= least, sizes))


def group_starts(*columns: np.ndarray) -> np.ndarray:
    """Where in sorted columns each group of equal values begins."""
    if not len(columns[0]):
        return np.zeros(0, np.int64)
    first = np.ones(len(columns[0]), bool)
    first[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(first)


def group_sizes(starts: np.ndarray, total: int) -> np.ndarray:
    """How many records each group has."""
    return np.diff(np.append(starts, total))
