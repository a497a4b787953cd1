"""Lines, paragraphs and passages that come up again and again in a corpus, and what is left of a text without them.

Lee et al. (2022) remove every substring of 50 tokens or more that is in the corpus twice, found by a suffix array. What
such substrings cover is exactly what windows of 50 tokens that are there twice cover, and these are found by hashes, in
partitions. Two windows are taken to be equal where 96 bits of two independent hashes are.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from llm.data.documents.deduplication.sorted_runs import group_sizes, group_starts, in_groups
from llm.data.documents.deduplication.words import Hashes, checks, mixed, ngrams
from llm.errors import UserError

Span = tuple[int, int]
_SPLITS = {'lines': re.compile(r'\n'), 'paragraphs': re.compile(r'\n[ \t]*\n\s*')}


@dataclasses.dataclass(frozen=True)
class Repeats:
    """What is repeated over the corpus is taken out of documents, or takes documents out.

    Args:
        unit: 'lines', 'paragraphs' (between blank lines), or 'passages' (any run of `words` words).
        occurrences: how often it is in the corpus at least.
        words: of a passage; the least that a line or a paragraph has.
        keep_first: whether it stays where it is first, in the most preferred document; False takes it out everywhere.
        remove: 'spans' cuts it out of the text; 'documents' removes a document of which more than `share` is such.
        share: from 0 to 1, of the characters. With 'spans' a document goes as well when more than that is cut out.
    """

    unit: Literal['lines', 'paragraphs', 'passages'] = 'passages'
    occurrences: int = 2
    words: int = 50
    keep_first: bool = True
    remove: Literal['spans', 'documents'] = 'spans'
    share: float = 0.8

    def __post_init__(self) -> None:
        if self.occurrences < 2 or self.words < 1 or not 0 <= self.share <= 1:
            raise UserError('occurrences must be 2 or more, words positive, and share from 0 to 1', where='Repeats')


@dataclasses.dataclass(frozen=True)
class Units:
    """The lines, paragraphs or windows of a batch of documents.

    Attributes:
        keys, checks: uint64 and uint32 [total], two hashes of each. counts: int64 [documents].
        indexes: uint32 [total]: which of the document's, in order.
    """

    keys: np.ndarray
    checks: np.ndarray
    indexes: np.ndarray
    counts: np.ndarray


def pieces(unit: str, text: str) -> list[Span]:
    """Where the lines or paragraphs of a text are, with the line end behind each."""
    ends = [match.end() for match in _SPLITS[unit].finditer(text)]
    spans = zip([0, *ends], [*ends, len(text)], strict=True)
    return [(start, end) for start, end in spans if end > start]


def windows(words: Hashes, length: int) -> Units:
    """All runs of `length` words."""
    found = ngrams(words, length, whole=False)
    indexes = np.arange(len(found.values)) - np.repeat(found.offsets[:-1], found.counts)
    return Units(found.values, checks(words, length), indexes.astype(np.uint32), found.counts)


def lines(unit: str, texts: Sequence[str], tokenized: Hashes, least: int) -> Units:
    """Lines or paragraphs of at least so many words.

    Args:
        tokenized: the words of all pieces of all texts, one piece after the other.
    """
    numbers = np.array([len(pieces(unit, text)) for text in texts], np.int64)
    ends = np.cumsum(numbers)
    indexes = np.arange(len(tokenized)) - np.repeat(ends - numbers, numbers)
    keys, second = _sequence_hashes(tokenized)
    long = tokenized.counts >= least
    owners = np.repeat(np.arange(len(texts)), numbers)[long]
    counts = np.bincount(owners, minlength=len(texts))
    return Units(keys[long], second[long], indexes[long].astype(np.uint32), counts)


def _sequence_hashes(words: Hashes) -> tuple[np.ndarray, np.ndarray]:
    """Two hashes of each sequence of words, whatever its length: sums over words of a hash of word and place."""
    places = (np.arange(len(words.values)) - np.repeat(words.offsets[:-1], words.counts)).astype(np.uint64)
    sums = []
    for salt in (1, 2):
        each = mixed(words.values + mixed(places + np.uint64(salt << 32)))
        ends = np.concatenate([np.zeros(1, np.uint64), np.cumsum(each, dtype=np.uint64)])[words.offsets]
        sums.append(mixed(ends[1:] - ends[:-1] + words.counts.astype(np.uint64)))
    return sums[0], (sums[1] >> np.uint64(32)).astype(np.uint32)


def repeated(
    keys: np.ndarray, second: np.ndarray, nodes: np.ndarray, indexes: np.ndarray, *, occurrences: int, keep_first: bool
) -> np.ndarray:
    """Which of these units are to go, as positions in the arrays.

    Args:
        keys, second, nodes, indexes: of units, all of a key together, sorted by key.
    """
    often = in_groups(keys, occurrences)
    order = often[np.lexsort((indexes[often], nodes[often], second[often], keys[often]))]
    starts = group_starts(keys[order], second[order])
    sizes = group_sizes(starts, len(order))
    goes = np.repeat(sizes >= occurrences, sizes)
    if keep_first:
        goes[starts] = False
    return order[goes]


def united(spans: Sequence[Span]) -> list[Span]:
    """Spans that overlap or touch, put together and sorted."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


def spans_of(unit: str, text: str, words: Sequence[Span], indexes: Sequence[int], length: int) -> list[Span]:
    """What the units of these indexes cover of a text, in characters.

    Args:
        words: where the words are, as `word_spans` says; of passages alone.
    """
    if unit != 'passages':
        found = pieces(unit, text)
        return united([found[index] for index in indexes])
    covered = united([(index, index + length) for index in indexes])
    return united([(words[first][0], words[last - 1][1]) for first, last in covered])


def without(text: str, spans: Sequence[Span]) -> str:
    """A text without these spans, which are united; one space, not two or none, is left where one was cut out."""
    kept: list[str] = []
    position = 0
    for start, end in [*spans, (len(text), len(text))]:
        part = text[position:start]
        if not kept or kept[-1][-1].isspace():
            part = part.lstrip(' ')
        elif part and not part[0].isspace():
            part = f' {part}'
        if part:
            kept.append(part)
        position = end
    return ''.join(kept).strip()
