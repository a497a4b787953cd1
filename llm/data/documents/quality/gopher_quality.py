"""Rules of quality of Gopher (Rae et al. 2021, section A.1.1), as datatrove's GopherQualityFilter reads them."""

import dataclasses

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.quality.batch import Batch, Words
from llm.data.documents.quality.rules import Judgement, judged, share
from llm.data.documents.quality.words import sums

_BULLETS = ('•', '-')
_ELLIPSES = ('...', '…')


@dataclasses.dataclass(frozen=True)
class GopherQuality:
    """Words that are too few or too many, symbols, bullets, ellipses, and stop words. Words are those of English.

    Args:
        min_words, max_words: words that are not of symbols alone.
        min_mean_word_length, max_mean_word_length: characters of those.
        max_hash_ratio, max_ellipsis_ratio: '#', and '...' or '…', to all words.
        max_bullet_lines: share of lines that begin with a bullet or hyphen. max_ellipsis_lines: that end with an
            ellipsis.
        min_alphabetic_words: share of words with a letter.
        min_stop_words: how many different ones of `stop_words` a text has.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3
    max_mean_word_length: float | None = 10
    max_hash_ratio: float | None = 0.1
    max_ellipsis_ratio: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: tuple[str, ...] = ('the', 'be', 'to', 'of', 'and', 'that', 'have', 'with')

    name = 'gopher_quality'
    rules = tuple(
        f'gopher_quality/{rule}'
        for rule in (
            'word_count',
            'mean_word_length',
            'hash_ratio',
            'ellipsis_ratio',
            'bullet_lines',
            'ellipsis_lines',
            'alphabetic_words',
            'stop_words',
        )
    )

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        bounds = (
            (self.min_words, self.max_words),
            (self.min_mean_word_length, self.max_mean_word_length),
            (None, self.max_hash_ratio),
            (None, self.max_ellipsis_ratio),
            (None, self.max_bullet_lines),
            (None, self.max_ellipsis_lines),
            (self.min_alphabetic_words, None),
            (self.min_stop_words, None),
        )
        return tuple(Bounds(rule, *bound) for rule, bound in zip(self.rules, bounds, strict=True))

    def judge(self, batch: Batch) -> Judgement:
        words, num_words = batch.words, batch.num_words
        num_lines = np.diff(batch.line_bounds)
        symbols = words.table.symbols_only[words.words]
        lengths = words.table.word_characters[words.words]
        counts = num_words - sums(symbols, words.of_documents)
        values = (
            counts.astype(np.float64),
            share(sums(np.where(symbols, 0, lengths), words.of_documents), counts),
            share(batch.measure(lambda text: text.count('#')), num_words),
            share(batch.measure(lambda text: text.count('...') + text.count('…')), num_words),
            share(batch.lines_that(lambda line: line.lstrip().startswith(_BULLETS)), num_lines),
            share(batch.lines_that(lambda line: line.rstrip().endswith(_ELLIPSES)), num_lines),
            share(sums(words.table.has_letter[words.words], words.of_documents), num_words),
            self._num_stop_words(words).astype(np.float64),
        )
        return judged(values, self.bounds, batch)

    def _num_stop_words(self, words: Words) -> np.ndarray:
        """[D]: how many different ones each document has."""
        stops = dict.fromkeys(self.stop_words)
        which = np.full(len(words.table.words), -1, np.int16)
        for i, stop in enumerate(stops):
            if stop in words.table.words:
                which[words.table.words[stop]] = i
        found = which[words.words]
        positions = np.flatnonzero(found >= 0)
        documents = np.searchsorted(words.of_documents, positions, side='right') - 1
        num_documents = len(words.of_documents) - 1
        seen = np.zeros(num_documents * len(stops), np.bool_)
        seen[documents * len(stops) + found[positions]] = True
        return seen.reshape(num_documents, len(stops)).sum(1)
