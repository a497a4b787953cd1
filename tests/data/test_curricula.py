"""Curricula against integration by brute force, and as a map that any index reaches directly."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.curricula import Curriculum, CurriculumSchedule
from llm.errors import UserError

NAMES = ('a', 'b', 'c', 'd', 'e')


SLICES = 50


def brute_force(curriculum, names, total_steps, batch_size, limits):
    """[T + 1, k] rows before each step: slices of a step are each shared by those that have not reached their limit."""
    times = (np.arange(total_steps * SLICES) + 0.5) / SLICES / (1 if curriculum.steps else total_steps)
    given = np.asarray([curriculum.rates[name] for name in names])
    given = given / given.sum(axis=0)
    if curriculum.shape == 'linear':
        rates = np.stack([np.interp(times, curriculum.at, column) for column in given], axis=1)
    else:
        rates = given.T[[[k for k, point in enumerate(curriculum.at) if point <= now][-1] for now in times]]
    most = np.asarray([math.inf if limit is None else limit for limit in limits])
    rows, result = np.zeros(len(names)), [np.zeros(len(names))]
    for number, of_slice in enumerate(rates, start=1):
        left = np.where(rows < most, of_slice, 0)
        rows = np.minimum(rows + batch_size / SLICES * left / left.sum(), most)
        if number % SLICES == 0:
            result.append(rows)
    return np.asarray(result)


@st.composite
def curricula(draw):
    """(curriculum, names, total steps, batch size)."""
    names = NAMES[: draw(st.integers(1, 5))]
    steps = draw(st.integers(1, 25))
    by_step = draw(st.booleans())
    points = draw(st.lists(st.integers(1, 24), unique=True, max_size=3))
    at = (0.0, *sorted(point if by_step else point / 25 for point in points))
    rate = st.sampled_from([0.0, 0.001, 0.1, 1 / 3, 0.5, 0.9, 7.0])
    columns = [draw(st.lists(rate, min_size=len(names), max_size=len(names)).filter(any)) for _ in at]
    rates = {name: tuple(column[j] for column in columns) for j, name in enumerate(names)}
    rates[names[0]] = tuple(r or 0.2 for r in rates[names[0]])
    rates = {name: column for name, column in rates.items() if any(column)}
    shape = draw(st.sampled_from(['linear', 'constant']))
    return Curriculum(at, rates, shape, 25 if by_step else None), tuple(rates), steps, draw(st.integers(1, 9))


@settings(max_examples=60)
@given(curricula())
def test_counts_follow_the_integral_of_the_rates(drawn):
    curriculum, names, steps, batch_size = drawn
    schedule = CurriculumSchedule(curriculum, names, [None] * len(names), steps, batch_size)
    expected = brute_force(curriculum, names, steps, batch_size, schedule.limits)
    bound = 1 - 1 / max(2, 2 * len(names) - 2)
    # A slice in which 'constant' rates jump is shared by the rates of its middle: at most a row in SLICES, each time.
    error = np.abs(schedule.counts - expected)
    assert error.max() <= bound + 4 * batch_size / SLICES / 2
    windows = (schedule.counts[None] - schedule.counts[:, None]) - (expected[None] - expected[:, None])
    assert np.abs(windows).max() <= 2 * bound + 4 * batch_size / SLICES
    assert (schedule.counts.sum(axis=1) == np.arange(steps + 1) * batch_size).all()

    # By iteration: each source is read in order without gaps, and each batch holds what the counts say.
    sources, within = schedule.locate(np.arange(steps * batch_size))
    for j in range(len(names)):
        assert within[sources == j].tolist() == list(range(int((sources == j).sum())))
        by_step = (sources.reshape(steps, batch_size) == j).sum(axis=1)
        assert by_step.tolist() == np.diff(schedule.counts[:, j]).tolist()
    # Directly, and in another process.
    index = steps * batch_size - 1
    again = pickle.loads(pickle.dumps(schedule)).locate([index, 0])
    assert [part.tolist() for part in again] == [[sources[index], sources[0]], [within[index], within[0]]]


@settings(max_examples=40)
@given(curricula(), st.data())
def test_limits_are_kept_and_the_others_go_on_in_proportion(drawn, data):
    curriculum, names, steps, batch_size = drawn
    limits = [None, *data.draw(st.lists(st.integers(1, 40), min_size=len(names) - 1, max_size=len(names) - 1))]
    schedule = CurriculumSchedule(curriculum, names, limits, steps, batch_size)
    expected = brute_force(curriculum, names, steps, batch_size, limits)
    # Slices end up to one late where a source reaches its limit.
    assert np.abs(schedule.counts - expected).max() <= 1 + 6 * batch_size / SLICES
    assert all(limit is None or count <= limit for limit, count in zip(limits, schedule.counts[-1], strict=True))
    assert (schedule.counts.sum(axis=1) == np.arange(steps + 1) * batch_size).all()


def test_two_sources_are_within_half_a_row_and_windows_within_one():
    curriculum = Curriculum((0, 0.8, 1), {'web': (0.9, 0.9, 0.5), 'books': (0.1, 0.1, 0.5)})
    schedule = CurriculumSchedule(curriculum, ('web', 'books'), (None, None), 1000, 8)
    integrals = 8 * curriculum.integrals(('web', 'books'), 1000)
    assert np.abs(schedule.counts - integrals).max() <= 0.5 + 1e-6
    assert schedule.counts[-1].tolist() == [6880, 1120]  # 0.8 * 0.9 + 0.2 * 0.7 of 8,000
    assert schedule.shares() == [0.86, 0.14]


def test_when_all_have_reached_their_limits_the_mixture_ends():
    curriculum = Curriculum((0,), {'a': (1,), 'b': (3,)})
    schedule = CurriculumSchedule(curriculum, ('a', 'b'), (10, 7), 9, 4)
    assert schedule.length == 17 and schedule.counts[-1].tolist() == [10, 7]
    with pytest.raises(UserError, match='ends after 17 rows, and row 17 was asked for'):
        schedule.locate([17])
    with pytest.raises(UserError, match='from step 2 on only components that have had their maximum .* not b'):
        CurriculumSchedule(Curriculum((0, 0.5), {'a': (1, 1), 'b': (0, 1)}, 'constant'), 'ab', (8, None), 10, 4)


def test_a_long_run_is_reached_directly():
    curriculum = Curriculum((0, 1), {'a': (1, 0), 'b': (0.5, 2), 'c': (0, 1)})
    schedule = CurriculumSchedule(curriculum, 'abc', (None, None, None), 100_000, 1024)
    sources, within = schedule.locate(np.arange(99_999 * 1024, 100_000 * 1024))
    assert [int(within[sources == j].max()) + 1 for j in (1, 2)] == schedule.counts[-1, 1:].tolist()
    assert np.abs(schedule.counts - 1024 * curriculum.integrals('abc', 100_000)).max() <= 0.75 + 1e-5


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'at': (0, 0.5, 0.5)}, 'does not rise from 0'),
        ({'at': (0.1, 0.5, 1)}, 'does not rise from 0'),
        ({'at': (0, 0.5, 7)}, '7 is after the end: without steps, they are fractions'),
        ({'at': (0, 50, 700), 'steps': 600}, '700 is after the end: training ends at 600'),
        ({'rates': {'a': (1, -1, 1)}}, 'a has a rate that is negative'),
        ({'rates': {'a': (1, 1)}}, 'a has 2 rates for 3 points'),
        ({'rates': {'a': (1, 0, 1), 'b': (1, 0, 0)}}, 'all rates are 0 at 0.5'),
        ({'rates': {'a': (1, 1, 1), 'b': (0, 0, 0)}}, 'the rates of b are all 0'),
        ({'shape': 'cubic'}, 'shape'),
    ],
)
def test_curricula_that_are_none_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Curriculum(**({'at': (0, 0.5, 1), 'rates': {'a': (1, 1, 1)}} | settings))
