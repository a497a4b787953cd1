"""Is one thing better than another, as far as the same seeds and the same items show? Differences in pairs, intervals.

Tests are of the mean of differences, two-sided, against 0. SciPy, of the extra [eval], has the t distribution.
"""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from llm.errors import UserError

Verdict = Literal['better', 'worse', 'no difference shown']
Overall = Literal['better', 'worse', 'mixed', 'no difference shown']


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean difference.

    Attributes:
        difference: mean of what is compared less what it is compared with. low, high: confidence interval.
        p_value: of a difference of 0, uncorrected. degrees_of_freedom: of the t distribution.
        test: what it was.
    """

    difference: float
    low: float
    high: float
    p_value: float
    degrees_of_freedom: float
    test: str


def _stats() -> Any:
    try:
        return importlib.import_module('scipy.stats')
    except ModuleNotFoundError as error:
        raise UserError('SciPy is not installed', where='comparison', fix="pip install 'llm-jax[eval]'") from error


def check_installed() -> None:
    """Raises UserError where SciPy is missing: before a long run rather than after."""
    _stats()


def paired_over_seeds(differences: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Estimate:
    """Student's paired t test (scipy.stats.ttest_1samp of differences), [seeds], at least two.

    Assumes that seeds are drawn independently and that differences are about normal. What was trained on and what it is
    measured on are taken as fixed: the interval is of what other seeds would give on the same data.
    """
    values = np.asarray(differences, np.float64)
    return _student(
        float(values.mean()), float(values.var(ddof=1)) / len(values), len(values) - 1, 't over seeds', confidence
    )


def crossed_over_seeds_and_items(differences: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Whether the mean over seeds and items differs from 0, both of them drawn at random: [seeds, items], >= 2 each.

    The model is d = mean + seed + item + rest, random and independent; the variance of the mean is estimated from the
    mean squares of the two-way analysis of variance, (MS_seeds + MS_items - MS_rest) / (seeds items), but no less than
    either mean square alone gives. Degrees of freedom are Satterthwaite's (1946), but no more than seeds - 1 and
    items - 1: a handful of seeds often shows less variance than seeds have, and with the degrees of freedom of items
    small p-values, which are all that Holm's method leaves, come more often than they say (docs/data_ablation.md).
    """
    seeds, items = differences.shape
    mean = float(differences.mean())
    by_seed, by_item = differences.mean(axis=1) - mean, differences.mean(axis=0) - mean
    rest = differences - mean - by_seed[:, None] - by_item[None, :]
    degrees = seeds - 1, items - 1, (seeds - 1) * (items - 1)
    square_seeds = items * float(np.sum(by_seed**2)) / degrees[0]
    square_items = seeds * float(np.sum(by_item**2)) / degrees[1]
    square_rest = float(np.sum(rest**2)) / degrees[2]
    total = max(square_seeds + square_items - square_rest, square_seeds, square_items)
    squares = square_seeds, square_items, square_rest
    spread = sum(square**2 / each for square, each in zip(squares, degrees, strict=True))
    freedom = min(total**2 / spread if spread else math.inf, seeds - 1.0, items - 1.0)
    return _student(mean, total / (seeds * items), freedom, 't over seeds and items, crossed', confidence)


def _student(mean: float, variance: float, freedom: float, test: str, confidence: float) -> Estimate:
    stats = _stats()
    error = math.sqrt(variance)
    if not error:
        # All differences are the same, as those of right and wrong answers can be, and t would be infinite of two
        # draws already. What is left is that all of n have one sign: 2 / 2**n, by the sign test.
        return Estimate(mean, mean, mean, 2.0**-freedom if mean else 1.0, freedom, test)
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    p_value = float(2 * stats.t.sf(abs(mean) / error, freedom))
    return Estimate(mean, mean - half, mean + half, p_value, freedom, test)


def bootstrap_interval(
    differences: np.ndarray, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean, seeds and items drawn again apart (the pigeonhole bootstrap, Owen 2007).

    It is too narrow for few seeds: see docs/data_ablation.md.

    Args:
        differences: [seeds, items].
    """
    generator = np.random.default_rng(seed)
    seeds, items = differences.shape
    means = []
    for begin in range(0, resamples, 500):
        size = min(500, resamples - begin)
        seed_counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size)
        item_counts = generator.multinomial(items, np.full(items, 1 / items), size)
        means.append(np.einsum('RS,SI,RI->R', seed_counts, differences, item_counts, optimize=True) / (seeds * items))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being so many, step down (Holm 1979): whatever depends on what, the chance of one wrong
    rejection among all is at most the level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def verdict(difference: float, corrected_p_value: float, *, larger_is_better: bool, level: float = 0.05) -> Verdict:
    """What a difference shows at this level."""
    if not corrected_p_value < level or difference == 0:
        return 'no difference shown'
    return 'better' if (difference > 0) == larger_is_better else 'worse'


def overall(verdicts: Sequence[Verdict]) -> Overall:
    """Better or worse where some metric is and none is the other; mixed where some are better and others worse."""
    found = set(verdicts) - {'no difference shown'}
    if not found:
        return 'no difference shown'
    return 'mixed' if len(found) > 1 else 'better' if 'better' in found else 'worse'
