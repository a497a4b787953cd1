"""Rules of FineWeb's own (Penedo et al. 2024, section 3.6), as datatrove's FineWebQualityFilter reads them."""

import dataclasses
import itertools

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.quality.batch import Batch
from llm.data.documents.quality.punctuation import TERMINAL
from llm.data.documents.quality.rules import Judgement, judged, share
from llm.data.documents.quality.words import offsets, sums


@dataclasses.dataclass(frozen=True)
class FineWebQuality:
    """Pages of lines without punctuation, of short lines, of repeated lines, or of lists. Blank lines do not count.

    Args:
        min_punctuated_lines: share of lines that end with one of `punctuation`.
        max_short_lines: share of lines of at most `short_line` characters.
        max_repeated_characters: share of the characters in lines that were there before.
        max_line_ends: line ends per word.
    """

    min_punctuated_lines: float | None = 0.12
    max_short_lines: float | None = 0.67
    short_line: int = 30
    max_repeated_characters: float | None = 0.01
    max_line_ends: float | None = 0.3
    punctuation: tuple[str, ...] = tuple(sorted(TERMINAL))

    name = 'fineweb'
    rules = tuple(f'fineweb/{rule}' for rule in ('punctuated_lines', 'short_lines', 'repeated_characters', 'line_ends'))

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        most = (self.max_short_lines, self.max_repeated_characters, self.max_line_ends)
        bounds = ((self.min_punctuated_lines, None), *((None, some) for some in most))
        return tuple(Bounds(rule, *bound) for rule, bound in zip(self.rules, bounds, strict=True))

    def judge(self, batch: Batch) -> Judgement:
        of_texts = [[line for line in text.split('\n') if line and not line.isspace()] for text in batch.texts]
        bounds = offsets(map(len, of_texts), len(of_texts))
        lines = list(itertools.chain.from_iterable(of_texts))
        ends = frozenset(self.punctuation)
        if all(len(end) == 1 for end in ends):
            punctuated = [line[-1] in ends for line in lines]
        else:
            punctuated = [line.endswith(self.punctuation) for line in lines]
        lengths = np.fromiter(map(len, lines), np.int64, len(lines))
        line_ends = batch.measure(lambda text: text.count('\n'))
        repeated = np.fromiter((repeated_characters(own)[1] for own in of_texts), np.float64, len(of_texts))
        num_lines = np.diff(bounds)
        values = (
            # A page without lines has none that are punctuated.
            np.nan_to_num(share(sums(np.array(punctuated, np.bool_), bounds), num_lines)),
            share(sums(lengths <= self.short_line, bounds), num_lines),
            share(repeated, batch.characters - line_ends),
            share(line_ends, batch.num_words),
        )
        return judged(values, self.bounds, batch)


def repeated_characters(parts: list[str]) -> tuple[int, int]:
    """(how many parts were there before, their characters)."""
    if len(set(parts)) == len(parts):
        return 0, 0
    seen: set[str] = set()
    repeated = characters = 0
    for part in parts:
        if part in seen:
            repeated += 1
            characters += len(part)
        seen.add(part)
    return repeated, characters
