"""Near duplicates: candidates that share a band of their signatures, verified by the Jaccard similarity of sets."""

import dataclasses
from collections.abc import Callable

import numpy as np

from llm.data.documents.deduplication.minhash import SCHEMES, Bands, jaccard
from llm.data.documents.deduplication.sorted_runs import group_sizes, group_starts
from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Documents that share most of their n-grams of words.

    Args:
        threshold: least Jaccard similarity of their sets of n-grams; every pair is verified.
        shingle: words of an n-gram.
        scheme: bands by name ('fineweb': 14 of 8 rows, 'refinedweb': 20 of 450), or 'solved' for those that suit
            `threshold` best with `hashes` hash functions.
        hashes: of 'solved'.
        bucket: documents of a bucket that all its documents are compared with: the most preferred ones. A bucket of no
            more gives all its pairs. In a larger one two documents that are alike, but not like any of these, are not
            compared there; they may be in another band.
        seed: of the hash functions.
    """

    threshold: float = 0.75
    shingle: int = 5
    scheme: str = 'fineweb'
    hashes: int = 128
    bucket: int = 64
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise UserError(f'threshold = {self.threshold} is not above 0 and at most 1', where='NearDuplicates')
        if self.shingle < 1 or self.bucket < 1 or self.hashes < 1:
            raise UserError('shingle, bucket and hashes must be positive', where='NearDuplicates')
        if self.scheme not in (*SCHEMES, 'solved'):
            raise UserError(
                f'scheme = {self.scheme!r} is none of {", ".join((*SCHEMES, "solved"))}', where='NearDuplicates'
            )

    @property
    def bands(self) -> Bands:
        """The bands that the scheme names."""
        if self.scheme == 'solved':
            return Bands.solved(min(self.threshold, 0.999), self.hashes, self.seed)
        return Bands.named(self.scheme, self.seed)


def candidate_pairs(keys: np.ndarray, nodes: np.ndarray, bucket: int) -> tuple[np.ndarray, np.ndarray]:
    """(smaller, larger) number of the pairs of each bucket.

    Args:
        keys, nodes: of every document in every bucket, sorted by key, then node.
        bucket: each document is paired with so many of the smallest of its bucket.
    """
    starts = group_starts(keys)
    sizes = group_sizes(starts, len(keys))
    begin = np.repeat(starts, sizes)
    within = np.arange(len(keys)) - begin
    firsts, seconds = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for k in range(min(bucket, int(sizes.max(initial=1)) - 1)):
        later = np.flatnonzero(within > k)
        firsts.append(nodes[begin[later] + k])
        seconds.append(nodes[later])
    return np.concatenate(firsts), np.concatenate(seconds)


def similarities(first: np.ndarray, second: np.ndarray, shingles: Callable[[int], np.ndarray]) -> np.ndarray:
    """float64 [pairs]: Jaccard similarity of each pair of numbers; quick where `first` is sorted.

    Args:
        shingles: the set of a document, as `as_sets` gives it.
    """
    result = np.zeros(len(first))
    known, held = -1, np.zeros(0, np.uint64)
    for i, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        if a != known:
            known, held = a, shingles(a)
        result[i] = jaccard(held, shingles(b))
    return result
