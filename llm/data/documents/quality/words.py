"""Words as numbers: a piece between white space is divided once in a process; what is known of it is in arrays.

A table grows with the pieces that it has seen and is emptied when it is full; results never depend on what was in it.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from llm.data.documents.quality.english_words import split_words
from llm.data.documents.quality.punctuation import PUNCTUATION, SENTENCE_ENDS, is_punctuation

# Pieces that a table holds, about 300 bytes each, and characters of them: a piece may be a whole file in base 64.
_MOST_PIECES, _MOST_CHARACTERS = 400_000, 40_000_000
# What a word is to the end of a sentence.
ORDINARY, PUNCTUATED, ENDING = 0, 1, 2


class _Column:
    """An array that grows."""

    def __init__(self, dtype: type):
        self._array: np.ndarray = np.empty(1024, dtype)
        self._length = 0

    def extend(self, values: Sequence[int] | Sequence[bool]) -> None:
        end = self._length + len(values)
        if end > len(self._array):
            grown = np.empty(max(end, 2 * len(self._array)), self._array.dtype)
            grown[: self._length] = self._array[: self._length]
            self._array = grown
        self._array[self._length : end] = values
        self._length = end

    @property
    def array(self) -> np.ndarray:
        return self._array[: self._length]


class WordTable(dict[str, int]):
    """Piece -> its number; a piece is what stands between white space, and has one or more words.

    Attributes:
        words: word -> its number. of_piece: numbers of the words of all pieces, piece after piece.
        first, count: for each piece, where its words begin in `of_piece`, and how many they are.
        characters: of each piece; size: their sum.
        word_characters, has_letter, has_symbols_only, kind: of each word; `kind` is ORDINARY, PUNCTUATED or ENDING.
    """

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self.size = 0
        self._of_piece, self._first, self._count, self._characters = (_Column(np.int32) for _ in range(4))
        self._word_characters, self._has_letter = _Column(np.int32), _Column(np.bool_)
        self._symbols_only, self._kind = _Column(np.bool_), _Column(np.int8)

    def numbers(self, pieces: Sequence[str]) -> np.ndarray:
        """The number of each of different pieces; those that are new are added."""
        known = list(map(self.get, pieces))
        if None in known:
            self._add([piece for piece, number in zip(pieces, known, strict=True) if number is None])
            known = list(map(self.get, pieces))
        return np.array(known, np.int32)

    def _add(self, pieces: list[str]) -> None:
        split = [split_words(piece) for piece in pieces]
        flat = list(itertools.chain.from_iterable(split))
        new = [word for word in dict.fromkeys(flat) if word not in self.words]
        self.words.update(zip(new, range(len(self.words), len(self.words) + len(new)), strict=True))
        self._word_characters.extend(list(map(len, new)))
        letters, alphanumeric = list(map(str.isalpha, new)), list(map(str.isalnum, new))
        symbols_only, kinds = [False] * len(new), [ORDINARY] * len(new)
        for i, word in enumerate(new):
            if not letters[i]:
                letters[i] = any(map(str.isalpha, word))
                if not alphanumeric[i]:
                    symbols_only[i] = PUNCTUATION.issuperset(word)
                    kinds[i] = ENDING if word in SENTENCE_ENDS else PUNCTUATED if is_punctuation(word) else ORDINARY
        self._has_letter.extend(letters)
        self._symbols_only.extend(symbols_only)
        self._kind.extend(kinds)
        counts = np.fromiter(map(len, split), np.int32, len(split))
        self._first.extend((np.cumsum(counts) - counts + len(self._of_piece.array)).tolist())
        self._count.extend(counts.tolist())
        lengths = list(map(len, pieces))
        self._characters.extend(lengths)
        self.size += sum(lengths)
        self._of_piece.extend(list(map(self.words.__getitem__, flat)))
        self.update(zip(pieces, range(len(self), len(self) + len(pieces)), strict=True))

    of_piece = property(lambda self: self._of_piece.array)
    first = property(lambda self: self._first.array)
    count = property(lambda self: self._count.array)
    characters = property(lambda self: self._characters.array)
    word_characters = property(lambda self: self._word_characters.array)
    has_letter = property(lambda self: self._has_letter.array)
    symbols_only = property(lambda self: self._symbols_only.array)
    kind = property(lambda self: self._kind.array)


_table = WordTable()


def word_table() -> WordTable:
    """The table of this process; a new one when it has become too large."""
    if len(_table) > _MOST_PIECES or _table.size > _MOST_CHARACTERS:
        empty_table()
    return _table


def empty_table() -> None:
    """Forget all words; results do not change."""
    global _table  # noqa: PLW0603 (one table for all batches is the point)
    _table = WordTable()


def offsets(lengths: Iterable[int] | np.ndarray, count: int) -> np.ndarray:
    """Where each of consecutive parts begins, and the end of the last: [count + 1]."""
    result = np.zeros(count + 1, np.int64)
    values = lengths if isinstance(lengths, np.ndarray) else np.fromiter(lengths, np.int64, count)
    np.cumsum(values, out=result[1:])
    return result


def sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sum of each part of `values`, of which `bounds` has the beginnings and the end; empty parts are 0."""
    total = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=total[1:])
    return total[bounds[1:]] - total[bounds[:-1]]
