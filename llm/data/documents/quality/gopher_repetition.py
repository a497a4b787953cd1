"""Rules of repetition of Gopher (Rae et al. 2021, table A1), as datatrove's GopherRepetitionFilter reads them."""

import dataclasses

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.quality.batch import Batch
from llm.data.documents.quality.fineweb import repeated_characters as repeated_parts
from llm.data.documents.quality.ngrams import repeated_characters, repeated_ngrams, top_characters
from llm.data.documents.quality.rules import Judgement, judged, share
from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class GopherRepetition:
    """Shares of a text that repeat what was there before: paragraphs, lines, n-grams of words.

    Args:
        max_paragraphs, max_lines: of the number of paragraphs and lines.
        max_paragraph_characters, max_line_characters: of the characters of the text.
        max_top_ngrams: (n, share of the characters): of the most frequent n-gram.
        max_repeated_ngrams: (n, share of the characters): of all n-grams that were there before. A text of which the
            words in another division give the same characters does not repeat them, as it would to datatrove.
    """

    max_paragraphs: float | None = 0.3
    max_paragraph_characters: float | None = 0.2
    max_lines: float | None = 0.3
    max_line_characters: float | None = 0.2
    max_top_ngrams: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    max_repeated_ngrams: tuple[tuple[int, float], ...] = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.1),
    )

    name = 'gopher_repetition'

    def __post_init__(self) -> None:
        for field in ('max_top_ngrams', 'max_repeated_ngrams'):
            lengths = [n for n, _ in getattr(self, field)]
            if lengths != sorted(set(lengths)) or min(lengths, default=2) < 2:
                raise UserError(f'lengths {lengths} do not rise from 2 or more', where=f'GopherRepetition.{field}')

    @property
    def rules(self) -> tuple[str, ...]:
        """The number of n-grams decides how many there are."""
        names = ['empty', 'paragraphs', 'paragraph_characters', 'lines', 'line_characters']
        names += [f'top_{n}_gram' for n, _ in self.max_top_ngrams]
        names += [f'repeated_{n}_grams' for n, _ in self.max_repeated_ngrams]
        return tuple(f'{self.name}/{name}' for name in names)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        limits = (self.max_paragraphs, self.max_paragraph_characters, self.max_lines, self.max_line_characters)
        ngrams = (most for _, most in (*self.max_top_ngrams, *self.max_repeated_ngrams))
        bounds = ((1, None), *((None, most) for most in (*limits, *ngrams)))
        return tuple(Bounds(rule, *bound) for rule, bound in zip(self.rules, bounds, strict=True))

    def judge(self, batch: Batch) -> Judgement:
        characters = batch.characters
        paragraphs = [_paragraphs(text.strip()) for text in batch.texts]
        lines = [_lines(text) for text in batch.texts]
        values = [characters, *_repeated(paragraphs, characters), *_repeated(lines, characters)]
        tops, repeats = dict(self.max_top_ngrams), dict(self.max_repeated_ngrams)
        found = {}
        for ngrams in repeated_ngrams(batch.words, sorted({*tops, *repeats})):
            if ngrams.n in tops:
                found['top', ngrams.n] = share(top_characters(ngrams, batch.words), characters)
            if ngrams.n in repeats:
                found['repeated', ngrams.n] = share(repeated_characters(ngrams, batch.words), characters)
        values += [found['top', n] for n in tops] + [found['repeated', n] for n in repeats]
        return judged(values, self.bounds, batch)


def _paragraphs(text: str) -> list[str]:
    """As re.split('\n{2,}', text), of a text without white space around it."""
    parts = text.split('\n\n')
    return parts if len(parts) == 1 else [part for part in (part.lstrip('\n') for part in parts) if part]


def _lines(text: str) -> list[str]:
    """As re.split('\n+', text)."""
    parts = text.split('\n')
    return parts if '\n\n' not in text else [*parts[:1], *filter(None, parts[1:-1]), *parts[-1:]]


def _repeated(parts: list[list[str]], characters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of the parts that were there before, their share of the characters)."""
    found = np.array([repeated_parts(own) for own in parts], np.float64).reshape(-1, 2)
    return share(found[:, 0], np.array([len(own) for own in parts])), share(found[:, 1], characters)
