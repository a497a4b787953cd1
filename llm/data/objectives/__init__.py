"""Objectives: what is made of the tokens of the cache, anew in every epoch, for a model to train on.

An objective is a config that gin binds. Bound to a vocabulary and a row length it becomes a post-cache function (see
`examples`): from a row of packed documents, as `llm.data.packing.PackedRows` gives it, to a row of the batch. Without
one, a run is causal language modelling, which is what packed rows are already.
"""

import itertools
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from llm.data.objectives.examples import (
    Example,
    LanguageModelling,
    PostCache,
    apply_post_cache,
    record_generator,
)
from llm.data.token_cache import Tokenizer

IndexArray = npt.NDArray[np.int64]
BatchKind = Literal['decoder', 'encoder', 'encoder_decoder']


@runtime_checkable
class Objective(Protocol):
    """What `llm.data.datasets` asks of an objective."""

    def batch_kind(self) -> BatchKind:
        """Of the models that it is for; see their configs."""
        ...

    def extra_ids(self, vocabulary: Tokenizer) -> int:
        """How many ids from the vocabulary's size on it uses, for tokens that the vocabulary does not have."""
        ...

    def window(self, sequence_length: int) -> int:
        """The most tokens of one document that fit a row of the batch."""
        ...

    def room(self, lengths: IndexArray, sequence_length: int) -> IndexArray:
        """What pieces of documents of these lengths take of a row's `sequence_length`, at most."""
        ...

    def bind(self, vocabulary: Tokenizer, sequence_length: int) -> PostCache:
        """The function from rows of packed documents to rows of the batch."""
        ...


def spans_of(segment_ids: npt.NDArray[Any]) -> list[slice]:
    """Where each document of a row lies: segment_ids [S], from 1 on in order, 0 on padding at the end."""
    real = int(np.count_nonzero(segment_ids))
    ends = np.flatnonzero(np.diff(segment_ids[:real])) + 1
    bounds = [0, *ends.tolist(), real] if real else [0]
    return [slice(low, high) for low, high in itertools.pairwise(bounds)]


__all__ = [
    'BatchKind',
    'Example',
    'LanguageModelling',
    'Objective',
    'PostCache',
    'apply_post_cache',
    'record_generator',
    'spans_of',
]
