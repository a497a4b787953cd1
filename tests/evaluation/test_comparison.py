import math

import numpy as np
import pytest
import scipy.stats

from llm.evaluation.comparison import (
    bootstrap_interval,
    crossed_over_seeds_and_items,
    holm,
    overall,
    paired_over_seeds,
    verdict,
)
from llm.evaluation.data_ablation import Scores, compare, sentence, verdicts


def test_over_seeds_it_is_students_paired_test():
    first, second = np.array([1.0, 1.2, 1.1, 1.4]), np.array([0.9, 1.25, 0.8, 1.1])
    found = paired_over_seeds(second - first)
    oracle = scipy.stats.ttest_rel(second, first)
    assert found.p_value == pytest.approx(oracle.pvalue, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval(0.95)), rel=1e-12)
    # And by the formula: t = mean / (s / sqrt(n)), with three degrees of freedom.
    differences = second - first
    t = differences.mean() / (differences.std(ddof=1) / 2)
    assert found.p_value == pytest.approx(2 * scipy.stats.t.cdf(-abs(t), 3), rel=1e-12)


def test_equal_runs_and_constant_differences():
    assert paired_over_seeds([0.0, 0.0, 0.0]).p_value == 1
    assert crossed_over_seeds_and_items(np.zeros((2, 5))).p_value == 1
    # Not 0, though t is infinite: two or five coins fall on one side so often.
    sign_test = scipy.stats.binomtest(5, 5).pvalue
    assert paired_over_seeds([0.5, 0.5]).p_value == scipy.stats.binomtest(2, 2).pvalue == 0.5
    assert paired_over_seeds([0.5] * 5).p_value == sign_test
    assert crossed_over_seeds_and_items(np.ones((5, 10))).p_value == sign_test
    assert crossed_over_seeds_and_items(np.ones((10, 5))).p_value == sign_test


def test_crossed_without_items_of_their_own_is_that_of_seeds_and_the_other_way_round():
    seeds, items = np.array([0.1, 0.3, -0.2, 0.4]), np.array([1.0, -0.5, 0.25, 2.0])
    only_seeds = crossed_over_seeds_and_items(np.repeat(seeds[:, None], 6, axis=1))
    assert only_seeds.p_value == pytest.approx(scipy.stats.ttest_1samp(seeds, 0).pvalue, rel=1e-9)
    only_items = crossed_over_seeds_and_items(np.repeat(items[None], 4, axis=0))
    assert only_items.p_value == pytest.approx(scipy.stats.ttest_1samp(items, 0).pvalue, rel=1e-9)


def test_crossed_by_hand():
    d = np.array([[1.0, 2.0, 3.0], [2.0, 5.0, 5.0]])
    # Means 2 and 4 of rows, 1.5, 3.5 and 4 of columns, 3 of all: squares 6 / 1, 14 / 2 - and what is left.
    rest = d - np.array([[2], [4]]) - np.array([1.5, 3.5, 4.0]) + 3
    rows, columns, left = 6.0, 2 * (2.25 + 0.25 + 1) / 2, float(np.sum(rest**2)) / 2
    total = rows + columns - left
    found = crossed_over_seeds_and_items(d)
    assert total**2 / (rows**2 / 1 + columns**2 / 2 + left**2 / 2) > 1
    assert found.degrees_of_freedom == 1  # Satterthwaite's, but of two seeds no more
    # Their transpose has as many degrees of freedom; with more of both, it is Satterthwaite's.
    assert crossed_over_seeds_and_items(d.T).degrees_of_freedom == 1
    square = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.1]])
    by_row, by_column = (3 * square.mean(axis).var(ddof=1) for axis in (1, 0))
    other = (8 * square.var() * 9 / 8 - 2 * by_row - 2 * by_column) / 4
    largest = max(by_row + by_column - other, by_row, by_column)
    expected = largest**2 / (by_row**2 / 2 + by_column**2 / 2 + other**2 / 4)
    assert crossed_over_seeds_and_items(square).degrees_of_freedom == pytest.approx(expected) and expected < 2
    half = scipy.stats.t.ppf(0.975, 1) * math.sqrt(total / 6)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = crossed = 0
    for _ in range(1000):
        found = crossed_over_seeds_and_items(generator.normal(0.5, 0.3, (5, 1)) + generator.normal(0, 1, (5, 100)))
        crossed += found.low <= 0.5 <= found.high
        found = paired_over_seeds(generator.normal(0.5, 1, 5))
        held += found.low <= 0.5 <= found.high
    assert 0.92 <= crossed / 1000 <= 0.98
    assert 0.935 <= held / 1000 <= 0.965


