"""Line charts as HTML: lines in an SVG that stretches with the page, words beside it that keep their size."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

from llm.evaluation.reports.escaping import escape
from llm.training.short_numbers import short_number

Points = Sequence[tuple[float, float]]
Scale = Callable[[float], float]

_MOST_POINTS = 200  # of a line; more are averaged in groups, and a band shows what each group spans
_MOST_DOTS = 60
_SIZE = 1000  # of the SVG's own coordinates, both ways


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: in the legend. points: (x, y) in order of x. colour: 0 to 5, of the page's palette.
        band: (x, low, high) in order of x, shaded behind the curve: what several runs span, say.
    """

    name: str
    points: Points
    colour: int = 0
    band: Sequence[tuple[float, float, float]] = ()


@dataclasses.dataclass(frozen=True)
class Level:
    """A horizontal line to compare with, labelled where it runs."""

    name: str
    value: float


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    levels: Sequence[Level] = (),
    marks: Sequence[float] = (),
    tokens_per_step: float | None = None,
    from_zero: bool = False,
    wide: bool = False,
    x_axis: str = '',
) -> str:
    """A chart over steps as a piece of HTML; '' if no line has a point.

    The axis is fitted to all but the first twentieth of the steps, where losses fall from far above.

    Args:
        marks: steps at which the run was resumed.
        tokens_per_step: shown with the axis, if known.
        from_zero: whether the vertical axis begins at 0 rather than at the least value.
        wide: whether the chart spans the page.
        x_axis: what runs along it in place of steps.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ''
    last = max(x for line in lines for x, _ in line.points) or 1.0
    x_range = (0.0, 1.01 * last)  # with room for the last dot
    y_range = _y_range(lines, levels, last / 20, from_zero)

    def x_of(x: float) -> float:
        return _SIZE * (x - x_range[0]) / (x_range[1] - x_range[0])

    def y_of(y: float) -> float:
        return _SIZE * (y_range[1] - y) / (y_range[1] - y_range[0])

    x_ticks, y_ticks = nice_ticks(*x_range, 5), nice_ticks(*y_range, 6)
    shapes = [f'<path class="grid" d="M0 {y_of(y):.2f}H{_SIZE}"/>' for y in y_ticks]
    shapes += [f'<path class="resumed" d="M{x_of(x):.2f} 0V{_SIZE}"/>' for x in marks if x <= last]
    shapes += [f'<path class="level" d="M0 {y_of(level.value):.2f}H{_SIZE}"/>' for level in levels]
    for line in lines:
        shapes += _curve(line, x_of, y_of)

    words = [f'<span class="y" style="top:{y_of(y) / 10:.2f}%">{tick_label(y, y_ticks)}</span>' for y in y_ticks]
    words += [f'<span class="x" style="left:{x_of(x) / 10:.2f}%">{tick_label(x, x_ticks)}</span>' for x in x_ticks]
    words += _level_names(levels, y_of)
    legend = ''.join(f'<span class="c{line.colour}">{escape(line.name)}</span>' for line in lines)
    if marks:
        legend += '<span class="resume">resumed</span>'
    axis = x_axis or ('step' if tokens_per_step is None else f'step, of {short_number(tokens_per_step)} tokens')
    return (
        f'<figure class="chart{" wide" if wide else ""}" data-x="{x_range[0]} {x_range[1]}" '
        f'data-y="{y_range[0]!r} {y_range[1]!r}" data-unit="{escape(x_axis or "step")}">'
        f'<figcaption><b>{escape(title)}</b>'
        f'<span class="legend">{legend}</span></figcaption><div class="plot">'
        f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f'{"".join(shapes)}</svg>{"".join(words)}</div><div class="axis">{escape(axis)}</div></figure>'
    )


def _curve(line: Line, x_of: Scale, y_of: Scale) -> list[str]:
    """The SVG shapes of one line: its band, if points were averaged, its curve, and dots if they are few."""
    groups = _groups(line.points)
    means = [(_mean([x for x, _ in group]), _mean([y for _, y in group])) for group in groups]
    shapes = []
    if line.band:
        edges = [(x, high) for x, _, high in line.band] + [(x, low) for x, low, _ in reversed(line.band)]
        outline = ' '.join(f'{x_of(x):.2f},{y_of(y):.2f}' for x, y in edges)
        shapes.append(f'<polygon class="band c{line.colour}" points="{outline}"/>')
    if len(means) < len(line.points):
        low = [(x, min(y for _, y in group)) for (x, _), group in zip(means, groups, strict=True)]
        high = [(x, max(y for _, y in group)) for (x, _), group in zip(means, groups, strict=True)]
        outline = ' '.join(f'{x_of(x):.2f},{y_of(y):.2f}' for x, y in [*high, *reversed(low)])
        shapes.append(f'<polygon class="band c{line.colour}" points="{outline}"/>')
    curve = ' '.join(f'{x_of(x):.2f},{y_of(y):.3f}' for x, y in means)
    shapes.append(f'<polyline class="line c{line.colour}" data-name="{escape(line.name)}" points="{curve}"/>')
    if len(means) <= _MOST_DOTS:
        # A line of no length with round ends stays a circle, however the drawing is stretched.
        dots = ''.join(f'M{x_of(x):.2f} {y_of(y):.2f}h0' for x, y in means)
        shapes.append(f'<path class="dots c{line.colour}" d="{dots}"/>')
    return shapes


def _groups(points: Points) -> list[Points]:
    size = -(-len(points) // _MOST_POINTS)
    return [points[i : i + size] for i in range(0, len(points), size)]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _y_range(lines: Sequence[Line], levels: Sequence[Level], settled: float, from_zero: bool) -> tuple[float, float]:
    values = [level.value for level in levels]
    for line in lines:
        values += [y for x, y in line.points if x >= settled]
        values += [y for x, *band in line.band if x >= settled for y in band]
    low = min([*values, *(y for line in lines for _, y in line.points)])
    high = max(values, default=low)
    if from_zero:
        return min(low, 0.0), high * 1.08 if high > 0 else 1.0
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]: at most `about` + 1, at least 0.4 of `about`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_label(value: float, ticks: Sequence[float]) -> str:
    """`value` with as many decimals as tell the ticks apart."""
    if value == 0:
        return '0'
    largest = max(abs(tick) for tick in ticks)
    if largest < 0.01:
        return re.sub(r'(\.0)?e-0', 'e-', f'{value:.1e}')
    if largest >= 1000:
        return re.sub(r'\.?0+(?=[kMGT])', '', short_number(value)) if abs(value) >= 1000 else f'{value:.0f}'
    step = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value)
    return f'{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}'


def _level_names(levels: Sequence[Level], y_of: Scale) -> list[str]:
    """Labels above their lines; below where the line above it is near."""
    names, previous = [], -math.inf
    for level in sorted(levels, key=lambda level: -level.value):
        top = y_of(level.value)
        side = 'below' if top - previous < 90 else 'above'
        previous = top
        text = f'{escape(level.name)} {level.value:.3f}'
        names.append(f'<span class="name {side}" style="top:{top / 10:.2f}%">{text}</span>')
    return names
