"""Estimates n-gram models: interpolated modified Kneser-Ney smoothing (Chen and Goodman 1998), as KenLM's lmplz does.

For an n-gram of context c and token w, with a its adjusted count: how often it is there where n is the order of the
model or it begins with <s>, else how many different tokens are before it;

    p(w | c) = max(a(c w) - D_n(a), 0) / sum_x a(c x) + b(c) p(w | c without its first token)
    b(c) = sum_x D_n(a(c x)) / sum_x a(c x)
    D_n(k) = k - (k + 1) (t_1 / (t_1 + 2 t_2)) t_(k+1) / t_k for k = 1, 2 and 3 or more, t_k the n-grams with a = k

down to unigrams, below which all tokens but <s> are as likely (Heafield et al. 2013). What pruning removes counts in
the sums, and its share goes to b.

Counts are sorted on disk (`counting`). N-grams of one length are a row each in files that are mapped into memory, in
order of their endings; the row of the n-gram without its first token is its parent. All that is calculated of rows is
in such files too, so that the memory it takes is the system's to take back; only the tables that come out are not.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.ngram_models.counting import MAX_ORDER, endings, read_counts, token_before, write_counts
from llm.data.documents.ngram_models.tables import UNIGRAM, build_table, keys_of
from llm.data.documents.ngram_models.tokens import BEGIN, BITS
from llm.errors import UserError

_FALLBACK = (0.5, 1.0, 1.5)
_ALL = slice(None)
# What a row takes while it is calculated.
_ROW_BYTES = 256


@dataclasses.dataclass(frozen=True)
class KneserNey:
    """What is estimated.

    Args:
        order: tokens of the longest n-grams, 2 to 6.
        prune: n-grams of 1, 2, 3, ... tokens that are there at most so often are left out; the last number goes for all
            longer ones. (0, 0, 1) leaves out those of three or more tokens that are there once. Of one token, all stay.
    """

    order: int = 5
    prune: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not 2 <= self.order <= MAX_ORDER:
            raise UserError(f'order = {self.order} is not from 2 to {MAX_ORDER}', where='KneserNey')
        if not self.prune or self.prune[0] != 0 or list(self.prune) != sorted(self.prune):
            raise UserError(
                f'prune = {self.prune} are not numbers that begin with 0 and do not fall', where='KneserNey'
            )

    def threshold(self, length: int) -> int:
        """What n-grams of this length must be above."""
        return self.prune[min(length, len(self.prune)) - 1]


class Estimate:
    """The estimation of one model, a length of n-grams after the other."""

    def __init__(self, config: KneserNey, directory: Path, num_tokens: Callable[[], int]):
        """Args:
        directory: for rows on disk. num_tokens: V, the ids there are once all text has been read.
        """
        self._config, self._directory, self._num_tokens = config, directory, num_tokens
        self._block = 1
        self.discounts: list[tuple[float, float, float]] = []
        self.fallbacks: list[int] = []

    def __call__(self, batches: Iterable[np.ndarray], memory_bytes: int) -> Iterator[np.ndarray]:
        """UNIGRAM [V], then the tables of longer n-grams.

        Args:
            batches: of ids of sentences.

        Raises:
            UserError: there is no token.
        """
        order = self._config.order
        self._block = max(1, memory_bytes // _ROW_BYTES)
        runs = write_counts(batches, order, self._directory / 'counts', memory_bytes)
        rows = _Rows(self._directory / 'rows', order)
        for some in read_counts(runs, memory_bytes):
            rows.add(some)
        for path, _ in runs:
            path.unlink()
        rows.close()
        if not rows.number(1):
            raise UserError('there is no text to estimate an n-gram model from', fix='Check the sources.')
        yield from self._tables(rows)

    def _tables(self, rows: '_Rows') -> Iterator[np.ndarray]:
        size, order = self._num_tokens(), self._config.order
        words = rows.column(1, 'key') - 1
        adjusted = np.zeros(size, np.int64)
        adjusted[words] = rows.adjusted(1, _ALL)
        self.discounts.append(self._discounts(1, np.bincount(np.minimum(adjusted, 5), minlength=6)))
        discounted = self._discounted(1, adjusted)
        total = adjusted.sum()
        # <s> is never predicted.
        probability = discounted / total + (total - discounted.sum()) / total / (size - 1)
        probability[BEGIN] = 1.0
        # By row of the n-grams one shorter: the place in their table, the last token, and the row of the context.
        places, last = np.arange(size), np.arange(size)
        shorter_context, keys, kept = np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.bool_)
        for n in range(2, order + 1):
            number = rows.number(n)
            context, longer_kept = self._array('context', n, number, np.int64), self._array('kept', n, number, np.bool_)
            sums, mass, backoff = (
                self._array(name, n, len(probability), np.float64) for name in ('sums', 'mass', 'backoff')
            )
            counts = np.zeros(6, np.int64)
            for some in self._blocks(number):
                counts += np.bincount(np.minimum(rows.adjusted(n, some), 5), minlength=6)
            self.discounts.append(self._discounts(n, counts))
            for some in self._blocks(number):
                first, parent = rows.first(n, some), rows.parent(n, some, words)
                context[some] = first if n == 2 else rows.find(n - 1, shorter_context[parent], first)
                longer_kept[some] = rows.column(n, 'raw')[some] > self._config.threshold(n)
                longer = rows.adjusted(n, some)
                np.add.at(sums, context[some], longer.astype(np.float64))
                given = np.where(longer_kept[some], longer - self._discounted(n, longer), longer)
                np.add.at(mass, context[some], given)
            for some in self._blocks(len(mass)):
                mass[some] /= np.maximum(sums[some], 1)
                # What is no context gives nothing away that anybody could ask for.
                backoff[some] = np.log10(np.where(mass[some] > 0, mass[some], 1))
            if n == 2:
                unigrams = np.zeros(size, UNIGRAM)
                unigrams['probability'], unigrams['backoff'] = np.log10(probability), backoff
                unigrams['probability'][BEGIN] = 0
                yield unigrams
            else:
                table, places = self._table(n - 1, keys, kept, probability, backoff)
                yield table
            keys, longer_last = self._array('keys', n, number, np.uint64), self._array('last', n, number, np.int64)
            shorter, probability = probability, self._array('probability', n, number, np.float64)
            for some in self._blocks(number):
                parent, there = rows.parent(n, some, words), context[some]
                longer_last[some] = last[parent]
                keys[some] = keys_of(places[there], longer_last[some])
                own = self._discounted(n, rows.adjusted(n, some)) / sums[there]
                probability[some] = own + mass[there] * shorter[parent]
            last, kept, shorter_context = longer_last, longer_kept, context
        yield self._table(order, keys, kept, probability, np.zeros(len(probability), np.float32))[0]

    def _blocks(self, number: int) -> Iterator[slice]:
        """All rows, a part at a time."""
        for start in range(0, number, self._block):
            yield slice(start, start + self._block)

    def _table(
        self, n: int, keys: np.ndarray, kept: np.ndarray, probability: np.ndarray, backoff: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(the table of n-grams that are kept, the place of each row in it; of others, that of none)."""
        rows = np.flatnonzero(kept)
        table, some = build_table(keys[rows], np.log10(probability[rows]).astype(np.float32), backoff[rows])
        places = self._array('places', n, len(keys), np.int64)
        places[rows] = some
        return table, places

    def _array(self, name: str, n: int, size: int, dtype: Any) -> np.ndarray:
        """Zeros, in a file: what the memory has no room for, the system takes out of it."""
        path = self._directory / f'{name}_{n}.bin'
        return np.memmap(path, dtype, 'w+', shape=(max(size, 1),))[:size]

    def _discounts(self, n: int, t: np.ndarray) -> tuple[float, float, float]:
        if (t[1:5] > 0).all():
            y = t[1] / (t[1] + 2 * t[2])
            found = tuple(float(k - (k + 1) * y * t[k + 1] / t[k]) for k in (1, 2, 3))
            if all(0 <= d <= k for k, d in enumerate(found, start=1)):
                return found[0], found[1], found[2]
        self.fallbacks.append(n)
        return _FALLBACK

    def _discounted(self, n: int, adjusted: np.ndarray) -> np.ndarray:
        """a - D(a), float64."""
        return adjusted - np.array([0.0, *self.discounts[n - 1]])[np.minimum(adjusted, 3)]


