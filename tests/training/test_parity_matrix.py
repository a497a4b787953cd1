"""Every pair of parallel axes, models, schedules and options: float64 loss and gradients of one device, within 1e-9.

Cases with pipeline stages are in test_parity_matrix_pipelines.py, so that two processes share the work.
"""

import itertools

import pytest

from tests.training.parity_cases import FACTORS, allowed, cheap_cases, name, verdict

PAIRS = cheap_cases()


@pytest.mark.slow
@pytest.mark.parametrize('case', [case for case in PAIRS if case['pipeline'] == 1], ids=name)
def test_equals_one_device(case):
    assert verdict(case) == ('equal', [])


def test_the_cases_have_every_pair_of_values_that_is_allowed():
    for first, second in itertools.combinations(FACTORS, 2):
        wanted = {(case[first], case[second]) for case in allowed()}
        assert {(case[first], case[second]) for case in PAIRS} == wanted
