import re

import pytest

from llm.evaluation.reports.charts import Line
from llm.evaluation.reports.curves import COLOURS, curves_svg


def places(text):
    return [tuple(map(float, pair.split(','))) for pair in text.split(' ')]


def test_a_curve_and_its_band_are_where_the_axes_say():
    lines = [
        Line('a <b>', [(0.0, 1.0), (100.0, 3.0)], 0, [(0.0, 0.5, 1.5), (100.0, 2.0, 4.0)]),
        Line('c', [(0.0, 2.0), (50.0, 2.0)], 1),
    ]
    drawn = curves_svg([('first', lines), ('second', [Line('a', [(7.0, 5.0)])])], x_label='step')
    assert drawn.startswith('<svg') and drawn.count('a &lt;b&gt;') == 1 and 'a <b>' not in drawn
    first, second, *_ = re.findall(rf'<polyline points="([^"]*)" fill="none" stroke="({"|".join(COLOURS)})"', drawn)
    assert (first[1], second[1]) == COLOURS[:2]
    (x0, y1), (x1, y3) = places(first[0])
    (_, y2), (x_half, _) = places(second[0])
    assert x_half == pytest.approx((x0 + x1) / 2, abs=0.1) and y2 == pytest.approx((y1 + y3) / 2, abs=0.1)
    band = places(re.search(r'<polygon points="([^"]*)"', drawn)[1])
    unit = (y1 - y3) / 2
    heights = [1 + (y1 - y) / unit for _, y in band]
    assert heights == pytest.approx([1.5, 4.0, 2.0, 0.5], abs=0.01)
    grid = re.search(r'text-anchor="end">([\d.]+)</text>', drawn)
    assert 0 <= float(grid[1]) <= 4.5


def test_the_legend_of_a_single_panel_has_room_for_all_names():
    names = ['baseline', 'a name of more than thirty letters', 'candidate', 'again']
    drawn = curves_svg([('held_out', [Line(name, [(0.0, 1.0)], i) for i, name in enumerate(names)])], x_label='step')
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', drawn)[1])
    begins = [float(re.search(rf'<text x="([\d.]+)"[^>]*>{name}</text>', drawn)[1]) for name in names]
    for begin, name, end in zip(begins, names, [*(begin - 22 for begin in begins[1:]), width], strict=True):
        assert begin + 6.5 * len(name) < end
