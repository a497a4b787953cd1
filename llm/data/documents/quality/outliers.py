"""Texts unlike others, whatever they are about: very short or long, all alike, or without any pattern."""

import dataclasses
import zlib

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.quality.batch import Batch
from llm.data.documents.quality.rules import Judgement, judged, share


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Length, compression and entropy. Prose of 1,000 characters or more compresses 1.5 to 3 times, at 4 to 4.7 bits.

    Args:
        min_characters, max_characters: of a text.
        min_compression, max_compression: bytes to bytes after zlib (level 6): below are random characters and very
            short texts, above is what repeats itself.
        min_byte_entropy, max_byte_entropy: bits per byte of UTF-8.
        min_character_entropy, max_character_entropy: bits per character; texts in Chinese have 8 to 9.
    """

    min_characters: int | None = 100
    max_characters: int | None = 1_000_000
    min_compression: float | None = 1.05
    max_compression: float | None = 8.0
    min_byte_entropy: float | None = 2.5
    max_byte_entropy: float | None = 6.8
    min_character_entropy: float | None = 2.5
    max_character_entropy: float | None = 10.0

    name = 'outliers'
    rules = tuple(f'outliers/{rule}' for rule in ('characters', 'compression', 'byte_entropy', 'character_entropy'))

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        bounds = (
            (self.min_characters, self.max_characters),
            (self.min_compression, self.max_compression),
            (self.min_byte_entropy, self.max_byte_entropy),
            (self.min_character_entropy, self.max_character_entropy),
        )
        return tuple(Bounds(rule, *bound) for rule, bound in zip(self.rules, bounds, strict=True))

    def judge(self, batch: Batch) -> Judgement:
        encoded = [text.encode() for text in batch.texts]
        compressed = np.array([len(zlib.compress(data)) for data in encoded], np.float64)
        sizes = np.array([len(data) for data in encoded], np.float64)
        points = batch.code_points
        values = (
            batch.characters,
            np.where(sizes > 0, share(sizes, compressed), np.nan),
            np.array([_entropy(np.bincount(np.frombuffer(data, np.uint8))) for data in encoded]),
            np.array(
                [
                    _entropy(np.bincount(np.unique(points[first:end], return_inverse=True)[1]))
                    for first, end in zip(batch.character_bounds[:-1], batch.character_bounds[1:], strict=True)
                ]
            ),
        )
        return judged(values, self.bounds, batch)


def _entropy(counts: np.ndarray) -> float:
    """Bits per occurrence (Shannon 1948); NaN of none."""
    counts = counts[counts > 0]
    if not len(counts):
        return float('nan')
    probabilities = counts / counts.sum()
    return float(-(probabilities * np.log2(probabilities)).sum())
