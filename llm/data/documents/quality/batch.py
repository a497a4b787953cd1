"""A batch of texts, split once for all rules: lines, pieces between white space, words; and arrays of characters."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from llm.data.documents.document import Document
from llm.data.documents.quality.words import WordTable, offsets, sums, word_table


@dataclasses.dataclass(frozen=True)
class Words:
    """Words of all lines of a batch.

    Attributes:
        table: what the numbers mean.
        pieces: number of each piece between white space. piece_bounds: [lines + 1], where those of a line begin.
        words: number of each word. of_lines, of_documents: [lines + 1] and [documents + 1], where theirs begin.
    """

    table: WordTable
    pieces: np.ndarray
    piece_bounds: np.ndarray
    words: np.ndarray
    of_lines: np.ndarray
    of_documents: np.ndarray


class Batch:
    """Documents and their texts as the rules before have left them; what is computed of them is kept.

    Args:
        documents: [D]. texts: [D], in place of the documents' own.
        num_words: [D], if it is known already.
    """

    def __init__(
        self, documents: Sequence[Document], texts: Sequence[str] | None = None, num_words: np.ndarray | None = None
    ):
        self.documents = documents
        self.texts = [document.text for document in documents] if texts is None else texts
        self._num_words = num_words

    def take(self, which: np.ndarray) -> 'Batch':
        """Some of the documents."""
        return Batch([self.documents[i] for i in which], [self.texts[i] for i in which])

    def measure(self, function: Callable[[str], float]) -> np.ndarray:
        """[D]: a figure of each text."""
        return np.fromiter(map(function, self.texts), np.float64, len(self.texts))

    @functools.cached_property
    def characters(self) -> np.ndarray:
        """[D]: of each text."""
        return self.measure(len)

    @functools.cached_property
    def _split_lines(self) -> list[list[str]]:
        return [text.splitlines() for text in self.texts]

    @functools.cached_property
    def lines(self) -> list[str]:
        """Lines of all texts, however they end; `line_bounds` has where those of a text begin: [D + 1]."""
        return list(itertools.chain.from_iterable(self._split_lines))

    @functools.cached_property
    def line_bounds(self) -> np.ndarray:
        """[D + 1]."""
        return offsets(map(len, self._split_lines), len(self.texts))

    @functools.cached_property
    def words(self) -> Words:
        """All words."""
        return self.words_of(self.lines, self.line_bounds)

    @staticmethod
    def words_of(lines: Sequence[str], line_bounds: np.ndarray) -> Words:
        """The words of lines, with the bounds of documents in them."""
        table = word_table()
        pieces, piece_bounds, unique = _split(lines)
        pieces = table.numbers(unique)[pieces]
        counts = table.count[pieces]
        word_bounds = offsets(counts, len(pieces))
        if word_bounds[-1] == len(pieces):
            words = table.of_piece[table.first[pieces]]
        else:
            words = table.of_piece[
                np.repeat(table.first[pieces] - word_bounds[:-1], counts) + np.arange(word_bounds[-1])
            ]
        of_lines = word_bounds[piece_bounds]
        return Words(table, pieces, piece_bounds, words, of_lines, of_lines[line_bounds])

    @functools.cached_property
    def num_words(self) -> np.ndarray:
        """[D]."""
        return np.diff(self.words.of_documents) if self._num_words is None else self._num_words

    def lines_that(self, hold: Callable[[str], bool]) -> np.ndarray:
        """[D]: the number of lines of which something holds."""
        return sums(np.fromiter(map(hold, self.lines), np.bool_, len(self.lines)), self.line_bounds)

    @functools.cached_property
    def code_points(self) -> np.ndarray:
        """The characters of all texts, one after the other; `character_bounds` has where those of a text begin."""
        return code_points(''.join(self.texts))

    @functools.cached_property
    def character_bounds(self) -> np.ndarray:
        """[D + 1]."""
        return offsets(map(len, self.texts), len(self.texts))


def _split(lines: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(index of each piece between white space, where those of each line begin, the different pieces)."""
    import pyarrow
    import pyarrow.compute

    # White space is as in str.split, apart from the empty pieces before and behind it.
    split = pyarrow.compute.utf8_split_whitespace(pyarrow.array(lines, pyarrow.large_string()))
    encoded = split.values.dictionary_encode()
    pieces, unique = encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary.to_pylist()
    bounds = split.offsets.to_numpy().astype(np.int64)
    if '' in unique:
        empty = pieces == unique.index('')
        bounds -= offsets(empty, len(pieces))[bounds]
        pieces = pieces[~empty]
    return pieces, bounds, unique


def code_points(text: str) -> np.ndarray:
    """[characters]: the code point of each."""
    if text.isascii():
        return np.frombuffer(text.encode('ascii'), np.uint8)
    return np.frombuffer(text.encode('utf-32-le'), np.uint32)


@functools.cache
def characters_that(holds: Callable[[str], bool]) -> np.ndarray:
    """[1,114,112]: for each code point, whether something holds of the character, as `str.isupper`."""
    return np.fromiter(map(holds, map(chr, range(0x110000))), np.bool_, 0x110000)
