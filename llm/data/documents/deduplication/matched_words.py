"""Words of an evaluation item that long runs in a document match, as Llama 2 and Llama 3 measured contamination."""

import dataclasses

import numpy as np

from llm.data.documents.deduplication.words import Hashes, ngrams
from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class MatchedWords:
    """A document goes if at least `share` of an item's words are in runs that it has too.

    As it stands, Llama 2's (Touvron et al. 2023, appendix A.6): runs of more than ten tokens, in which up to four may
    differ, but none of the first ten and not the last; an item of which 80 % are matched is dirty. With words = 8 and
    differing = 0 Llama 3's (Dubey et al. 2024, section 5.1.4), who chose the share for each set. A word that differs is
    not matched. Items of fewer than `words` words are not looked for.

    Args:
        words: that a run has at least. differing: of a run, at most. exact: the first words, of which none may differ.
        share: of an item's words, above 0 and at most 1.
    """

    words: int = 11
    differing: int = 4
    exact: int = 10
    share: float = 0.8

    name = 'matched_words'

    def __post_init__(self) -> None:
        if not 1 <= self.exact <= self.words or self.differing < 0 or not 0 < self.share <= 1:
            raise UserError(
                'exact must be from 1 to words, differing not negative, and share above 0 and at most 1',
                where='MatchedWords',
            )

    @property
    def anchor(self) -> int:
        """Words that every run begins with, exactly."""
        return self.exact if self.differing else self.words


def matched(document: np.ndarray, item: np.ndarray, rule: MatchedWords) -> tuple[dict[int, int], np.ndarray]:
    """The runs of a document that match, and what they match of an item.

    Args:
        document, item: uint64 hashes of their words, in order.

    Returns:
        Where a run begins in the document -> its length in words; and bool [words of the item], which are matched.
    """
    here, there = (
        ngrams(Hashes(some, np.array([0, len(some)])), rule.anchor, whole=False).values for some in (document, item)
    )
    places: dict[int, list[int]] = {}
    for place in np.flatnonzero(np.isin(here, there)).tolist():
        places.setdefault(int(here[place]), []).append(place)
    runs: dict[int, int] = {}
    found = np.zeros(len(item), bool)
    for i, gram in enumerate(there.tolist()):
        for place in places.get(gram, ()):
            if i and place and item[i - 1] == document[place - 1]:
                continue  # a run from the word before goes as far
            length = min(len(item) - i, len(document) - place)
            same = item[i : i + length] == document[place : place + length]
            ends = np.flatnonzero(same & (np.cumsum(~same) <= rule.differing))
            if (run := int(ends[-1]) + 1) >= rule.words:
                found[i : i + run] |= same[:run]
                runs[place] = max(run, runs.get(place, 0))
    return runs, found
