"""Line-wise corrections of RefinedWeb (Penedo et al. 2023, section G.2): lines of menus, counters and buttons go."""

import dataclasses
import itertools
import re

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.quality.batch import Batch, characters_that, code_points
from llm.data.documents.quality.rules import Judgement, judged, share
from llm.data.documents.quality.words import offsets, sums

# The paper's example is '3 likes'; what is counted is as in DCLM's reading (Li et al. 2024).
_COUNTER = re.compile(
    r'\W*\d[\d,.]*[kmb]?\s+(?:likes|shares|comments|retweets|reposts|quotes|bookmarks|upvotes|downvotes|downloads|views'
    r'|followers)\W*',
    re.IGNORECASE,
)
# Taken out of short lines: at the beginning, at the end, anywhere.
_BUTTONS = re.compile(r'^sign[ -]?in\b|read more(?:\.\.\.|…)?$|\d*\s*items in cart', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class RefinedWebLines:
    """Removes lines mainly of capitals, of digits only, of one word, or that count likes; takes buttons out of others.

    A word is what stands between white space; blank lines stay.

    Args:
        max_uppercase: share of a line's characters that are capitals, for the line to stay.
        min_line_words: for the line to stay.
        short_line: words of a line of which a button's text is taken out.
        max_flagged_words: share of the text's words in lines that were removed or changed, for the text to stay.
    """

    max_uppercase: float = 0.5
    min_line_words: int = 2
    short_line: int = 10
    max_flagged_words: float | None = 0.05

    name = 'refinedweb'
    rules = ('refinedweb/flagged_words',)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        return (Bounds(self.rules[0], most=self.max_flagged_words),)

    def judge(self, batch: Batch) -> Judgement:
        of_texts = [text.split('\n') for text in batch.texts]
        bounds = offsets(map(len, of_texts), len(of_texts))
        lines = list(itertools.chain.from_iterable(of_texts))
        num_words = np.fromiter((len(line.split()) for line in lines), np.int64, len(lines))
        capitals = characters_that(str.isupper)[code_points(''.join(lines))]
        uppercase = sums(capitals, offsets(map(len, lines), len(lines)))
        corrected = [
            self._correct(line, capitals, words)
            for line, capitals, words in zip(lines, uppercase.tolist(), num_words.tolist(), strict=True)
        ]
        flagged = np.fromiter((new != old for new, old in zip(corrected, lines, strict=True)), np.bool_, len(lines))
        flagged_words = share(sums(np.where(flagged, num_words, 0), bounds), sums(num_words, bounds))
        texts = [
            '\n'.join(line for line in corrected[first:end] if line is not None).strip() if changed else text
            for text, changed, first, end in zip(
                batch.texts, sums(flagged, bounds).tolist(), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True
            )
        ]
        return judged((flagged_words,), self.bounds, Batch(batch.documents, texts))

    def _correct(self, line: str, capitals: int, num_words: int) -> str | None:
        """The line as it stays, None where it goes."""
        if not num_words:
            return line
        if num_words < self.min_line_words or capitals > self.max_uppercase * len(line) or _is_number(line):
            return None
        if num_words > self.short_line:
            return line
        if _COUNTER.fullmatch(line):
            return None
        without = _BUTTONS.sub('', line.strip())
        return line if without == line.strip() else without.strip() or None


def _is_number(line: str) -> bool:
    return all(piece.strip('.,').isdigit() for piece in line.split())
