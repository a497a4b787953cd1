"""Rules of C4 (Raffel et al. 2020, section 2.2), as datatrove's C4QualityFilter reads them: lines go, or the page."""

import dataclasses
import re

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.quality.batch import Batch, Words
from llm.data.documents.quality.rules import Judgement, judged
from llm.data.documents.quality.words import ENDING, ORDINARY, sums

_CITATION = re.compile(r'\[\d*]|\[edit]|\[citation needed]')
_ENDS = ('.', '?', '!', '"', "'")
_POLICIES = ('terms of use', 'privacy policy', 'cookie policy', 'uses cookies', 'use of cookies', 'use cookies')


@dataclasses.dataclass(frozen=True)
class C4:
    """Removes lines that are no sentences or speak of cookies, and pages of which too little is left.

    Every text is rewritten to the lines that stay, without white space around them.

    Args:
        remove_citations: '[1]', '[edit]' and '[citation needed]' are taken out of lines.
        punctuated_lines: lines must end with one of . ? ! " ' and not with '...'. FineWeb leaves this out.
        min_line_words: lines of fewer pieces between white space go. 3, and 5 for min_sentences, are datatrove's; the
            dataset C4 itself was made with 5 and 3.
        max_piece_characters: lines with a longer piece go.
        remove_javascript, remove_policies: lines that name it, or terms of use, privacy and cookies, go.
        min_sentences: of the lines that stay, for the page to stay.
        max_lorem_ipsum, max_curly_brackets: lines with 'lorem ipsum' or '{' that a page may have, of those that the
            rules before would leave; 0 allows none, as published.
    """

    remove_citations: bool = True
    punctuated_lines: bool = True
    min_line_words: int | None = 3
    max_piece_characters: int | None = 1000
    remove_javascript: bool = True
    remove_policies: bool = True
    min_sentences: int | None = 5
    max_lorem_ipsum: int | None = 0
    max_curly_brackets: int | None = 0

    name = 'c4'
    rules = ('c4/lorem_ipsum', 'c4/curly_brackets', 'c4/sentences')

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        bounds = ((None, self.max_lorem_ipsum), (None, self.max_curly_brackets), (self.min_sentences, None))
        return tuple(Bounds(rule, *bound) for rule, bound in zip(self.rules, bounds, strict=True))

    def judge(self, batch: Batch) -> Judgement:
        words, bounds = batch.words, batch.line_bounds
        lines = [line.strip() for line in batch.lines]
        stays = np.ones(len(lines), np.bool_)
        num_words, sentences = np.diff(words.of_lines), sentences_of(words)
        if self.max_piece_characters is not None:
            long = words.table.characters[words.pieces] > self.max_piece_characters
            if long.any():
                stays &= sums(long, words.piece_bounds) == 0
        if self.remove_citations:
            self._without_citations(batch, lines, num_words, sentences)
        if self.punctuated_lines:
            ends = (line.endswith(_ENDS) and not line.endswith('...') for line in lines)
            stays &= np.fromiter(ends, np.bool_, len(lines))
        if self.min_line_words is not None:
            stays &= np.diff(words.piece_bounds) >= self.min_line_words
        lorem, brackets = self._by_phrases(batch, lines, stays)
        values = (lorem, brackets, sums(np.where(stays, sentences, 0), bounds).astype(np.float64))
        texts = []
        every = np.diff(bounds) == sums(stays, bounds)
        flags = stays.tolist()
        for i, (first, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            own = lines[first:end] if every[i] else [lines[k] for k in range(first, end) if flags[k]]
            texts.append('\n'.join(own).strip())
        return judged(values, self.bounds, Batch(batch.documents, texts, sums(np.where(stays, num_words, 0), bounds)))

    @staticmethod
    def _without_citations(batch: Batch, lines: list[str], num_words: np.ndarray, sentences: np.ndarray) -> None:
        """Takes them out of lines, and counts the words and sentences of those lines again."""
        changed = []
        for document, text in enumerate(batch.texts):
            if '[' in text:
                for i in range(*batch.line_bounds[document : document + 2].tolist()):
                    if '[' in lines[i] and (line := _CITATION.sub('', lines[i])) != lines[i]:
                        lines[i] = line
                        changed.append(i)
        if changed:
            again = Batch.words_of([lines[i] for i in changed], np.array([0, len(changed)]))
            num_words[changed], sentences[changed] = np.diff(again.of_lines), sentences_of(again)

    def _by_phrases(self, batch: Batch, lines: list[str], stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([D] lines with lorem ipsum, [D] with a curly bracket); lines that name Javascript or a policy go."""
        lorem, brackets = np.zeros(len(batch.texts)), np.zeros(len(batch.texts))
        for document, text in enumerate(batch.texts):
            lower = text.lower()
            named = any(policy in lower for policy in _POLICIES)
            if not (named or '{' in text or 'javascript' in lower or 'lorem ipsum' in lower):
                continue
            for i in range(*batch.line_bounds[document : document + 2].tolist()):
                if not stays[i]:
                    continue
                lower = lines[i].lower()
                lorem[document] += 'lorem ipsum' in lower
                if self.remove_javascript and 'javascript' in lower:
                    stays[i] = False
                    continue
                brackets[document] += '{' in lower
                if self.remove_policies and named and any(policy in lower for policy in _POLICIES):
                    stays[i] = False
        return lorem, brackets


def sentences_of(words: Words) -> np.ndarray:
    """[lines]: sentences of each, at least one, as spaCy's Sentencizer finds them.

    One begins with each line, and with the first word behind an end ('.', '!', '?') that is no punctuation.
    """
    kinds = words.table.kind[words.words]
    line = np.repeat(np.arange(len(words.of_lines) - 1), np.diff(words.of_lines))
    which = (kinds == ORDINARY) | (kinds == ENDING)
    kinds, line = kinds[which], line[which]
    begins = np.flatnonzero((kinds[1:] == ORDINARY) & (kinds[:-1] == ENDING) & (line[1:] == line[:-1]))
    return 1 + np.bincount(line[begins + 1], minlength=len(words.of_lines) - 1)
