"""How good the probabilities of one label are: ranking, calibration, and what thresholds do."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llm.evaluation.metrics import library

_BINS = 10
THRESHOLDS = (0.01, 0.05, *(i / 10 for i in range(1, 10)), 0.95, 0.99)


def probability_metrics(
    holds: np.ndarray, probabilities: np.ndarray, *, precisions: Sequence[float] = (), shares: Sequence[float] = ()
) -> dict[str, Any]:
    """Figures as JSON takes them.

    Args:
        holds: bool [n], whether the label holds; both values occur. probabilities: [n], that it does.
        precisions: for each the least threshold at which, and above which, precision is at least that much.
        shares: for each the threshold that keeps that share of the examples, or the least more.
    """
    metrics = library('sklearn.metrics')
    clipped = np.clip(probabilities, 1e-12, 1 - 1e-12)
    return {
        'positive': int(holds.sum()),
        'negative': int((~holds).sum()),
        'accuracy': float(np.mean((probabilities >= 0.5) == holds)),
        'roc_auc': float(metrics.roc_auc_score(holds, probabilities)),
        'average_precision': float(metrics.average_precision_score(holds, probabilities)),
        'log_loss': float(-np.mean(np.where(holds, np.log(clipped), np.log1p(-clipped)))),
        'brier_score': float(np.mean((probabilities - holds) ** 2)),
        **_calibration(holds, probabilities),
        'thresholds': [at_threshold(holds, probabilities, threshold) for threshold in THRESHOLDS],
        'for_precision': [
            {'wanted': wanted, **_optional(holds, probabilities, _for_precision(holds, probabilities, wanted))}
            for wanted in precisions
        ],
        'for_share': [
            {'wanted': wanted, **at_threshold(holds, probabilities, _for_share(probabilities, wanted))}
            for wanted in shares
        ],
    }


def at_threshold(holds: np.ndarray, probabilities: np.ndarray, threshold: float) -> dict[str, float | None]:
    """What is kept, if that is what has at least this probability; precision is None where nothing is."""
    kept = probabilities >= threshold
    return {
        'threshold': float(threshold),
        'precision': float(holds[kept].mean()) if kept.any() else None,
        'recall': float(kept[holds].mean()),
        'false_positive_rate': float(kept[~holds].mean()),
        'kept': float(kept.mean()),
    }


def _optional(holds: np.ndarray, probabilities: np.ndarray, threshold: float | None) -> dict[str, float | None]:
    return {'threshold': None} if threshold is None else at_threshold(holds, probabilities, threshold)


def _for_precision(holds: np.ndarray, probabilities: np.ndarray, wanted: float) -> float | None:
    """The least threshold from which on precision is at least as wanted; None where the highest has less."""
    order = np.argsort(-probabilities, kind='stable')
    ranked, ends = probabilities[order], np.append(np.flatnonzero(np.diff(probabilities[order])), len(order) - 1)
    precision = np.cumsum(holds[order])[ends] / (ends + 1)
    short = np.flatnonzero(precision < wanted)
    reached = short[0] if len(short) else len(ends)
    return float(ranked[ends[reached - 1]]) if reached else None


def _for_share(probabilities: np.ndarray, wanted: float) -> float:
    count = min(max(int(np.ceil(wanted * len(probabilities))), 1), len(probabilities))
    return float(np.partition(probabilities, -count)[-count])


def _calibration(holds: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Bins of equal width, and the expected calibration error over them (Naeini et al. 2015)."""
    bins = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1)
    counts = np.bincount(bins, minlength=_BINS)
    said, true = (np.bincount(bins, values, _BINS) for values in (probabilities, holds.astype(np.float64)))
    rows = [
        {'count': int(counts[i]), 'mean_probability': float(said[i] / counts[i]), 'share': float(true[i] / counts[i])}
        for i in np.flatnonzero(counts)
    ]
    return {'expected_calibration_error': float(np.abs(said - true).sum() / len(holds)), 'calibration': rows}