@pytest.mark.parametrize('seeds', [2, 3, 5])
def test_small_p_values_are_no_more_frequent_than_they_say(seeds):
    # Of 1,000 experiments without a difference 5 may be below 0.005, the first step of Holm's method of ten tests. With
    # the degrees of freedom of items, where seeds happen to lie close, it was 60, 38 and 12.
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(1000):
        differences = generator.normal(0, 0.3, (seeds, 1)) + generator.normal(0, 1, (1, 400))
        found += crossed_over_seeds_and_items(differences + generator.normal(0, 1, (seeds, 400))).p_value < 0.005
    assert found <= 5


def test_the_bootstrap_of_many_seeds_and_items_agrees_with_the_t_test():
    generator = np.random.default_rng(0)
    # Without a rest that is random twice, which the bootstrap counts twice.
    differences = generator.normal(0.2, 1, (60, 1)) + generator.normal(0, 1, (1, 200))
    low, high = bootstrap_interval(differences)
    found = crossed_over_seeds_and_items(differences)
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.05 * (found.high - found.low))
    assert bootstrap_interval(differences) == (low, high)


def test_holm():
    # The example of Holm's steps: 4 x 0.01, 3 x 0.02 raised to no less than what came before, 2 x 0.03, 1 x 0.04.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_verdicts():
    assert verdict(-0.1, 0.01, larger_is_better=False) == verdict(0.1, 0.01, larger_is_better=True) == 'better'
    assert verdict(0.1, 0.01, larger_is_better=False) == 'worse'
    assert verdict(0.1, 0.05, larger_is_better=True) == verdict(0.1, math.nan, larger_is_better=True)
    assert verdict(0.1, 0.05, larger_is_better=True) == 'no difference shown'
    assert overall(['better', 'no difference shown']) == 'better'
    assert overall(['worse', 'better']) == 'mixed'
    assert overall(['no difference shown', 'worse']) == 'worse'
    assert overall([]) == 'no difference shown'


def test_an_ablation_compares_in_pairs_and_corrects_for_all():
    generator = np.random.default_rng(3)
    luck = generator.normal(0, 0.2, 5)  # of a seed, the same for all variants
    noise = generator.normal(0, 1e-3, (2, 5))
    right = (generator.random((5, 400)) < 0.3).astype(float)

    def runs(bits, figures):
        return [Scores({'held': x}, {'quiz': {'accuracy': y}}) for x, y in zip(bits, figures, strict=True)]

    better = runs(1.95 + luck + noise[0], right)
    same = runs(2.0 + luck + noise[1], np.maximum(right, generator.random((5, 400)) < 0.3))
    compared = compare({'base': runs(2.0 + luck, right), 'better': better, 'same': same})
    found = {(each.variant, each.dataset): each for each in compared}
    assert found['better', 'held'].verdict == 'better'  # though luck is larger than the difference
    assert found['better', 'quiz'].estimate.p_value == 1
    assert found['same', 'held'].verdict == 'no difference shown'
    assert found['same', 'quiz'].verdict == 'better'
    oracle = scipy.stats.ttest_rel([1.95 + x + y for x, y in zip(luck, noise[0], strict=True)], 2.0 + luck)
    assert found['better', 'held'].estimate.p_value == pytest.approx(oracle.pvalue, rel=1e-6)
    assert found['better', 'held'].corrected_p_value > 2 * found['better', 'held'].estimate.p_value
    assert verdicts(compared) == {'better': 'better', 'same': 'better'}
    assert sentence(compared, 'better', 'base', 5, 0.05) == (
        'better is better than base: better on held bits per byte; no difference shown on 1 of 2 metrics '
        '(5 seeds in pairs, 4 tests corrected by Holm, level 0.05).'
    )
    alone = compare({'base': better, 'same': better})
    assert sentence(alone, 'same', 'base', 5, 0.05).startswith('No difference between same and base is shown (')
    assert compared[0].record()['p_value'] == compared[0].estimate.p_value
