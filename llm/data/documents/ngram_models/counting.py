"""How often each n-gram is in a text: sorted on disk, in bounded memory, in an order that puts shared endings together.

Up to six tokens are packed into two numbers, the last token first. In their order all n-grams with the same last k
tokens are neighbours, for every k at once; that order is what estimation needs (Heafield et al. 2013).
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llm.data.documents.deduplication.sorted_runs import (
    Run,
    RunWriter,
    group_starts,
    read_range,
    records,
    runs_in,
)
from llm.data.documents.ngram_models.tokens import BEGIN, BITS

MAX_ORDER = 6
_IN_KEY = 3  # tokens of an n-gram that are in the key; the others are in `node`
# key: the last three tokens. node: the three before them. A token is packed as its id + 1, none as 0.
COUNTED = np.dtype([('key', 'u8'), ('node', 'i8'), ('count', 'i8')])
# The files of sorted counts are read from at so many places to cut them into ranges of about one size.
_SAMPLED = 4096


def count_ngrams(ids: np.ndarray, order: int) -> np.ndarray:
    """COUNTED: the n-grams of sentences, sorted; at the beginning of a sentence shorter ones, that begin with <s>.

    Args:
        ids: int64 [total], of sentences with <s> and </s>.
    """
    codes = (ids + 1).astype(np.uint64)
    positions = np.arange(len(ids))
    begins = ids == BEGIN
    depth = positions - np.maximum.accumulate(np.where(begins, positions, 0))
    packed = [np.zeros(len(ids), np.uint64), np.zeros(len(ids), np.uint64)]
    for back in range(order):
        part, place = divmod(back, _IN_KEY)
        shifted = np.concatenate([np.zeros(min(back, len(codes)), np.uint64), codes[: len(codes) - back]])
        shifted[depth < back] = 0
        packed[part] |= shifted << np.uint64(BITS * (_IN_KEY - 1 - place))
    keep = ~begins
    counted = records(COUNTED, key=packed[0][keep], node=packed[1][keep].astype(np.int64), count=1)
    return added_up(counted[np.lexsort((counted['node'], counted['key']))])


def added_up(some: np.ndarray) -> np.ndarray:
    """Sorted COUNTED with each n-gram once."""
    starts = group_starts(some['key'], some['node'])
    result = some[starts]
    if len(starts):
        result['count'] = np.add.reduceat(some['count'], starts)
    return result


def write_counts(batches: Iterable[np.ndarray], order: int, directory: Path, memory_bytes: int) -> list[Run]:
    """Count all batches of ids into sorted files in `directory`."""
    # A writer holds its records twice while it sorts, beside their order.
    writer = RunWriter(directory, 'counts', COUNTED, run_bytes=memory_bytes // 4)
    for ids in batches:
        writer.add(count_ngrams(ids, order))
    writer.close()
    return runs_in(directory)


def read_counts(runs: list[Run], memory_bytes: int) -> Iterator[np.ndarray]:
    """All n-grams in order, each once, in pieces of bounded size."""
    for keys in _ranges(runs, memory_bytes // 4):
        some = added_up(read_range(runs, keys, COUNTED))
        if len(some):
            yield some


def _ranges(runs: list[Run], limit: int) -> list[tuple[int, int]]:
    """Ranges of keys with about `limit` bytes of records each; keys are words, of which some are frequent."""
    total = sum(path.stat().st_size for path, _ in runs)
    count = -(-total // limit)
    edges: list[int] = []
    if count > 1:
        samples = []
        for path, _ in runs:
            run = np.load(path, mmap_mode='r')
            samples.append(run['key'][:: max(1, len(run) * len(runs) // _SAMPLED)])
        sample = np.sort(np.concatenate(samples))
        edges = sorted({int(sample[len(sample) * i // count]) for i in range(1, count)})
    return list(itertools.pairwise([0, *edges, 1 << 64]))


def endings(some: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The last `length` tokens of each n-gram, as two numbers, both in order."""
    if length <= _IN_KEY:
        return some['key'] >> np.uint64(BITS * (_IN_KEY - length)), np.zeros(len(some), np.int64)
    return some['key'], some['node'] >> np.int64(BITS * (2 * _IN_KEY - length))


def token_before(some: np.ndarray, length: int) -> np.ndarray:
    """int64: the first of the last `length` tokens of each n-gram as packed, 0 where there are not so many."""
    part, place = divmod(length - 1, _IN_KEY)
    column = some['key'] if part == 0 else some['node'].astype(np.uint64)
    shifted = column >> np.uint64(BITS * (_IN_KEY - 1 - place))
    return (shifted & np.uint64((1 << BITS) - 1)).astype(np.int64)
