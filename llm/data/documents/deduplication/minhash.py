"""MinHash signatures of sets of shingles (Broder 1997), and bands of them for locality-sensitive hashing."""

import dataclasses
import functools

import numpy as np

from llm.data.documents.deduplication.words import Hashes, mixed
from llm.errors import UserError

# Bands and rows by name. FineWeb (Penedo et al. 2024): 112 hashes. RefinedWeb (Penedo et al. 2023, app. G.3): 9,000.
SCHEMES = {'fineweb': (14, 8), 'refinedweb': (20, 450)}
# Shingles that are hashed at once: with the result they fit a processor's second-level cache.
_BLOCK = 1 << 16
_NO_SHINGLE = np.uint32(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Bands:
    """`bands` times `rows` hash functions. Two sets of Jaccard similarity s share a band with 1 - (1 - s^rows)^bands.

    The functions are x -> a x + b modulo 2^32, a odd, of 32 mixed bits of a shingle's hash.
    """

    bands: int = 14
    rows: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        if self.bands < 1 or self.rows < 1:
            raise UserError(f'{self.bands} bands of {self.rows} rows: both must be positive', where='Bands')

    @classmethod
    def named(cls, scheme: str, seed: int = 1) -> 'Bands':
        """One of SCHEMES."""
        if scheme not in SCHEMES:
            raise UserError(f'no scheme is called {scheme!r}', fix=f'Take one of {", ".join(SCHEMES)}.')
        return cls(*SCHEMES[scheme], seed)

    @classmethod
    def solved(cls, threshold: float, hashes: int = 128, seed: int = 1) -> 'Bands':
        """The bands for which as little as possible is found below `threshold` and missed above it.

        The sum of both areas under the curve of `probability` is least (Zhu et al. 2016; datasketch).
        """
        if not 0 < threshold < 1:
            raise UserError(f'threshold = {threshold} is not between 0 and 1', where='Bands')
        grid = (np.arange(1000) + 0.5) / 1000

        def areas(bands: int, rows: int) -> float:
            found = 1 - (1 - grid**rows) ** bands
            return float(np.where(grid < threshold, found, 1 - found).sum())

        best = min(
            ((bands, rows) for rows in range(1, hashes + 1) for bands in range(1, hashes // rows + 1)),
            key=lambda shape: areas(*shape),
        )
        return cls(*best, seed)

    def probability(self, similarity: float) -> float:
        """That two sets of this Jaccard similarity share a band."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)

    def signatures(self, shingles: Hashes) -> np.ndarray:
        """uint32 [documents, bands * rows]: the least value of each hash function over a document's shingles."""
        factors, terms = _functions(self.bands * self.rows, self.seed)
        values = (shingles.values >> np.uint64(32)).astype(np.uint32)
        result = np.full((len(factors), len(shingles)), _NO_SHINGLE, np.uint32)
        filled = np.flatnonzero(shingles.counts)
        starts, ends = shingles.offsets[:-1][filled], shingles.offsets[1:][filled]
        hashed = np.empty(max(_BLOCK, int(shingles.counts.max(initial=0))), np.uint32)
        first = 0
        while first < len(filled):
            last = max(first + 1, int(np.searchsorted(ends, starts[first] + _BLOCK, 'right')))
            block = values[starts[first] : ends[last - 1]]
            out, segments, documents = hashed[: len(block)], starts[first:last] - starts[first], filled[first:last]
            for i, (factor, term) in enumerate(zip(factors, terms, strict=True)):
                np.multiply(block, factor, out=out)
                np.add(out, term, out=out)
                result[i, documents] = np.minimum.reduceat(out, segments)
            first = last
        return np.ascontiguousarray(result.T)

    def keys(self, signatures: np.ndarray) -> np.ndarray:
        """uint64 [documents, bands]: equal where all rows of a band, and the band, are."""
        documents = len(signatures)
        rows = signatures.reshape(documents, self.bands, self.rows).astype(np.uint64)
        key = np.broadcast_to(np.arange(1, self.bands + 1, dtype=np.uint64), (documents, self.bands))
        for row in range(self.rows):
            key = mixed(key * np.uint64(0x9E3779B97F4A7C15) + rows[:, :, row])
        return key


@functools.cache
def _functions(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors and terms; the same on every machine and in every release of NumPy."""
    with np.errstate(over='ignore'):
        numbers = mixed(
            np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            + mixed(np.array([seed], np.uint64))
        )
    high = (numbers >> np.uint64(32)).astype(np.uint32)
    return high[:count] | np.uint32(1), high[count:]


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Of two sets, as sorted arrays without repetition; 0 where both are empty."""
    if len(first) > len(second):
        first, second = second, first
    if not len(first):
        return 0.0
    places = np.minimum(np.searchsorted(second, first), len(second) - 1)
    shared = int((second[places] == first).sum())
    return shared / (len(first) + len(second) - shared)
