"""Mixing rates that change over training, as a stateless index map.

The rates integrated from the first step to step t say how many rows of each source the first t batches should hold.
Counts of whole rows follow those integrals at every step as the chairman assignment problem has it (Tijdeman 1980, for
rates that vary): within 1 - 1 / (2k - 2) of them for k sources. They are computed once, for all steps, and looked up.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llm.data.index_maps import IndexArray, Interleaving
from llm.errors import UserError

FloatArray = npt.NDArray[np.float64]

# What rounding may add to an integral of rates, in rows, so that bounds which can just be kept are not missed.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Rates of a mixture's components at points of training; the last are held to the end.

    Args:
        at: the points, rising from 0: fractions of training, or steps if `steps` is given.
        rates: of each component by name, one for each point; only their proportions count.
        shape: 'linear' between points, or 'constant' from one point to the next.
        steps: how many steps training has; then `at` are steps, and stay so in runs of another length. None is for
            fractions, which stretch with the run.
    """

    at: tuple[float, ...]
    rates: dict[str, tuple[float, ...]]
    shape: Literal['linear', 'constant'] = 'linear'
    steps: int | None = None

    def __post_init__(self) -> None:
        where = 'Curriculum.at'
        if not self.at or self.at[0] != 0 or any(b <= a for a, b in zip(self.at, self.at[1:], strict=False)):
            raise UserError(f'{self.at} does not rise from 0', where=where, fix='Begin at 0, and let each be larger.')
        if self.steps is not None and self.steps < 1:
            raise UserError(f'steps = {self.steps} is less than 1', where='Curriculum')
        if not self.at[-1] <= (self.steps or 1):
            limit = f'training ends at {self.steps}' if self.steps else 'without steps, they are fractions up to 1'
            raise UserError(f'{self.at[-1]} is after the end: {limit}', where=where, fix='Set Curriculum.steps, too.')
        if self.shape not in ('linear', 'constant'):
            raise UserError(f'shape is {self.shape!r}', where='Curriculum', fix="Use 'linear' or 'constant'.")
        for name, rates in self.rates.items():
            if len(rates) != len(self.at):
                raise UserError(f'{name} has {len(rates)} rates for {len(self.at)} points', where='Curriculum.rates')
            if not all(rate >= 0 and math.isfinite(rate) for rate in rates):
                raise UserError(f'{name} has a rate that is negative or not finite: {rates}', where='Curriculum.rates')
            if not any(rates):
                raise UserError(f'the rates of {name} are all 0', where='Curriculum.rates', fix='Leave it out.')
        for i, point in enumerate(self.at):
            if not any(rates[i] for rates in self.rates.values()):
                raise UserError(f'all rates are 0 at {point:g}', where='Curriculum.rates')

    def integrals(self, names: Sequence[str], total_steps: int) -> FloatArray:
        """[T + 1, k] the rates of the sources called `names`, integrated over the steps before each; rows add up to t.

        Raises:
            UserError: the rates are not of these sources.
        """
        if set(names) != set(self.rates):
            raise UserError(
                f'rates are of {", ".join(sorted(self.rates))}, and the components are {", ".join(sorted(names))}',
                where='Curriculum.rates',
            )
        rates = np.asarray([self.rates[name] for name in names], np.float64).T
        rates = rates / rates.sum(axis=1, keepdims=True)
        at = np.asarray(self.at, np.float64) * (1 if self.steps else total_steps)
        steps = np.arange(total_steps + 1, dtype=np.float64)
        result = np.zeros((total_steps + 1, len(names)))
        for i, start in enumerate(at):
            end = at[i + 1] if i + 1 < len(at) else math.inf
            within = np.clip(steps, start, end) - start
            result += within[:, None] * rates[i]
            if self.shape == 'linear' and i + 1 < len(at):
                result += (within**2 / (2 * (end - start)))[:, None] * (rates[i + 1] - rates[i])
        return result


def with_limits(wanted: FloatArray, limits: Sequence[int | None], names: Sequence[str]) -> FloatArray:
    """Integrals of rates when a source that has reached its limit gives nothing, and the others go on in proportion.

    Args:
        wanted: [T + 1, k] rows of each source before each step, without limits. names: for messages.

    Returns:
        [T + 1, k]; they add up to less than `wanted` from where every source has reached its limit.

    Raises:
        UserError: at some step the sources that still have rows have no rate.
    """
    most = np.asarray([math.inf if limit is None else limit for limit in limits])
    result, steps = wanted.copy(), len(wanted) - 1
    parts, live, step = np.diff(wanted, axis=0), most > 0, 0
    while live.any() and step < steps:
        here = parts[step:] * live
        sums = here.sum(axis=1, keepdims=True)
        totals = parts[step:].sum(axis=1, keepdims=True)
        with np.errstate(invalid='ignore', divide='ignore'):
            path = np.cumsum(np.concatenate([result[step : step + 1], here / sums * totals]), axis=0)[1:]
        stops = np.flatnonzero((sums[:, 0] <= 0) | (path > most).any(axis=1))
        stop = int(stops[0]) if stops.size else len(path)
        result[step + 1 : step + 1 + stop] = path[:stop]
        step += stop
        if step < steps:
            live = _step_to_limit(result, parts, most, live, step, names)
            step += 1
    result[step + 1 :] = result[step]
    return result


