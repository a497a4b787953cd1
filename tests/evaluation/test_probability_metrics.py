"""Figures of probabilities against small cases done by hand; ROC AUC and average precision are scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.evaluation.probability_metrics import probability_metrics

HOLDS = np.array([1, 1, 0, 1, 0, 0, 0, 0], bool)
PROBABILITIES = np.array([0.95, 0.9, 0.9, 0.6, 0.55, 0.2, 0.1, 0.05])


def test_a_case_done_by_hand():
    found = probability_metrics(HOLDS, PROBABILITIES, precisions=(0.9, 0.75, 1.0), shares=(0.125, 0.2, 0.25, 1.0))
    assert (found['positive'], found['negative'], found['accuracy']) == (3, 5, 0.75)
    # Of 15 pairs, two are the wrong way round or equal: (0.9, 0.9) counts half, (0.6, 0.9) none.
    assert found['roc_auc'] == pytest.approx((15 - 1.5) / 15)
    assert found['average_precision'] == pytest.approx(1 / 3 + 2 / 3 / 3 + 3 / 4 / 3)
    assert found['brier_score'] == pytest.approx(np.mean((PROBABILITIES - HOLDS) ** 2))
    assert [(row['count'], row['share']) for row in found['calibration']] == [
        *((1, 0.0), (1, 0.0), (1, 0.0), (1, 0.0), (1, 1.0)),
        (3, pytest.approx(2 / 3)),
    ]
    assert found['expected_calibration_error'] == pytest.approx((0.05 + 0.1 + 0.2 + 0.55 + 0.4 + 0.75) / 8)
    at = {row['threshold']: row for row in found['thresholds']}
    assert at[0.6] == {
        'threshold': 0.6,
        'precision': 0.75,
        'recall': 1.0,
        'false_positive_rate': 0.2,
        'kept': 0.5,
    }
    assert at[0.99]['precision'] is None
    # At 0.9 precision is 2/3, so 0.75 is not reached from there down, though 3/4 is at 0.6.
    assert [row['threshold'] for row in found['for_precision']] == [0.95, 0.95, 0.95]
    assert [row['threshold'] for row in found['for_share']] == [0.95, 0.9, 0.9, 0.05]
    assert [row['kept'] for row in found['for_share']] == [0.125, 0.375, 0.375, 1.0]
    assert probability_metrics(~HOLDS, PROBABILITIES, precisions=(0.5,))['for_precision'][0] == {
        'wanted': 0.5,
        'threshold': None,
    }


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), min_size=2), st.sampled_from([0.5, 0.8, 1.0]))
@settings(max_examples=50)
def test_precision_is_as_wanted_at_its_threshold_and_at_all_above(pairs, wanted):
    holds, scores = np.array([h for h, _ in pairs]), np.array([s / 20 for _, s in pairs])
    if holds.all() or not holds.any():
        return
    row = probability_metrics(holds, scores, precisions=(wanted,))['for_precision'][0]
    precision = {float(t): holds[scores >= t].mean() for t in np.unique(scores)}
    if row['threshold'] is None:
        assert precision[scores.max()] < wanted
    else:
        assert all(value >= wanted for t, value in precision.items() if t >= row['threshold'])
        lower = [t for t in precision if t < row['threshold']]
        assert not lower or precision[max(lower)] < wanted
