"""Pairs of texts for an encoder: does the second follow the first? With masked language modelling of both.

Next-sentence prediction (Devlin et al. 2019, section 3.1, task 2) and sentence order (Lan et al. 2020, "ALBERT",
section 3.1). A row is one pair, [first] A [separator] B [separator], made of a piece of one document anew in every
epoch.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llm.data.objectives import BatchKind, Example, IndexArray, PostCache
from llm.data.objectives.masking import MaskedLanguageModelling
from llm.data.token_cache import Boundaries, Tokenizer
from llm.errors import UserError

# The first token and a separator after either text.
_SPECIAL = 3


@dataclasses.dataclass(frozen=True)
class SentencePairs:
    """Cut a piece of a document at random into A and B; in half of the rows they are no pair.

    Then B is as much text from another row ('next'), or A and B change places ('order').

    Attributes:
        kind: 'next' as BERT, or 'order' as ALBERT.
        masking: of the tokens of both.
        first_token, separator: names of special tokens of the vocabulary ('[CLS]', '[SEP]'); None takes what stands
            before a document, and after it.
    """

    kind: Literal['next', 'order'] = 'next'
    masking: MaskedLanguageModelling = MaskedLanguageModelling()
    first_token: str | None = None
    separator: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ('next', 'order'):
            raise UserError(f'kind is {self.kind!r}', where='SentencePairs', fix="Use 'next' or 'order'.")

    def batch_kind(self) -> BatchKind:
        """Of the models that it is for."""
        return 'encoder'

    def extra_ids(self, vocabulary: Tokenizer) -> int:
        """Those of masking."""
        return self.masking.extra_ids(vocabulary)

    def window(self, sequence_length: int) -> int:
        """A row without what is put between the texts."""
        if sequence_length <= _SPECIAL + 1:
            raise UserError(
                f'rows of {sequence_length} tokens have no room for a pair of texts',
                where='StepConfig.sequence_length',
                fix=f'Use at least {_SPECIAL + 2}.',
            )
        return sequence_length - _SPECIAL

    def room(self, lengths: IndexArray, sequence_length: int) -> IndexArray:
        """All of a row, whatever the length: it holds one pair."""
        return np.full_like(lengths, sequence_length)

    def bind(self, vocabulary: Tokenizer, sequence_length: int) -> PostCache:
        """The function on rows.

        Raises:
            UserError: the vocabulary has no such token.
        """
        special = dict(getattr(vocabulary, 'special_ids', {}))
        boundaries = Boundaries.of(vocabulary)
        ids = {'first_token': boundaries.start, 'separator': boundaries.end}
        for field in ids:
            if (name := getattr(self, field)) is not None:
                if name not in special:
                    raise UserError(
                        f'the vocabulary has no special token {name!r}',
                        where=f'SentencePairs.{field}',
                        fix=f'Use one of {", ".join(special) or "none"}, or None.',
                    )
                ids[field] = special[name]
        masking = self.masking.bind(vocabulary, sequence_length)
        return _Pairs(self, masking, sequence_length, boundaries, **ids)


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """The function. `reads_another` has `llm.data.examples` put the arrays of another row beside a row's own."""

    config: SentencePairs
    masking: PostCache
    length: int
    boundaries: Boundaries
    first_token: int
    separator: int

    @property
    def reads_another(self) -> bool:
        """Whether a row needs another one."""
        return self.config.kind == 'next'

    def __call__(self, example: Example, generator: np.random.Generator) -> Example:
        """A row of one pair: as of masking, and token_types and next_sentence, [S] each.

        next_sentence is 0 where B follows A, 1 where it does not, and -1 where there is no pair, on all tokens alike.
        """
        text = self._text(example, '')
        first, second, label = self._pair(text, example, generator)
        opening, separator = (np.array([token], np.int32) for token in (self.first_token, self.separator))
        parts = [opening, first, separator, second, separator] if len(text) else []
        tokens = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
        before = len(first) + 2  # tokens up to the first separator
        row = {
            'targets': np.full(self.length, self.boundaries.pad, np.int32),
            'segment_ids': np.zeros(self.length, np.int32),
            'positions': np.zeros(self.length, np.int32),
        }
        here = slice(len(tokens))
        row['targets'][here] = tokens
        row['segment_ids'][here] = 1
        row['positions'][here] = np.arange(len(tokens))
        types = np.zeros(self.length, np.int32)
        types[before : len(tokens)] = 1
        pair = {'token_types': types, 'next_sentence': np.full(self.length, label, np.int32)}
        return self.masking(row, generator) | pair

    def _pair(
        self, text: npt.NDArray[Any], example: Example, generator: np.random.Generator
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any], int]:
        """A, B and the label."""
        if len(text) < 2:
            return text, text[:0], -1
        cut = int(generator.integers(1, len(text)))
        first, second = text[:cut], text[cut:]
        if generator.random() < 0.5:
            return first, second, 0
        if self.config.kind == 'order':
            return second, first, 1
        other = self._text(example, 'other_')
        if not len(other):  # there is no other row
            return first, second, 0
        # As long as what it stands for, where there is as much: lengths must not tell.
        start = int(generator.integers(0, max(1, len(other) - len(second) + 1)))
        return first, other[start : start + len(second)], 1

    def _text(self, example: Example, prefix: str) -> npt.NDArray[Any]:
        """The tokens of a row, without the end of the document."""
        tokens = example[f'{prefix}targets'][example[f'{prefix}segment_ids'] > 0]
        return tokens[:-1] if len(tokens) and tokens[-1] == self.boundaries.end else tokens