def _step_to_limit(
    result: FloatArray,
    parts: FloatArray,
    most: FloatArray,
    live: npt.NDArray[np.bool_],
    step: int,
    names: Sequence[str],
) -> npt.NDArray[np.bool_]:
    """One step of `with_limits` in which sources reach their limits; those that are left."""
    now, left, total = result[step].copy(), 1.0, parts[step].sum()
    while left > 0 and live.any():
        pace = parts[step] * live
        if pace.sum() <= 0:
            raise UserError(
                f'from step {step:,} on only components that have had their maximum of epochs have a rate, not '
                f'{", ".join(name for name, alive in zip(names, live, strict=True) if alive)}',
                where='the curriculum',
                fix='Raise max_epochs, train for fewer steps, or give another component a rate there.',
            )
        pace = pace * (total / pace.sum())
        with np.errstate(invalid='ignore', divide='ignore'):
            room = np.where(pace > 0, (most - now) / pace, math.inf)
        part = min(left, max(0.0, float(room.min())))
        reached = room <= part
        now = np.where(reached, most, now + pace * part)
        live = live & ~reached
        left -= part
    result[step + 1] = now
    return live


def whole_counts(integrals: FloatArray, totals: IndexArray) -> IndexArray:
    """[T + 1, k] whole numbers that rise with t, add up to `totals`, and are within 1 - 1 / (2k - 2) of `integrals`.

    Of the sources that may have a row more, those come first that must have it soonest: the rule by which Tijdeman
    1980 proves the bound, and which meets every deadline that can be met.
    """
    slack = 1 - 1 / max(2, 2 * integrals.shape[1] - 2)
    lower = np.maximum(0, np.ceil(integrals - slack - _ROUNDING)).astype(np.int64)
    upper = np.floor(integrals + slack + _ROUNDING).astype(np.int64)
    deadlines = np.stack([np.searchsorted(column, column + 1) for column in lower.T], axis=1)
    counts = np.zeros_like(lower)
    now = [0] * lower.shape[1]
    for step, (low, high, soonest, total) in enumerate(
        zip(lower.tolist(), upper.tolist(), deadlines.tolist(), totals.tolist(), strict=True)
    ):
        now = [max(have, least) for have, least in zip(now, low, strict=True)]
        spare = total - sum(now)
        if spare:
            may = sorted((soonest[j], j) for j, have in enumerate(now) if have < high[j])
            for _, j in may[:spare]:
                now[j] += 1
        if sum(now) != total:
            raise AssertionError(f'step {step}: {now} do not add up to {total}, between {low} and {high}')
        counts[step] = now
    return counts


class CurriculumSchedule:
    """Maps an index to (source, index within that source) at rates that change from step to step.

    Args:
        curriculum: the rates. names: of the sources, in order.
        limits: how many rows a source gives in all, None for no limit; see `with_limits`.
        total_steps: T, of the run. batch_size: B, rows of a step; within them sources are spread evenly.

    Attributes:
        counts: [T + 1, k] int64, rows of each source before each step.
        length: rows in all.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        names: Sequence[str],
        limits: Sequence[int | None],
        total_steps: int,
        batch_size: int,
    ):
        wanted = curriculum.integrals(names, total_steps) * batch_size
        totals = np.arange(total_steps + 1, dtype=np.int64) * batch_size
        self.limits = tuple(limits)
        known = [limit for limit in limits if limit is not None]
        if known:
            wanted = with_limits(wanted, limits, names)
        if len(known) == len(limits):
            totals = np.minimum(totals, sum(known))
        self.counts = whole_counts(wanted, totals)
        self.length = int(totals[-1])
        self.batch_size = batch_size
        self.identity: tuple[Any, ...] = (repr(curriculum), self.limits, total_steps, batch_size)

    def shares(self) -> list[float]:
        """The part of all rows that each source has."""
        return (self.counts[-1] / self.length).tolist()

    def locate(self, indices: npt.ArrayLike) -> tuple[IndexArray, IndexArray]:
        """(source, index within that source) of each index, both of the shape of `indices`.

        Raises:
            UserError: an index is beyond the end, of the run or of what the limits leave.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and int(indices.max()) >= self.length:
            raise UserError(
                f'the mixture ends after {self.length:,} rows, and row {int(indices.max()):,} was asked for',
                fix='Train for fewer steps, or raise max_epochs.',
            )
        sources, within = np.empty_like(indices), np.empty_like(indices)
        steps, rows = np.divmod(indices, self.batch_size)
        for step in np.unique(steps).tolist():
            here, before = steps == step, self.counts[step]
            batch_sources, batch_ranks = _spread(tuple((self.counts[step + 1] - before).tolist()))
            sources[here] = batch_sources[rows[here]]
            within[here] = batch_ranks[rows[here]] + before[sources[here]]
        return sources, within


@functools.lru_cache(maxsize=1024)
def _spread(counts: tuple[int, ...]) -> tuple[IndexArray, IndexArray]:
    """(source, rank within its source) of each row of a batch that holds so many of each."""
    present = [source for source, count in enumerate(counts) if count]
    interleaving = Interleaving.of(tuple(counts[source] for source in present))
    return np.asarray(present, np.int64)[interleaving.sources], interleaving.ranks.astype(np.int64)
