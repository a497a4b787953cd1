"""Texts as sparse vectors of hashed n-grams, for linear classifiers: as fastText (Joulin et al. 2017) and HashingTF do.

Words are those of deduplication: lower case, no punctuation, no accents, a character each where a script has no spaces.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from llm.data.documents.deduplication.words import Hashes, ngrams, normalized, words_of
from llm.data.documents.quality.batch import code_points
from llm.errors import UserError

TERM_FREQUENCIES, NORMS = ('count', 'log', 'binary'), ('l2', 'mean', 'none')
_MOST_BUCKETS = 1 << 26
# Between word n-grams and those of characters: equal hashes of both kinds would be equal features.
_CHARACTERS = np.uint64(0xA0761D6478BD642F)


@dataclasses.dataclass(frozen=True)
class Sparse:
    """Sparse rows, as in SciPy's CSR.

    Attributes:
        indices: int32 [N], the bucket of each feature; within a row each once, rising.
        values: float32 [N]. offsets: int64 [rows + 1]: row i has indices[offsets[i]:offsets[i + 1]].
    """

    indices: np.ndarray
    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def rows(self) -> np.ndarray:
        """int64 [N]: the row of each feature."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


@dataclasses.dataclass(frozen=True)
class NgramFeatures:
    """Which n-grams are features, and what their values are.

    A value is made of the number of times that the n-gram is in the text, then all values of a text are scaled.

    Args:
        word_ngrams: all runs of 1 to so many words; 0 takes no words.
        character_ngrams: (shortest, longest) runs of characters within a word with its boundaries, as fastText's
            subwords; () takes none.
        buckets: a power of two; n-grams of one hash modulo this are one feature.
        term_frequency: 'count', 'log' (1 + ln count) or 'binary'.
        norm: 'l2' (length 1), 'mean' (divided by their sum: fastText's mean of vectors), 'none' (HashingTF of GPT-3).
    """

    word_ngrams: int = 2
    character_ngrams: tuple[int, ...] = ()
    buckets: int = 1 << 20
    term_frequency: str = 'log'
    norm: str = 'l2'

    def __post_init__(self) -> None:
        if not 2 <= self.buckets <= _MOST_BUCKETS or self.buckets & (self.buckets - 1):
            raise UserError(
                f'buckets = {self.buckets} is no power of two from 2 to {_MOST_BUCKETS}', where='NgramFeatures'
            )
        if self.term_frequency not in TERM_FREQUENCIES or self.norm not in NORMS:
            raise UserError(
                f'term_frequency {self.term_frequency!r} with norm {self.norm!r} is not known',
                where='NgramFeatures',
                fix=f'There are {", ".join(TERM_FREQUENCIES)}, and {", ".join(NORMS)}.',
            )
        if not 0 <= self.word_ngrams <= 5:
            raise UserError(f'word_ngrams = {self.word_ngrams} is not from 0 to 5', where='NgramFeatures')
        characters = self.character_ngrams
        if characters and (len(characters) != 2 or not 2 <= characters[0] <= characters[1] <= 10):
            raise UserError(
                f'character_ngrams = {characters} is not (shortest, longest) from 2 to 10', where='NgramFeatures'
            )
        if not self.word_ngrams and not characters:
            raise UserError('there are neither n-grams of words nor of characters', where='NgramFeatures')

    def __call__(self, texts: Sequence[str]) -> Sparse:
        """The features of each text; a text without words has none. What is said of one does not depend on others."""
        parts = self._ngrams(texts)
        owners = np.concatenate([np.repeat(np.arange(len(texts)), part.counts) for part in parts])
        hashes = np.concatenate([part.values for part in parts])
        bits = self.buckets.bit_length() - 1
        # Sorted by text, then bucket. Four bytes a key sort twice as fast where they are enough.
        dtype: type = np.uint32 if len(texts) << bits <= 1 << 32 else np.uint64
        keys = (owners.astype(dtype) << dtype(bits)) | (hashes >> np.uint64(64 - bits)).astype(dtype)
        keys.sort()
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
        counts = np.diff(first, append=len(keys))
        keys = keys[first]
        offsets = np.searchsorted(keys, np.arange(len(texts) + 1).astype(np.uint64) << np.uint64(bits))
        indices = (keys & dtype(self.buckets - 1)).astype(np.int32)
        return Sparse(indices, self._values(counts, offsets), offsets.astype(np.int64))

    def _values(self, counts: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        values = counts.astype(np.float32)
        if self.term_frequency == 'binary':
            values[:] = 1
        elif self.term_frequency == 'log':
            values = 1 + np.log(values)
        if self.norm == 'none' or not len(values):
            return values
        # A sum of its own for each text, so that no other text changes its rounding.
        sizes = np.diff(offsets)
        full = sizes > 0
        squares = values * values if self.norm == 'l2' else values
        sums = np.ones(len(sizes), np.float32)
        sums[full] = np.add.reduceat(squares, offsets[:-1][full])
        return values / np.repeat(np.sqrt(sums) if self.norm == 'l2' else sums, sizes)

    def _ngrams(self, texts: Sequence[str]) -> list[Hashes]:
        parts = []
        if self.word_ngrams:
            words = words_of(texts)
            parts = [ngrams(words, n, whole=False) for n in range(1, self.word_ngrams + 1)]
        if self.character_ngrams:
            characters, space = _characters(texts)
            shortest, longest = self.character_ngrams
            spaces = np.concatenate([[0], np.cumsum(space)])
            parts += [_within_words(characters, spaces, n) for n in range(shortest, longest + 1)]
        return parts

    def strings(self, text: str) -> list[tuple[str, int]]:
        """(n-gram, its bucket) of one text, for people: characters begin with '~' and end where the n-gram does."""
        shift = np.uint64(64 - (self.buckets.bit_length() - 1))
        found: list[tuple[str, int]] = []
        words = _normalized_words([text])[0].split()
        parts = self._ngrams([text])
        for n in range(1, self.word_ngrams + 1):
            runs = [' '.join(words[i : i + n]) for i in range(len(words) - n + 1)]
            found += zip(runs, (parts[n - 1].values >> shift).tolist(), strict=True)
        if self.character_ngrams:
            padded = _padded(words)
            for n, part in zip(range(*_through(self.character_ngrams)), parts[self.word_ngrams :], strict=True):
                runs = [padded[i : i + n] for i in range(len(padded) - n + 1)]
                inside = [f'~{run}~' for run in runs if ' ' not in run[1:-1]]
                found += zip(inside, (part.values >> shift).tolist(), strict=True)
        return found


def _through(bounds: tuple[int, ...]) -> tuple[int, int]:
    return bounds[0], bounds[1] + 1


def _normalized_words(texts: Sequence[str]) -> list[str]:
    column: list[str] = normalized(texts).to_pylist()
    return column


def _padded(words: Sequence[str]) -> str:
    return f' {" ".join(words)} ' if words else ''


def _characters(texts: Sequence[str]) -> tuple[Hashes, np.ndarray]:
    """(code points of the words of each text with single spaces between and around, whether each is a space)."""
    padded = [_padded(text.split()) for text in _normalized_words(texts)]
    points = code_points(''.join(padded))
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in padded], dtype=np.int64)])
    return Hashes(points.astype(np.uint64) ^ _CHARACTERS, offsets), points == ord(' ')


def _within_words(characters: Hashes, spaces: np.ndarray, n: int) -> Hashes:
    """N-grams of characters that have a space at most at their ends; `spaces` has how many are before each."""
    found = ngrams(characters, n, whole=False)
    starts = np.arange(len(found.values)) + np.repeat(characters.offsets[:-1] - found.offsets[:-1], found.counts)
    inside = spaces[starts + n - 1] == spaces[starts + 1]
    kept = np.concatenate([[0], np.cumsum(inside)])[found.offsets]
    return Hashes(found.values[inside], kept)
