"""Curves with bands as an SVG file that stands alone, for the README of an experiment."""

from collections.abc import Sequence
from html import escape

from llm.evaluation.reports.charts import Line, nice_ticks, tick_label

COLOURS = ('#2563eb', '#d9480f', '#0b8a5f', '#8b3fd9', '#b8860b', '#c2255c')
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _COLUMNS = 300, 200, 52, 30, 56, 3


def curves_svg(panels: Sequence[tuple[str, Sequence[Line]]], *, x_label: str) -> str:
    """Panels in rows of three, each a title and lines on linear axes of its own; the legend is the first panel's."""
    parts = []
    for number, (title, lines) in enumerate(panels):
        left = _LEFT + (number % _COLUMNS) * (_WIDTH + _LEFT)
        top = _TOP + (number // _COLUMNS) * (_HEIGHT + _TOP + _BOTTOM)
        parts += _panel(title, lines, left, top, x_label)
    rows = -(-len(panels) // _COLUMNS)
    width, height = min(len(panels), _COLUMNS) * (_WIDTH + _LEFT) + 20, rows * (_HEIGHT + _TOP + _BOTTOM) + 24
    left = _LEFT
    for line in panels[0][1] if panels else ():
        colour = COLOURS[line.colour % len(COLOURS)]
        parts.append(f'<path d="M{left} {height - 14}h16" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{left + 22}" y="{height - 10}">{escape(line.name)}</text>')
        left += max(150, 46 + 7 * len(line.name))  # a letter has about 7 pixels
    width = max(width, left)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#667"><rect width="100%" height="100%" fill="#fff"/>'
        + ''.join(parts)
        + '</svg>\n'
    )


def _panel(title: str, lines: Sequence[Line], left: float, top: float, x_label: str) -> list[str]:
    points = [point for line in lines for point in line.points]
    points += [(x, y) for line in lines for x, *band in line.band for y in band]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> str:
        across = left + _WIDTH * (x - x_low) / ((x_high - x_low) or 1.0)
        return f'{across:.1f},{top + _HEIGHT * (high - y) / (high - low):.1f}'

    parts = [f'<text x="{left}" y="{top - 10}" font-weight="600">{escape(title)}</text>']
    y_ticks = nice_ticks(low, high, 5)
    for y in y_ticks:
        down = place(x_low, y).partition(',')[2]
        parts.append(f'<path d="M{left} {down}h{_WIDTH}" stroke="#8884"/>')
        parts.append(
            f'<text x="{left - 6}" y="{float(down) + 4:.1f}" text-anchor="end">{tick_label(y, y_ticks)}</text>'
        )
    x_ticks = nice_ticks(x_low, x_high, 4) if x_high > x_low else [x_low]
    for x in x_ticks:
        across = place(x, low).partition(',')[0]
        label = tick_label(x, x_ticks)
        parts.append(f'<text x="{across}" y="{top + _HEIGHT + 16}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text x="{left + _WIDTH / 2}" y="{top + _HEIGHT + 33}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for line in lines:
        colour = COLOURS[line.colour % len(COLOURS)]
        edges = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
        if edges:
            outline = ' '.join(place(x, y) for x, y in edges)
            parts.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity=".18"/>')
        path = ' '.join(place(x, y) for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return parts
