"""The cases of the parity matrix that have pipeline stages; see test_parity_matrix.py."""

import pytest

from tests.training.parity_cases import cheap_cases, hybrid_case, name, verdict

HYBRID = hybrid_case(tensor=2, expert=2, pipeline=2)


@pytest.mark.slow
@pytest.mark.parametrize('case', [*(case for case in cheap_cases() if case['pipeline'] > 1), HYBRID], ids=name)
def test_equals_one_device(case):
    assert verdict(case) == ('equal', [])
