"""How much of a text set aside is in what is trained on: equal documents, and runs of words that both have."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

import numpy as np

from llm.data.documents.deduplication.exact import digests, word_bytes
from llm.data.documents.deduplication.words import Hashes, ngrams, words_of

_BATCH = 256  # documents


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Of one set, beside one training text.

    Attributes:
        documents: of the set. equal: those of which the training text has a document of the same normalised words.
        touched: those that share a run of words with it. share: of the set's different runs, how many it has.
    """

    documents: int
    equal: int
    touched: int
    share: float


def overlaps(held_out: Mapping[str, Iterable[str]], training: Iterable[str], words: int = 13) -> dict[str, Overlap]:
    """The overlap of each set with a training text, which is read once; in memory are 16 bytes a word of the sets.

    Args:
        words: of a run, as n-grams of 13 for GPT-3 (Brown et al. 2020, appendix C); see
            `llm.data.documents.deduplication.words` for what a word is. A document of fewer has none.
    """
    sets = {name: words_of(list(texts)) for name, texts in held_out.items()}
    grams = {name: ngrams(some, words, whole=False) for name, some in sets.items()}
    wanted = np.unique(np.concatenate([some.values for some in grams.values()]))
    keys = {name: _keys(some) for name, some in sets.items()}
    equal_to = {key for some in keys.values() for key in some}
    seen, equal = np.zeros(len(wanted), bool), set()
    documents = iter(training)
    while batch := list(itertools.islice(documents, _BATCH)):
        found = words_of(batch)
        equal |= equal_to.intersection(_keys(found))
        hashes = np.unique(ngrams(found, words, whole=False).values)
        if len(wanted):
            places = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
            seen[places[wanted[places] == hashes]] = True
    return {name: _overlap(keys[name], equal, grams[name], wanted[seen]) for name in sets}


def _keys(words: Hashes) -> list[tuple[int, int] | None]:
    """Of each document, equal for equal words; None for one without."""
    first, second = digests(word_bytes(words))
    pairs = zip(first.tolist(), second.tolist(), words.counts.tolist(), strict=True)
    return [(a, b) if count else None for a, b, count in pairs]


def _overlap(keys: list[tuple[int, int] | None], equal: set, grams: Hashes, found: np.ndarray) -> Overlap:
    hits = np.isin(grams.values, found)
    owners = np.repeat(np.arange(len(grams)), grams.counts)
    different = np.unique(grams.values)
    return Overlap(
        documents=len(keys),
        equal=sum(key is not None and key in equal for key in keys),
        touched=len(np.unique(owners[hits])),
        share=len(np.intersect1d(different, found)) / max(1, len(different)),
    )
