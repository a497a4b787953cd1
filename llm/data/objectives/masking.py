"""Masked language modelling for an encoder: single tokens, whole words or spans of them are to be found again."""

import dataclasses
import math
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from llm.data.objectives import BatchKind, Example, IndexArray, PostCache, spans_of
from llm.data.token_cache import Boundaries, Tokenizer
from llm.errors import UserError

Unit = Literal['token', 'word', 'span']


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModelling:
    """Devlin et al. 2019, section 3.1: of the chosen tokens 80% become a mask token, 10% a random one, 10% stay.

    In each document of a row, `rate` of its tokens are chosen (rounded, at least one), boundaries never. A batch names
    the chosen, up to `most` a row, so that a model makes logits of these alone: `predicted` [B, M], their indices in
    the row, with `targets` and `loss_weights` [B, M]. A row with so many small documents that there would be more
    leaves out units of them at random.

    Attributes:
        rate: share of the tokens that are chosen.
        unit: what is chosen at a time: 'token'; 'word', all tokens of one (whole-word masking, in BERT's code since
            May 2019); or 'span' of whole words, of random length (Joshi et al. 2020, "SpanBERT", section 3.1), where
            all tokens of a span share the fate of 80%, 10% or 10%. The last unit is left out if it is too long for the
            rate, unless it is the only one.
        span_probability, max_span: lengths of spans, in words, have the geometric distribution of this probability, cut
            at max_span.
        mask_share, random_share: of the chosen, those that become the mask, and a random token.
        mask_token: name of the vocabulary's mask token; None takes the first id after the vocabulary.
    """

    rate: float = 0.15
    unit: Unit = 'token'
    span_probability: float = 0.2
    max_span: int = 10
    mask_share: float = 0.8
    random_share: float = 0.1
    mask_token: str | None = None

    def __post_init__(self) -> None:
        where = 'MaskedLanguageModelling'
        if self.unit not in get_args(Unit):
            raise UserError(f'unit is {self.unit!r}', where=where, fix=f'Use one of {", ".join(get_args(Unit))}.')
        for name in ('rate', 'span_probability'):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f'{name} is {getattr(self, name)}', where=where, fix='Use a number between 0 and 1.')
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise UserError(
                f'mask_share {self.mask_share} and random_share {self.random_share} are no shares of 1', where=where
            )
        if self.max_span < 1:
            raise UserError(f'max_span is {self.max_span}', where=where, fix='Use at least 1.')

    def batch_kind(self) -> BatchKind:
        """Of the models that it is for."""
        return 'encoder'

    def extra_ids(self, vocabulary: Tokenizer) -> int:
        """One, unless the vocabulary has the mask token."""
        return 1 if self.mask_token is None else 0

    def window(self, sequence_length: int) -> int:
        """A row."""
        return sequence_length

    def room(self, lengths: IndexArray, sequence_length: int) -> IndexArray:
        """As much as there are tokens."""
        return lengths

    def most(self, sequence_length: int) -> int:
        """M: a tenth more than `rate` of a row, rounded up to what a mesh can share among as many devices as rows."""
        step = max(8, sequence_length // 16)
        return min(sequence_length, step * math.ceil((1.1 * self.rate * sequence_length + 1) / step))

    def bind(self, vocabulary: Tokenizer, sequence_length: int) -> PostCache:
        """The function on rows.

        Raises:
            UserError: the vocabulary has no such mask token.
        """
        special = dict(getattr(vocabulary, 'special_ids', {}))
        if self.mask_token is not None and self.mask_token not in special:
            raise UserError(
                f'the vocabulary has no special token {self.mask_token!r}',
                where='MaskedLanguageModelling.mask_token',
                fix=f'Use one of {", ".join(special) or "none"}, or None.',
            )
        mask = vocabulary.size if self.mask_token is None else special[self.mask_token]
        boundaries = Boundaries.of(vocabulary)
        never = {*special.values(), boundaries.start, boundaries.end, boundaries.pad}
        ordinary = np.setdiff1d(np.arange(vocabulary.size), sorted(never))
        opens, closes = (None, None) if self.unit == 'token' else word_edges(vocabulary)
        most = self.most(sequence_length)
        return _Masking(self, vocabulary.digest, mask, most, ordinary, opens, closes)


def word_edges(vocabulary: Any) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which tokens begin with white space, and which end with it: [vocabulary.size] each.

    Raises:
        UserError: the vocabulary does not tell the bytes of its tokens.
    """
    if not hasattr(vocabulary, 'token_bytes'):
        raise UserError(
            'the vocabulary does not say where words begin', where='MaskedLanguageModelling.unit', fix="Use 'token'."
        )
    table = vocabulary.token_bytes()
    opens = np.array([text[:1].isspace() for text in table], bool)
    return opens, np.array([text[-1:].isspace() for text in table], bool)


@dataclasses.dataclass(frozen=True)
class _Masking:
    """The function. What repr leaves out follows from the rest."""

    config: MaskedLanguageModelling
    vocabulary: str
    mask: int
    most: int
    ordinary: npt.NDArray[np.int64] = dataclasses.field(repr=False)
    opens: npt.NDArray[np.bool_] | None = dataclasses.field(repr=False)
    closes: npt.NDArray[np.bool_] | None = dataclasses.field(repr=False)

    def __call__(self, example: Example, generator: np.random.Generator) -> Example:
        """A row of packed documents, whose targets are the tokens: inputs and the like [S], of the chosen [M]."""
        tokens = example['targets'].astype(np.int32)
        inputs = tokens.copy()
        maskable = np.isin(tokens, self.ordinary)
        units = [
            span.start + unit
            for span in spans_of(example['segment_ids'])
            for unit in self._units(tokens[span], maskable[span], generator)
        ]
        if sum(map(len, units)) > self.most:
            kept = _within(self.most, [units[i] for i in generator.permutation(len(units))])
            units = sorted((unit[: self.most] for unit in kept), key=lambda unit: int(unit[0]))
        for where in units:
            inputs[where] = self._replaced(tokens[where], generator)
        chosen = np.sort(np.concatenate(units)) if units else np.zeros(0, np.int64)
        predicted, weights = np.zeros(self.most, np.int32), np.zeros(self.most, np.float32)
        predicted[: len(chosen)], weights[: len(chosen)] = chosen, 1
        rest = {name: example[name] for name in ('segment_ids', 'positions')}
        return {
            'inputs': inputs,
            'predicted': predicted,
            'targets': tokens[predicted],
            'loss_weights': weights,
            **rest,
        }

    def _replaced(self, tokens: npt.NDArray[np.int32], generator: np.random.Generator) -> npt.NDArray[np.int32]:
        config = self.config
        draw = generator.random(1 if config.unit == 'span' else len(tokens))
        noise = self.ordinary[generator.integers(0, len(self.ordinary), len(tokens))].astype(np.int32)
        new = np.where(draw < config.mask_share + config.random_share, noise, tokens)
        return np.where(draw < config.mask_share, np.int32(self.mask), new)

    def _units(
        self, tokens: npt.NDArray[np.int32], maskable: npt.NDArray[np.bool_], generator: np.random.Generator
    ) -> list[npt.NDArray[np.int64]]:
        """The tokens of one document that are chosen, unit by unit."""
        config, candidates = self.config, np.flatnonzero(maskable)
        if not len(candidates):
            return []
        budget = max(1, round(config.rate * len(candidates)))
        if config.unit == 'token':
            return [np.sort(generator.permutation(candidates)[:budget])]
        words = self._words(tokens, candidates)
        if config.unit == 'word':
            return _within(budget, [words[i] for i in generator.permutation(len(words))])
        free = np.ones(len(words), bool)
        chosen: list[npt.NDArray[np.int64]] = []
        sizes, taken = np.array([len(word) for word in words]), 0
        # Enough tries to fill the budget; where only pieces too long are left, it stays short of it.
        for start in generator.integers(0, len(words), 20 * budget).tolist():
            stop = start + min(int(generator.geometric(config.span_probability)), config.max_span)
            stop = min(stop, len(words))
            if taken and taken + sizes[start:stop].sum() > budget:
                stop = start + int(np.searchsorted(np.cumsum(sizes[start:stop]), budget - taken, side='right'))
            together = stop > start and np.array_equal(
                np.concatenate(words[start:stop]), np.arange(words[start][0], words[stop - 1][-1] + 1)
            )
            if together and free[start:stop].all():
                free[start:stop] = False
                chosen.append(np.concatenate(words[start:stop]))
                taken += len(chosen[-1])
            if taken >= budget:
                break
        return chosen

    def _words(self, tokens: npt.NDArray[np.int32], candidates: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """The candidates by word: one begins after a gap, with white space, or after a token that ends with it."""
        assert self.opens is not None and self.closes is not None
        before = candidates[1:] - 1
        begins = (np.diff(candidates) > 1) | self.opens[tokens[candidates[1:]]] | self.closes[tokens[before]]
        return np.split(candidates, np.flatnonzero(begins) + 1)


def _within(budget: int, units: list[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
    """Units in order, but for those that the budget has no room for; the first is always there."""
    chosen: list[npt.NDArray[np.int64]] = []
    taken = 0
    for unit in units:
        if not chosen or taken + len(unit) <= budget:
            chosen.append(unit)
            taken += len(unit)
        if taken >= budget:
            break
    return chosen
