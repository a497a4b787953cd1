"""Steps after the token cache: pure NumPy functions of one example and its own randomness.

A post-cache function turns an example, a dict of arrays, into another one. It is called record by record with a
generator seeded by (seed, epoch, index), so the result does not depend on what was read before, on the host or on
threads. The same function serves as a SeqIO preprocessor through `llm.data.tasks.as_seqio_preprocessor`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Example = dict[str, npt.NDArray[Any]]
PostCache = Callable[[Example, np.random.Generator], Example]


def record_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one record in one epoch; independent between any two that differ in either."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, index))))


def apply_post_cache(functions: Sequence[PostCache], example: Example, generator: np.random.Generator) -> Example:
    """The example after all functions in order, drawing from one generator."""
    for function in functions:
        example = function(example, generator)
    return example


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """Predict every token from those before it in its document.

    `llm.data.packing.PackedRows` makes the same for rows of many documents at once; this is the definition.

    Args:
        start: what is read before the first token of a document.
    """

    start: int

    def __call__(self, example: Example, generator: np.random.Generator) -> Example:
        """From `targets` [n], the tokens of a document with the end boundary last, to a row of n.

        Returns:
            inputs, targets, loss_weights, segment_ids, positions, each [n].
        """
        targets = example['targets'].astype(np.int32)
        return {
            'inputs': np.concatenate([[self.start], targets[:-1]]).astype(np.int32),
            'targets': targets,
            'loss_weights': np.ones(len(targets), np.float32),
            'segment_ids': np.ones(len(targets), np.int32),
            'positions': np.arange(len(targets), dtype=np.int32),
        }