class _Rows:
    """N-grams of each length on disk, in order of their endings, put together from sorted counts piece by piece."""

    # key: the row of the n-gram without its first token, and that token as packed; of one token, the token itself.
    # raw: how often it is there. extensions: different tokens before it.
    _COLUMNS = ('key', 'raw', 'extensions')

    def __init__(self, directory: Path, order: int):
        self._directory, self._order = directory, order
        directory.mkdir(parents=True, exist_ok=True)
        self._files = {
            (n, name): (directory / f'{name}_{n}.bin').open('wb') for n in range(1, order + 1) for name in self._COLUMNS
        }
        # The last row of each length, to which the next piece may add.
        self._open = {n: np.zeros((3, 0), np.int64) for n in range(1, order + 1)}
        self._numbers = [0] * (order + 2)
        self._before: np.ndarray | None = None

    def add(self, some: np.ndarray) -> None:
        """COUNTED, sorted, each n-gram once, behind those of the pieces before."""
        with_last = some if self._before is None else np.concatenate([self._before, some])
        fresh = 0 if self._before is None else 1
        self._before = some[-1:]
        rows: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        for n in range(1, self._order + 1):
            high, low = endings(with_last, n)
            changed = np.ones(len(with_last), np.bool_)
            changed[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
            is_start = (changed & (token_before(with_last, n) > 0))[fresh:]
            starts.append(np.flatnonzero(is_start))
            rows.append(self._numbers[n] - 1 + np.cumsum(is_start))
        for n in range(1, self._order + 1):
            first = token_before(some, n)
            present, start, row = first > 0, starts[n - 1], rows[n - 1]
            last_before = self._numbers[n] - 1
            size = len(start) + 1
            raw = np.bincount(row[present] - last_before, weights=some['count'][present], minlength=size)
            extensions = np.zeros(size, np.int64)
            if n < self._order:
                extensions = np.bincount(row[starts[n]] - last_before, minlength=size)
            parent = rows[n - 2][start] if n > 1 else np.zeros(len(start), np.int64)
            new = np.stack([(parent << BITS) | first[start], raw[1:].astype(np.int64), extensions[1:].astype(np.int64)])
            waiting = self._open[n]
            waiting[1:] += np.array([[raw[0]], [extensions[0]]]).astype(np.int64)
            together = np.concatenate([waiting, new], axis=1)
            self._write(n, together[:, :-1])
            self._open[n] = together[:, -1:]
            self._numbers[n] += len(start)

    def _write(self, n: int, columns: np.ndarray) -> None:
        for name, column in zip(self._COLUMNS, columns, strict=True):
            column.tofile(self._files[n, name])

    def close(self) -> None:
        """Write what waits."""
        for n, waiting in self._open.items():
            self._write(n, waiting)
        for file in self._files.values():
            file.close()

    def number(self, n: int) -> int:
        """Of n-grams of this length."""
        return self._numbers[n]

    def column(self, n: int, name: str) -> np.ndarray:
        """int64, mapped from disk."""
        if not self._numbers[n]:
            return np.zeros(0, np.int64)
        return np.memmap(self._directory / f'{name}_{n}.bin', np.int64, 'r')

    def first(self, n: int, some: slice) -> np.ndarray:
        """Id of the first token of each."""
        return (self.column(n, 'key')[some] & ((1 << BITS) - 1)) - 1

    def parent(self, n: int, some: slice, words: np.ndarray) -> np.ndarray:
        """Row of the n-gram without its first token; for two tokens, the id of the other, which is words[row]."""
        rows = self.column(n, 'key')[some] >> BITS
        return words[rows] if n == 2 else rows

    def adjusted(self, n: int, some: slice) -> np.ndarray:
        """Adjusted counts."""
        raw = self.column(n, 'raw')[some]
        if n == self._order:
            return raw
        return np.where(self.first(n, some) == BEGIN, raw, self.column(n, 'extensions')[some])

    def find(self, n: int, parents: np.ndarray, first: np.ndarray) -> np.ndarray:
        """The rows of n-grams that are there, by their parents and first tokens."""
        keys = self.column(n, 'key')
        if n == 2:  # a parent is told by its token, and a row by its place among tokens
            tokens = self.column(1, 'key') - 1
            rows_of = np.zeros(int(tokens.max(initial=0)) + 1, np.int64)
            rows_of[tokens] = np.arange(len(tokens))
            parents = rows_of[parents]
        return np.searchsorted(keys, (parents << BITS) | (first + 1))
