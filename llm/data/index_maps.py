"""Stateless shuffling and mixing: which record is example i, computed from i alone, in constant time.

Nothing here has a position, so the example at index 10^12 costs what the one at index 0 costs, resuming is free, and
any host can compute any part of the order. All maps are vectorised over arrays of indices.
"""

import dataclasses
import fractions
import hashlib
import heapq
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm.errors import UserError

IndexArray = npt.NDArray[np.int64]

MAX_PERIOD = 1 << 16  # rows after which the interleaving of a mixture repeats; rates are multiples of its inverse
_ROUNDS = 8
_ODD_CONSTANTS = tuple(np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def derive_key(*parts: int | str) -> int:
    """A 64-bit key that depends on every part and their order; distinct parts give unrelated keys."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], 'little')


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, figure 16): a bijection that scrambles 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * _ODD_CONSTANTS[1]
    x = (x ^ (x >> np.uint64(27))) * _ODD_CONSTANTS[2]
    return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A keyed family of permutations of [0, size), one for every epoch, evaluated point by point.

    A Feistel network over Z_a x Z_b with a * b just above `size`, and cycle walking for the few points that leave the
    domain (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5). Good for shuffling
    data, not a cipher.
    """

    size: int
    key: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f'a permutation of {self.size} elements does not exist')

    def __call__(self, indices: npt.ArrayLike, epochs: npt.ArrayLike = 0) -> IndexArray:
        """Where the permutation of `epochs` takes `indices` (each in [0, size)); shapes broadcast."""
        indices, epochs = np.broadcast_arrays(np.asarray(indices, np.int64), np.asarray(epochs, np.int64))
        result = self._walk(indices.astype(np.uint64).ravel(), epochs.astype(np.uint64).ravel())
        return result.astype(np.int64).reshape(indices.shape)

    def _walk(self, x: npt.NDArray[np.uint64], epochs: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        x = self._rounds(x, epochs)
        outside = np.flatnonzero(x >= np.uint64(self.size))
        while outside.size:
            x[outside] = self._rounds(x[outside], epochs[outside])
            outside = outside[x[outside] >= np.uint64(self.size)]
        return x

    def _rounds(self, x: npt.NDArray[np.uint64], epochs: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        a = np.uint64(math.isqrt(self.size - 1) + 1)  # smallest a with a * a >= size
        b = np.uint64(-(-self.size // int(a)))
        left, right = x // b, x % b
        epoch_key = _mix(np.uint64(self.key) + epochs * _ODD_CONSTANTS[0])
        for number in range(0, _ROUNDS, 2):
            left = (left + _mix(right ^ _mix(epoch_key + np.uint64(number))) % a) % a
            right = (right + _mix(left ^ _mix(epoch_key + np.uint64(number + 1))) % b) % b
        return left * b + right


@dataclasses.dataclass(frozen=True)
class EpochShuffle:
    """Maps an endless index to (epoch, record): each epoch visits every record once, in an order of its own."""

    size: int
    key: int

    def locate(self, indices: npt.ArrayLike) -> tuple[IndexArray, IndexArray]:
        """(epoch, record) of each index, both of the shape of `indices`."""
        epochs, offsets = np.divmod(np.asarray(indices, np.int64), self.size)
        return epochs, Permutation(self.size, self.key)(offsets, epochs)


def temperature_rates(
    sizes: Sequence[float], *, temperature: float = 1.0, maximum: float | None = None
) -> tuple[float, ...]:
    """Rates proportional to min(size, maximum) ** (1 / temperature), summing to 1.

    Temperature 1 samples in proportion to size; infinity samples evenly (Raffel et al. 2020, section 3.5.2, and
    `seqio.mixing_rate_num_examples`).
    """
    if temperature <= 0:
        raise UserError(f'a mixing temperature of {temperature} is not positive', fix='Use 1 or more.')
    clipped = [min(size, maximum) if maximum is not None else size for size in sizes]
    rates = [size ** (1 / temperature) for size in clipped]
    return tuple(rate / sum(rates) for rate in rates)


def whole_weights(rates: Sequence[float], names: Sequence[str] | None = None) -> tuple[int, ...]:
    """Smallest whole numbers in proportion to `rates`; they sum to at most MAX_PERIOD.

    Decimal rates such as 0.7 and 0.3 are taken as written and kept exactly when their period allows; others are
    rounded to multiples of 1 / MAX_PERIOD by largest remainder.

    Raises:
        UserError: a rate is not positive, or too small beside the others to be kept.
    """
    names = names or [f'component {i}' for i in range(len(rates))]
    for name, rate in zip(names, rates, strict=True):
        if not (rate > 0 and math.isfinite(rate)):
            raise UserError(f'a mixing rate of {rate} is not positive', where=name, fix='Leave the component out.')
    exact = [fractions.Fraction(repr(float(rate))) for rate in rates]
    total = sum(exact)
    shares = [rate / total for rate in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return tuple(int(share * period) for share in shares)
    weights = [math.floor(share * MAX_PERIOD) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (weights[i] - shares[i] * MAX_PERIOD, i))
    for i in by_remainder[: MAX_PERIOD - sum(weights)]:
        weights[i] += 1
    for name, weight, share in zip(names, weights, shares, strict=True):
        if weight == 0:
            raise UserError(
                f'a mixing rate of {float(share):.2g} is below the smallest that is kept, 1/{MAX_PERIOD}',
                where=name,
                fix='Raise it or leave the component out.',
            )
    divisor = math.gcd(*weights)
    return tuple(weight // divisor for weight in weights)


@dataclasses.dataclass(frozen=True)
class Interleaving:
    """An endless interleaving of sources in which every prefix holds each source within 1 of its share.

    `weights` are whole numbers; a prefix of n holds source j between n * w_j / W - 1 and n * w_j / W + 1 times, where
    W is their sum. This is the chairman assignment problem: Tijdeman 1980 shows that a bound of 1 - 1 / (2k - 2) for
    k sources is reached by serving, among those not ahead of their share, the one whose deadline is nearest. The order
    repeats after W, so one period is stored.
    """

    weights: tuple[int, ...]
    sources: npt.NDArray[np.int32]  # [W], whose turn it is
    ranks: npt.NDArray[np.int32]  # [W], how many turns of that source came before, in this period
    turns: npt.NDArray[np.int32]  # [W], the offsets of source 0's turns, then those of source 1, ...

    @classmethod
    def of(cls, weights: tuple[int, ...]) -> 'Interleaving':
        """The interleaving for these weights."""
        period, slack = sum(weights), max(1, 2 * len(weights) - 2)
        source = np.repeat(np.arange(len(weights)), weights)
        rank = np.concatenate([np.arange(weight, dtype=np.int64) for weight in weights])
        weight = np.asarray(weights, np.int64)[source]
        # Turn `rank` of a source may come at steps n (from 1) with 1 / slack <= n * w / W - rank, and must have come
        # before the first n with n * w / W - rank > 1 - 1 / slack.
        release = -((-(rank * slack + 1) * period) // (weight * slack))
        deadline = (rank * slack + slack - 1) * period // (weight * slack) + 1
        order = np.argsort(release, kind='stable')
        waiting: list[tuple[int, int, int]] = []
        tasks = zip(release[order].tolist(), deadline[order].tolist(), source[order].tolist(), strict=True)
        upcoming = next(tasks, None)
        sources = np.empty(period, np.int32)
        for step in range(1, period + 1):
            while upcoming is not None and (upcoming[0] <= step or len(weights) == 1):
                heapq.heappush(waiting, (upcoming[1], upcoming[2], upcoming[0]))
                upcoming = next(tasks, None)
            sources[step - 1] = heapq.heappop(waiting)[1]
        turns = np.argsort(sources, kind='stable').astype(np.int32)
        ranks = np.empty(period, np.int32)
        ranks[turns] = rank
        return cls(tuple(weights), sources, ranks, turns)

    def locate(self, indices: IndexArray) -> tuple[IndexArray, IndexArray]:
        """(source, index within that source) of each index."""
        periods, offsets = np.divmod(indices, len(self.sources))
        sources = self.sources[offsets].astype(np.int64)
        return sources, periods * np.asarray(self.weights, np.int64)[sources] + self.ranks[offsets]

    def position(self, source: int, index: int) -> int:
        """Where the `index`-th turn (from 0) of `source` is."""
        period, rank = divmod(index, self.weights[source])
        return period * len(self.sources) + int(self.turns[sum(self.weights[:source]) + rank])

    def counts(self, length: int) -> list[int]:
        """How many turns each source has in the first `length`."""
        periods, rest = divmod(length, len(self.sources))
        partial = np.bincount(self.sources[:rest], minlength=len(self.weights))
        return [periods * weight + int(count) for weight, count in zip(self.weights, partial, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Phase:
    """A stretch of the mixture with the same live sources. `first` and `served` hold what came before it."""

    first: int
    live: tuple[int, ...]
    served: tuple[int, ...]
    interleaving: Interleaving


class MixtureSchedule:
    """Maps an endless index to (source, index within that source) at fixed rates.

    Args:
        rates: relative rates, one per source; see `whole_weights`.
        limits: how many records a source gives in all, None for no limit. When a source reaches its limit, the others
            go on in their proportions, and prefixes from there on are again within 1 of them.
        names: for messages.

    Attributes:
        weights: the whole numbers in whose proportion sources are mixed.
        length: number of examples in all; None without limits on every source.
        identity: what tells one schedule from another.
    """

    def __init__(
        self,
        rates: Sequence[float],
        limits: Sequence[int | None] | None = None,
        names: Sequence[str] | None = None,
    ):
        self.weights = whole_weights(rates, names)
        limits = [None] * len(self.weights) if limits is None else list(limits)
        self.limits = tuple(limits)
        served = [0] * len(self.weights)
        length, endless = 0, False
        self._phases: list[_Phase] = []
        while live := tuple(j for j, limit in enumerate(limits) if limit is None or served[j] < limit):
            divisor = math.gcd(*(self.weights[j] for j in live))
            interleaving = Interleaving.of(tuple(self.weights[j] // divisor for j in live))
            self._phases.append(_Phase(length, live, tuple(served), interleaving))
            left = {i: limit - served[j] for i, j in enumerate(live) if (limit := limits[j]) is not None}
            if not left:
                endless = True
                break
            end = min(interleaving.position(i, records - 1) + 1 for i, records in left.items())
            for j, count in zip(live, interleaving.counts(end), strict=True):
                served[j] += count
            length += end
        self.length: int | None = None if endless else length
        self._starts = np.asarray([phase.first for phase in self._phases], np.int64)
        self.identity = (self.weights, self.limits)

    def shares(self) -> list[float]:
        """The part of the rows that each source has, as long as none has reached its limit."""
        return [weight / sum(self.weights) for weight in self.weights]

    def locate(self, indices: npt.ArrayLike) -> tuple[IndexArray, IndexArray]:
        """(source, index within that source) of each index, both of the shape of `indices`.

        Raises:
            UserError: an index is beyond the end, where every source has reached its limit.
        """
        indices = np.asarray(indices, np.int64)
        if self.length is not None and indices.size and int(indices.max()) >= self.length:
            raise UserError(
                f'the mixture ends after {self.length:,} rows, where every component has had its maximum of epochs, '
                f'and row {int(indices.max()):,} was asked for',
                fix='Train for fewer steps, raise max_epochs, or remove it from one component.',
            )
        sources, within = np.empty_like(indices), np.empty_like(indices)
        phases = np.searchsorted(self._starts, indices, side='right') - 1
        for number in np.unique(phases).tolist():
            phase, here = self._phases[number], phases == number
            local, index = phase.interleaving.locate(indices[here] - phase.first)
            sources[here] = np.asarray(phase.live, np.int64)[local]
            within[here] = index + np.asarray(phase.served, np.int64)[sources[here]]
        return sources, within
