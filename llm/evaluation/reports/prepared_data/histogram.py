"""A histogram of a rule's figures: what the rule keeps and removes, with its bounds, and shares under the pointer."""

import itertools
import math
from typing import Any

from llm.evaluation.reports.charts import nice_ticks
from llm.evaluation.reports.escaping import escape
from llm.evaluation.reports.prepared_data.tables import percent

_SIZE = 1000
_END = 26  # width of the bars for what lies beyond the axis


def histogram(figure: dict[str, Any], title: str) -> str:
    """HTML of a histogram as `Histogram.as_json` gives it; heights are square roots, so that few documents show."""
    edges, scale = figure['edges'], figure['scale']
    kept, removed = figure['kept'], figure['removed']
    counts = [a + b for a, b in zip(kept, removed, strict=True)]
    total, highest = sum(counts), max(counts)
    if not total:
        return ''
    # A bound of 0 is an edge, too: on a logarithmic axis left of all others.
    first = edges[1] / 2 if scale == 'log' and edges[0] <= 0 else edges[0]
    low, high = (math.log(edge) if scale == 'log' else edge for edge in (first, edges[-1]))
    left, right = (_END + 8 if counts[end] else 0 for end in (0, -1))

    def across(value: float) -> float:
        place = (math.log(max(value, first)) if scale == 'log' else value) - low
        return left + (_SIZE - left - right) * place / (high - low)

    def border(bound: float, upper: int) -> float:
        """Where the bars on the bound's two sides meet: of whole numbers, between two; below a least, above a most."""
        return across(min(edges, key=lambda edge: (abs(edge - bound), -upper * edge)))

    shapes = [f'<path class="base" d="M0 {_SIZE}H{_SIZE}"/>']
    shapes += [
        f'<rect class="zone" x="0" y="0" width="{border(x, -1):.1f}" height="{_SIZE}"/>' for x in figure['least'][:1]
    ]
    for x in figure['most'][-1:]:
        start = border(x, 1)
        shapes.append(f'<rect class="zone" x="{start:.1f}" y="0" width="{_SIZE - start:.1f}" height="{_SIZE}"/>')
    spans = [(0.0, float(_END)), *itertools.pairwise(map(across, edges)), (float(_SIZE - _END), float(_SIZE))]
    names = [f'below {_figure(edges[0])}', *(_between(a, b, figure) for a, b in itertools.pairwise(edges))]
    names.append(f'from {_figure(edges[-1])}')
    before = 0
    for (start, end), name, stays, goes in zip(spans, names, kept, removed, strict=True):
        if not stays + goes:
            continue
        height = _SIZE * math.sqrt((stays + goes) / highest)
        gone = height * goes / (stays + goes)
        x, width = f'x="{start + 0.8:.1f}"', f'width="{max(1.5, end - start - 1.6):.1f}"'
        if stays:
            shapes.append(f'<rect class="kept" {x} y="{_SIZE - height:.1f}" {width} height="{height - gone:.1f}"/>')
        if goes:
            shapes.append(f'<rect class="gone" {x} y="{_SIZE - gone:.1f}" {width} height="{gone:.1f}"/>')
        behind = total - before - stays - goes
        words = (
            f'{name}: {stays + goes:,} documents ({percent(stays + goes, total)}), {goes:,} of them removed; '
            f'less: {percent(before, total)}, more: {percent(behind, total)}'
        )
        shapes.append(f'<rect class="hit" {x} y="0" {width} height="{_SIZE}"><title>{escape(words)}</title></rect>')
        before += stays + goes
    labels = []
    for x, sign, upper in (*((x, '≥', -1) for x in figure['least']), *((x, '≤', 1) for x in figure['most'])):
        place = border(x, upper)
        side = ' first' if place < 80 else ' last' if place > _SIZE - 80 else ''
        shapes.append(f'<path class="bound" d="M{place:.1f} 0V{_SIZE}"/>')
        labels.append(f'<span class="at{side}" style="left:{place / 10:.1f}%">{sign} {_figure(x)}</span>')
    labels += [
        f'<span class="tick" style="left:{across(tick) / 10:.1f}%">{_figure(tick)}</span>'
        for tick in _ticks([first, *edges[1:]], scale)
    ]
    return (
        f'<div class="histogram" role="img" aria-label="{escape(title)}"><svg viewBox="0 0 {_SIZE} {_SIZE}" '
        f'preserveAspectRatio="none">{"".join(shapes)}</svg>{"".join(labels)}</div>'
    )


def _between(start: float, end: float, figure: dict[str, Any]) -> str:
    if end - start == 1 and start % 1 == 0.5:  # bars of whole numbers
        return _figure(start + 0.5)
    return f'{_figure(start)} to {_figure(end)}'


def _ticks(edges: list[float], scale: str) -> list[float]:
    if scale != 'log':
        ticks = nice_ticks(edges[0], edges[-1], 5)
        return [tick for tick in ticks if tick % 1 == 0] if edges[0] % 1 == 0.5 else ticks
    decades = range(math.ceil(math.log10(edges[0]) - 1e-9), math.floor(math.log10(edges[-1]) + 1e-9) + 1)
    return [10.0**decade for decade in decades]


def _figure(value: float) -> str:
    if abs(value) >= 10_000:
        return f'{value:,.0f}'
    return f'{value:.4g}'
