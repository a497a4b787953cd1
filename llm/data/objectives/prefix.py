"""Prefix language modelling for a decoder: the first part of each document is read in both directions."""

import dataclasses

import numpy as np

from llm.data.objectives import BatchKind, Example, IndexArray, PostCache, spans_of
from llm.data.token_cache import Tokenizer


@dataclasses.dataclass(frozen=True)
class PrefixLanguageModelling:
    """Raffel et al. 2020, section 3.2.1: attention is full within a prefix, causal after it; loss is after it alone.

    The length of the prefix is drawn evenly from 1 to the length of the document's piece. A batch has `prefix` [B, S]
    beside what causal language modelling has: 1 where the input belongs to the prefix.
    """

    def batch_kind(self) -> BatchKind:
        """Of the models that it is for."""
        return 'decoder'

    def extra_ids(self, vocabulary: Tokenizer) -> int:
        """None."""
        return 0

    def window(self, sequence_length: int) -> int:
        """A row."""
        return sequence_length

    def room(self, lengths: IndexArray, sequence_length: int) -> IndexArray:
        """As much as there are tokens."""
        return lengths

    def bind(self, vocabulary: Tokenizer, sequence_length: int) -> PostCache:
        """The function on rows; needs nothing of either."""
        return self

    def __call__(self, example: Example, generator: np.random.Generator) -> Example:
        """A row of packed documents, each array [S], with a prefix in each."""
        prefix = np.zeros(len(example['inputs']), np.int32)
        weights = example['loss_weights'].copy()
        for span in spans_of(example['segment_ids']):
            end = span.start + int(generator.integers(1, span.stop - span.start + 1))
            prefix[span.start : end] = 1
            weights[span.start : end - 1] = 0  # these targets are inputs that the prefix shows
        return {**example, 'loss_weights': weights, 'prefix': prefix}
