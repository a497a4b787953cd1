"""Shuffling and mixing as maps: bijections, proportions of every prefix, and equality with iteration."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llm.data import index_maps
from llm.errors import UserError


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40))
def test_permutation_is_a_bijection(size, key, epoch):
    image = index_maps.Permutation(size, key)(np.arange(size), epoch)
    assert np.array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize('size', [1, 2, 3, 4, 9, 10, 65536, 65537, 10**6 + 3])
def test_permutation_is_a_bijection_at_edge_sizes(size):
    image = index_maps.Permutation(size, 7)(np.arange(size), 5)
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_of_a_huge_domain_stays_inside_and_has_no_collisions():
    size = 10**15 + 37
    image = index_maps.Permutation(size, 3)(np.arange(100_000), 1)
    assert image.min() >= 0 and image.max() < size
    assert len(np.unique(image)) == 100_000
    assert stats.kstest(image / size, 'uniform').pvalue > 1e-4


def test_permutation_by_point_equals_by_array():
    permutation = index_maps.Permutation(1000, 11)
    indices, epochs = np.arange(1000), np.arange(1000) % 13
    assert [int(permutation(i, e)) for i, e in zip(indices, epochs, strict=True)] == permutation(
        indices, epochs
    ).tolist()


def test_small_permutations_are_drawn_evenly():
    permutation = index_maps.Permutation(4, 5)
    images = permutation(np.arange(4)[:, None], np.arange(24_000)[None, :])
    counts = collections.Counter(map(tuple, images.T.tolist()))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_each_position_holds_each_record_evenly_over_epochs():
    size, epochs = 37, 20_000
    images = index_maps.Permutation(size, 123)(np.arange(size)[:, None], np.arange(epochs)[None, :])
    table = np.stack([np.bincount(row, minlength=size) for row in images])
    statistic = ((table - epochs / size) ** 2 / (epochs / size)).sum()
    assert stats.chi2.sf(statistic, (size - 1) ** 2) > 1e-4


def test_adjacent_seeds_and_epochs_share_no_order():
    orders = {
        tuple(index_maps.Permutation(50, index_maps.derive_key(seed, 'shuffle'))(np.arange(50), epoch).tolist())
        for seed in range(10)
        for epoch in range(10)
    }
    assert len(orders) == 100


def test_shuffle_visits_every_record_once_an_epoch_and_reaches_far_epochs_directly():
    shuffle = index_maps.EpochShuffle(1000, 42)
    far = 10**12
    epochs, records = shuffle.locate(np.arange(far, far + 2000))
    assert np.array_equal(np.unique(epochs), [10**9, 10**9 + 1])
    for epoch in np.unique(epochs):
        assert np.array_equal(np.sort(records[epochs == epoch]), np.arange(1000))
    assert not np.array_equal(records[:1000], records[1000:])


def prefix_discrepancy(weights, length):
    """Largest |count - share| over all prefixes and sources."""
    sources, _ = index_maps.Interleaving.of(weights).locate(np.arange(length))
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    shares = np.arange(1, length + 1)[:, None] * np.asarray(weights) / sum(weights)
    return np.abs(counts - shares).max()


@settings(max_examples=60)
@given(weights=st.lists(st.integers(1, 400), min_size=2, max_size=9))
def test_every_prefix_is_within_tijdemans_bound_of_its_share(weights):
    bound = 1 - 1 / (2 * len(weights) - 2)
    assert prefix_discrepancy(tuple(weights), 3 * sum(weights)) <= bound + 1e-9


@settings(max_examples=15)
@given(rates=st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=12))
def test_every_prefix_is_within_one_of_real_rates(rates):
    weights = index_maps.whole_weights(rates)
    assert prefix_discrepancy(weights, sum(weights)) < 1
    assert np.abs(np.divide(weights, sum(weights)) - np.divide(rates, sum(rates))).max() < 1 / index_maps.MAX_PERIOD


@given(weights=st.lists(st.integers(1, 30), min_size=1, max_size=5), start=st.integers(0, 2**45))
def test_each_source_is_read_in_order_without_gaps(weights, start):
    interleaving = index_maps.Interleaving.of(tuple(weights))
    sources, within = interleaving.locate(np.arange(start, start + 3 * sum(weights)))
    before = interleaving.counts(start)
    for source, first in enumerate(before):
        mine = within[sources == source]
        assert np.array_equal(mine, np.arange(first, first + len(mine)))
        assert interleaving.position(source, int(mine[0])) == start + int(np.argmax(sources == source))


def test_decimal_rates_are_kept_exactly():
    assert index_maps.whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert index_maps.whole_weights([3, 1]) == (3, 1)
    assert index_maps.whole_weights([0.25]) == (1,)


@pytest.mark.parametrize('rates', [[0.5, 0.0], [1.0, -1.0], [1.0, float('nan')], [1.0, 1e-9]])
def test_rates_that_cannot_be_kept_are_refused(rates):
    with pytest.raises(UserError, match='news'):
        index_maps.whole_weights(rates, ['web', 'news'])


def test_temperature_flattens_as_published():
    # mT5 and multilingual BERT style: rate proportional to size ** (1 / T).
    sizes = (100.0, 10_000.0)
    assert index_maps.temperature_rates(sizes) == pytest.approx((100 / 10_100, 10_000 / 10_100))
    assert index_maps.temperature_rates(sizes, temperature=2) == pytest.approx((10 / 110, 100 / 110))
    assert index_maps.temperature_rates(sizes, maximum=300) == pytest.approx((0.25, 0.75))


def test_limits_end_a_source_and_the_others_go_on_in_proportion():
    schedule = index_maps.MixtureSchedule([0.5, 0.25, 0.25], [10, None, 40])
    sources, within = schedule.locate(np.arange(400))
    assert [int((sources == j).sum()) for j in range(3)] == [10, 350, 40]
    for source in range(3):
        assert np.array_equal(within[sources == source], np.arange((sources == source).sum()))
    last_of_first = int(np.flatnonzero(sources == 0)[-1])
    middle = sources[last_of_first + 1 : int(np.flatnonzero(sources == 2)[-1])]
    assert abs((middle == 1).sum() - len(middle) / 2) <= 1
    assert schedule.length is None


def test_a_mixture_with_limits_on_all_ends_with_a_message():
    schedule = index_maps.MixtureSchedule([1, 3], [6, 9])
    assert schedule.length == 15
    sources, _ = schedule.locate(np.arange(15))
    assert np.bincount(sources).tolist() == [6, 9]
    with pytest.raises(UserError, match='ends after 15 rows'):
        schedule.locate([14, 15])


def test_schedule_directly_equals_by_iteration():
    schedule = index_maps.MixtureSchedule([0.5, 0.3, 0.2], [1000, None, None])
    sources, within = schedule.locate(np.arange(20_000))
    for i in range(0, 20_000, 997):
        source, index = schedule.locate(np.asarray([i]))
        assert (source[0], index[0]) == (sources[i], within[i])
