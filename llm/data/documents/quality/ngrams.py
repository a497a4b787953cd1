"""Repeated n-grams of words within each document of a batch, found by sorting hashes of all documents at once.

An n-gram can only be repeated where the (n-1)-gram with which it begins is, so each length looks at what the one before
has left. Hashes have 64 bits: among a million n-grams two different ones are taken for one with a chance of 3e-8.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from llm.data.documents.quality.batch import Words

_MULTIPLIER, _MIX, _SALT = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)

_POSITION_BITS = 40
_LAST_POSITION = (1 << _POSITION_BITS) - 1


@dataclasses.dataclass(frozen=True)
class Repeated:
    """N-grams that a document has more than once.

    Attributes:
        positions: [R], where one of them begins, among the words of the batch, rising.
        groups: [R], equal for the occurrences of one n-gram in one document.
        characters: [W + 1], of the words before each word.
        n: its words.
    """

    n: int
    positions: np.ndarray
    groups: np.ndarray
    characters: np.ndarray

    def lengths(self, positions: np.ndarray) -> np.ndarray:
        """Characters of the n-grams that begin there, without spaces."""
        return self.characters[positions + self.n] - self.characters[positions]


def repeated_ngrams(words: Words, lengths: Sequence[int]) -> Iterator[Repeated]:
    """Those of each length, of which there are rising ones."""
    bounds = words.of_documents
    sizes = np.diff(bounds)
    ends = np.repeat(bounds[1:], sizes)
    characters = np.zeros(len(words.words) + 1, np.int64)
    np.cumsum(words.table.word_characters[words.words], out=characters[1:])
    hashes = _mixed(np.arange(len(words.table.words), dtype=np.uint64))[words.words]
    # Of the 1-grams that are there already; the document is part of them.
    n, positions = 1, np.arange(0)
    keys = hashes + np.repeat(_mixed(np.arange(len(sizes), dtype=np.uint64) * _SALT), sizes)
    for wanted in lengths:
        while n < wanted:
            if n == 1:  # all positions are there but the last of each document
                inside = np.ones(max(len(hashes) - 1, 0), np.bool_)
                inside[bounds[1:-1][(bounds[1:-1] > 0) & (bounds[1:-1] < len(hashes))] - 1] = False
                keys = (keys[:-1] * _MULTIPLIER + hashes[1:])[inside]
                positions = np.flatnonzero(inside)
            else:
                fits = np.flatnonzero(positions + n < ends[positions])
                positions = positions[fits]
                keys = keys[fits] * _MULTIPLIER + hashes[positions + n]
            n += 1
        positions, keys, groups = _repeated(positions, keys)
        yield Repeated(n, positions, groups, characters)


def _mixed(values: np.ndarray) -> np.ndarray:
    mixed = (values + np.uint64(1)) * _MIX
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MULTIPLIER
    return mixed ^ (mixed >> np.uint64(29))


def _repeated(positions: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(positions, keys, groups) of the keys that are there more than once."""
    if len(keys) > 1000:  # most are alone in one of many boxes, and need no sorting
        bits = len(keys).bit_length() + 2
        boxes = (keys >> np.uint64(64 - bits)).view(np.int64)
        crowded = np.flatnonzero((np.bincount(boxes) > 1)[boxes])
        positions, keys = positions[crowded], keys[crowded]
    order = np.argsort(keys)
    ordered = keys[order]
    same = np.empty(len(keys) + 1, np.bool_)
    same[:1] = same[-1:] = False
    same[1:-1] = ordered[1:] == ordered[:-1]
    groups = np.empty(len(keys), np.int64)
    groups[order] = np.cumsum(~same[:-1])
    repeated = np.empty(len(keys), np.bool_)
    repeated[order] = same[:-1] | same[1:]
    return positions[repeated], keys[repeated], groups[repeated]


def top_characters(repeated: Repeated, words: Words) -> np.ndarray:
    """[D]: characters, with spaces, of the occurrences of each document's most frequent n-gram; NaN without n-grams.

    Of several that are equally frequent the first counts.
    """
    n, starts = repeated.n, words.of_documents[:-1]
    has = np.diff(words.of_documents) >= n
    top = np.full(len(starts), np.nan)
    top[has] = repeated.lengths(starts[has]) + n - 1  # the first n-gram, if none is repeated
    if not len(repeated.positions):
        return top
    counts = np.bincount(repeated.groups)
    first = np.empty(len(counts), np.int64)
    first[repeated.groups[::-1]] = repeated.positions[::-1]  # what is written last, the first occurrence, stays
    first = first[counts > 0]
    # The largest is the most frequent one of a document, of those the one that begins first.
    order = (counts[counts > 0] << _POSITION_BITS) + (_LAST_POSITION - first)
    largest = np.zeros(len(starts), np.int64)
    np.maximum.at(largest, np.searchsorted(starts, first, side='right') - 1, order)
    found = largest > 0
    first = _LAST_POSITION - (largest[found] & _LAST_POSITION)
    top[found] = (largest[found] >> _POSITION_BITS) * (repeated.lengths(first) + n - 1)
    return top


def repeated_characters(repeated: Repeated, words: Words) -> np.ndarray:
    """[D]: characters, without spaces, in n-grams that were there before, no character counted twice.

    A document is read from its beginning: behind an n-gram that was there before, reading goes on after it.
    """
    total = np.zeros(len(words.of_documents) - 1, np.int64)
    lengths = repeated.lengths(repeated.positions).tolist()
    positions, groups = repeated.positions.tolist(), repeated.groups.tolist()
    bounds = np.searchsorted(repeated.positions, words.of_documents).tolist()
    for document in np.flatnonzero(np.diff(bounds)).tolist():
        seen: set[int] = set()
        next_position = characters = 0
        for i in range(bounds[document], bounds[document + 1]):
            if positions[i] < next_position:
                continue
            if groups[i] in seen:
                characters += lengths[i]
                next_position = positions[i] + repeated.n
            else:
                seen.add(groups[i])
        total[document] = characters
    return total
