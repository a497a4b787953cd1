"""The page about a trained classifier, complete in one file."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm.evaluation.reports.charts import Line, line_chart
from llm.evaluation.reports.document import cards, details, document, grid, table
from llm.evaluation.reports.escaping import escape

_POINTS, _BINS = 100, 25


@dataclasses.dataclass(frozen=True)
class Curves:
    """What curves are drawn from: targets bool [n, labels], probabilities [n, labels], of held-out examples."""

    targets: np.ndarray
    probabilities: np.ndarray


def render(metrics: dict[str, Any], curves: Curves, hardest: dict[str, dict[str, list[tuple[float, str]]]]) -> str:
    """The page as text.

    Args:
        metrics: what metrics.json holds. hardest: by label and kind, (probability, excerpt).
    """
    labels = list(metrics['labels'])
    # Of two exclusive labels one says everything.
    shown = labels[:1] if len(labels) == 2 and 'accuracy' in metrics else labels
    examples = metrics['examples']
    body = [
        f'<header><h1>Classifier of {escape(", ".join(labels))}</h1></header>',
        _warnings(metrics['warnings']),
        cards(_figures(metrics, shown)),
        _charts(shown, curves, metrics),
        *(_thresholds(label, metrics['labels'][label]) for label in shown),
        '<section><h2>Most telling n-grams</h2><p class="soft">By weight times standard deviation of the feature; '
        'where hashes collide, two names. Names are looked for in the beginnings of some examples.</p>',
        *(_ngrams(label, sides) for label, sides in metrics['telling_ngrams'].items()),
        '</section><section><h2>Hardest held-out examples</h2>',
        *(_examples(kind, some) for label in shown for kind, some in hardest[label].items()),
        '</section>',
        details('Examples', table((name, f'{count:,}') for name, count in examples.items())),
        details('Training', _history(metrics['history'])),
        f'<p class="soft">Digest {escape(metrics["digest"])}. {metrics["used_buckets"]:,} buckets have weights.</p>',
    ]
    return document(f'Classifier of {", ".join(labels)}', body)


def _warnings(warnings: Sequence[str]) -> str:
    items = ''.join(f'<li>{escape(warning)}</li>' for warning in warnings)
    return f'<section class="warnings"><ul>{items}</ul></section>' if items else ''


def _figures(metrics: dict[str, Any], shown: Sequence[str]) -> list[tuple[str, str, str]]:
    found = []
    if 'accuracy' in metrics:
        found.append(('Accuracy', f'{metrics["accuracy"]:.4f}', f'{metrics["examples"]["held_out"]:,} held out'))
    for label in shown:
        figures = metrics['labels'][label]
        share = figures['positive'] / (figures['positive'] + figures['negative'])
        found.append((f'{label}: ROC AUC', f'{figures["roc_auc"]:.4f}', 'chance 0.5'))
        found.append((f'{label}: average precision', f'{figures["average_precision"]:.4f}', f'chance {share:.3f}'))
        found.append((f'{label}: calibration error', f'{figures["expected_calibration_error"]:.4f}', 'expected'))
    return found


def _charts(shown: Sequence[str], curves: Curves, metrics: dict[str, Any]) -> str:
    roc, recalls, reliability = [], [], []
    drawn = []
    for i, label in enumerate(shown):
        holds, probabilities = curves.targets[:, i], curves.probabilities[:, i]
        order = np.argsort(-probabilities, kind='stable')
        hits, alarms = np.cumsum(holds[order]), np.cumsum(~holds[order])
        ends = np.append(np.flatnonzero(np.diff(probabilities[order])), len(order) - 1)
        recall, fall_out = 100 * hits[ends] / hits[-1], 100 * alarms[ends] / alarms[-1]
        precision = 100 * hits[ends] / (ends + 1)
        roc.append(Line(label, _thinned([0, *fall_out], [0, *recall]), i % 5))
        recalls.append(Line(label, _thinned(recall, precision), i % 5))
        rows = metrics['labels'][label]['calibration']
        points = [(100 * row['mean_probability'], 100 * row['share']) for row in rows]
        reliability.append(Line(label, points, i % 5))
        lines = [
            Line(name, _histogram(probabilities[which]), colour)
            for name, which, colour in ((label, holds, 0), (f'not {label}', ~holds, 1))
        ]
        drawn.append(line_chart(f'Scores of {label}, % of each class', lines, from_zero=True, x_axis='probability, %'))
    diagonal = Line('chance', [(0, 0), (100, 100)], 5)
    ideal = Line('calibrated', [(0, 0), (100, 100)], 5)
    return '<section class="grid charts">' + ''.join(
        [
            line_chart('ROC: recall, %', [*roc, diagonal], from_zero=True, x_axis='false positive rate, %'),
            line_chart('Precision, %', recalls, from_zero=True, x_axis='recall, %'),
            *drawn,
            line_chart('Share that holds, %', [*reliability, ideal], from_zero=True, x_axis='mean probability, %'),
        ]
    ) + '</section>'  # fmt: skip


def _thinned(x: Any, y: Any) -> list[tuple[float, float]]:
    """At most so many points of a curve, the last among them."""
    which = np.unique(np.linspace(0, len(x) - 1, _POINTS).round().astype(np.int64))
    return [(float(x[i]), float(y[i])) for i in which]


def _histogram(probabilities: np.ndarray) -> list[tuple[float, float]]:
    counts, edges = np.histogram(probabilities, _BINS, (0, 1))
    return [
        (50 * (a + b), 100 * count / len(probabilities))
        for a, b, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    ]


_COLUMNS = ('threshold', 'precision', 'recall', 'false_positive_rate', 'kept')


def _thresholds(label: str, figures: dict[str, Any]) -> str:
    header = ['', *(name.replace('_', ' ') for name in _COLUMNS)]
    rows = [['', *_cells(row)] for row in figures['thresholds']]
    rows += [[f'precision {row["wanted"]:g}', *_cells(row)] for row in figures['for_precision']]
    rows += [[f'keeps {row["wanted"]:g}', *_cells(row)] for row in figures['for_share']]
    return f'<section><h2>Thresholds of {escape(label)}</h2><div class="card">{grid(header, rows)}</div></section>'


def _cells(row: dict[str, Any]) -> list[str]:
    if row['threshold'] is None:
        return ['not reached', *[''] * (len(_COLUMNS) - 1)]
    return [f'{row["threshold"]:.6g}', *('' if row[n] is None else f'{row[n]:.4f}' for n in _COLUMNS[1:])]


def _ngrams(label: str, sides: dict[str, list[dict[str, Any]]]) -> str:
    header = [f'for {label}', 'weight', 'examples', 'against', 'weight', 'examples']
    blank = ['', '', '']
    columns = [
        [[row['ngram'] or '(no name found)', f'{row["weight"]:+.3f}', f'{row["examples"]:,}'] for row in side]
        for side in sides.values()
    ]
    count = max(map(len, columns))
    rows = [[cell for side in columns for cell in (side[i] if i < len(side) else blank)] for i in range(count)]
    return f'<div class="card">{grid(header, rows)}</div>'


def _examples(kind: str, some: list[tuple[float, str]]) -> str:
    shown = (f'<span class="prompt">{probability:.4f}</span> {escape(text)}' for probability, text in some)
    return details(kind, ''.join(f'<div class="card sample"><pre dir="auto">{text}</pre></div>' for text in shown))


def _history(history: list[dict[str, float]]) -> str:
    if not history:
        return ''
    header = list(history[-1])
    return grid(header, [[f'{row[name]:g}' for name in header] for row in history])
