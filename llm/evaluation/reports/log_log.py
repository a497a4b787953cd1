"""A log-log chart as an SVG file that stands alone, for the README of an experiment."""

import math
from collections.abc import Sequence
from html import escape

from llm.evaluation.reports.charts import Line
from llm.evaluation.reports.curves import COLOURS
from llm.training.short_numbers import short_number

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 330, 250, 62, 30, 44


def log_log_svg(panels: Sequence[tuple[str, Sequence[Line]]], *, x_label: str, y_label: str) -> str:
    """Panels side by side with common axes, each a title and lines of positive (x, y); the legend is the last panel's.

    Args:
        x_label, y_label: what is on the axes; ticks are at the values of x and at powers of ten of y.
    """
    points = [point for _, lines in panels for line in lines for point in line.points]
    xs = sorted({x for x, _ in points})
    low, high = (math.log10(f(y for _, y in points)) for f in (min, max))
    margin = 0.08 * max(high - low, 0.5)
    low, high = low - margin, high + margin
    span = math.log2(xs[-1] / xs[0]) or 1.0

    def place(panel: int, x: float, y: float) -> tuple[float, float]:
        left = _LEFT + panel * (_WIDTH + 24)
        across = left + _WIDTH * (0.04 + 0.92 * math.log2(x / xs[0]) / span)
        return across, _TOP + _HEIGHT * (high - math.log10(y)) / (high - low)

    decades = range(math.ceil(low), math.floor(high) + 1)
    parts = []
    for number, (title, lines) in enumerate(panels):
        left, right = _LEFT + number * (_WIDTH + 24), _LEFT + number * (_WIDTH + 24) + _WIDTH
        parts.append(f'<text x="{left}" y="{_TOP - 10}" font-weight="600">{escape(title)}</text>')
        for decade in decades:
            y = place(number, xs[0], 10.0**decade)[1]
            parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#8884"/>')
            if number == 0:
                parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">1e{decade}</text>')
        for x in xs:
            across = place(number, x, 10.0**low)[0]
            label = short_number(x) if x >= 10_000 else f'{x:g}'
            parts.append(f'<text x="{across:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{label}</text>')
        for line in lines:
            colour = COLOURS[line.colour % len(COLOURS)]
            path = ' '.join('{:.1f},{:.1f}'.format(*place(number, x, y)) for x, y in line.points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    total = _LEFT + len(panels) * (_WIDTH + 24)
    for index, line in enumerate(panels[-1][1]):
        y = _TOP + 10 + 18 * index
        parts.append(f'<path d="M{total} {y}h16" stroke="{COLOURS[line.colour % len(COLOURS)]}" stroke-width="3"/>')
        parts.append(f'<text x="{total + 22}" y="{y + 4}">{escape(line.name)}</text>')
    middle = (_LEFT + total) / 2
    parts.append(f'<text x="{middle}" y="{_TOP + _HEIGHT + 36}" text-anchor="middle">{escape(x_label)}</text>')
    centre = _TOP + _HEIGHT / 2
    parts.append(
        f'<text x="14" y="{centre}" text-anchor="middle" transform="rotate(-90 14 {centre})">{escape(y_label)}</text>'
    )
    width, height = total + 120, _TOP + _HEIGHT + _BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#667"><rect width="100%" height="100%" fill="#fff"/>'
        + ''.join(parts)
        + '</svg>\n'
    )
