import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.evaluation.reports.charts import Level, Line, line_chart, nice_ticks


def curve(chart: str, name: str) -> list[tuple[float, float]]:
    """The points of a curve, read back from the drawing as the page's script does."""
    (x0, x1), (y0, y1) = (map(float, re.search(rf'data-{axis}="(\S+) (\S+)"', chart).groups()) for axis in 'xy')
    points = re.search(rf'data-name="{name}" points="([^"]*)"', chart)[1]
    pairs = (map(float, pair.split(',')) for pair in points.split(' '))
    return [(x0 + x / 1000 * (x1 - x0), y1 - y / 1000 * (y1 - y0)) for x, y in pairs]


def test_curve_holds_the_values():
    points = [(10.0, 3.5), (20.0, 2.25), (40.0, 1.125)]
    chart = line_chart('Loss', [Line('training', points)])
    assert curve(chart, 'training') == [(pytest.approx(x, abs=1e-3), pytest.approx(y, abs=1e-4)) for x, y in points]
    assert 'class="dots' in chart
    assert 'class="band' not in chart


def test_many_points_are_averaged_and_their_span_kept():
    points = [(float(step), 2.0 + (-1) ** step) for step in range(1, 100_001)]
    chart = line_chart('Loss', [Line('training', points)])
    means = curve(chart, 'training')
    assert len(means) == 200
    assert all(y == pytest.approx(2.0, abs=1e-3) for _, y in means)
    band = re.search(r'<polygon class="band c0" points="([^"]*)"', chart)[1]
    (y0, y1) = map(float, re.search(r'data-y="(\S+) (\S+)"', chart).groups())
    heights = {round(y1 - float(pair.split(',')[1]) / 1000 * (y1 - y0), 2) for pair in band.split(' ')}
    assert heights == {1.0, 3.0}
    assert len(chart) < 40_000


def test_a_band_of_ones_own_is_inside_the_chart():
    points, band = [(10.0, 2.0), (20.0, 1.5)], [(10.0, 1.0, 3.0), (20.0, 1.4, 1.6)]
    chart = line_chart('Loss', [Line('mean', points, 1, band)])
    drawn = re.search(r'<polygon class="band c1" points="([^"]*)"', chart)[1]
    (y0, y1) = map(float, re.search(r'data-y="(\S+) (\S+)"', chart).groups())
    heights = [y1 - float(pair.split(',')[1]) / 1000 * (y1 - y0) for pair in drawn.split(' ')]
    assert heights == pytest.approx([3.0, 1.6, 1.4, 1.0], abs=1e-4)
    assert y0 < 1.0 and y1 > 3.0


def test_axis_is_fitted_to_what_comes_after_the_first_fall():
    points = [(float(step), 100.0 if step < 5 else 2.0 + 1 / step) for step in range(1, 201)]
    y0, y1 = map(float, re.search(r'data-y="(\S+) (\S+)"', line_chart('Loss', [Line('training', points)])).groups())
    assert y0 < 2.0
    assert y1 < 3.0


def test_levels_are_inside_the_chart_and_named():
    chart = line_chart(
        'Bits', [Line('held out', [(0.0, 2.0), (10.0, 1.5)])], levels=[Level('xz', 0.5), Level('a', 0.51)]
    )
    y0, y1 = map(float, re.search(r'data-y="(\S+) (\S+)"', chart).groups())
    assert y0 < 0.5 < y1
    assert 'xz 0.500' in chart
    assert chart.count('name below') == chart.count('name above') == 1


def test_no_points_is_no_chart():
    assert line_chart('Loss', [Line('training', [])], levels=[Level('xz', 1.0)]) == ''


def test_one_point_and_a_constant_can_be_drawn():
    assert curve(line_chart('Loss', [Line('a', [(0.0, 0.0)])]), 'a') == [(0.0, 0.0)]
    flat = curve(line_chart('Loss', [Line('a', [(1.0, 5.0), (2.0, 5.0)])], from_zero=True), 'a')
    assert flat == [pytest.approx((1.0, 5.0)), pytest.approx((2.0, 5.0))]


@given(low=st.floats(-1e3, 1e3), width=st.floats(1e-3, 1e6), about=st.integers(3, 8))
def test_ticks_are_round_even_and_inside(low, width, about):
    ticks = nice_ticks(low, low + width, about)
    # The step is rounded up to 1, 2, 5 or 10: by 5 / 2 at most.
    assert math.floor(about / 2.5) <= len(ticks) <= about + 1
    assert all(low - 1e-6 * width <= tick <= low + width * (1 + 1e-6) for tick in ticks)
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    for step in steps:
        assert step == pytest.approx(steps[0])
        assert f'{step:.6e}'.startswith(('1.000000', '2.000000', '5.000000'))


@pytest.mark.parametrize(
    ('values', 'labels'),
    [
        ((0, 0.001), ['0', '2e-4', '4e-4', '6e-4', '8e-4', '1e-3']),
        ((0, 50_000), ['0', '10k', '20k', '30k', '40k', '50k']),
        ((0, 0.4), ['0', '0.1', '0.2', '0.3', '0.4']),
        ((0, 5), ['0', '1', '2', '3', '4', '5']),
    ],
)
def test_tick_labels_are_short(values, labels):
    points = [(float(i), float(value)) for i, value in enumerate(values)]
    chart = line_chart('Rate', [Line('rate', points)], from_zero=True)
    assert sorted(re.findall(r'class="y"[^>]*>([^<]*)<', chart)) == sorted(labels)


def test_names_are_escaped():
    chart = line_chart('<b>', [Line('"><script>', [(1.0, 1.0)])], levels=[Level('<i>', 1.0)])
    assert '<script>' not in chart
    assert '<b><b>' not in chart
    assert '<i>' not in chart
