from xml.etree import ElementTree

from llm.evaluation.reports.charts import Line
from llm.evaluation.reports.log_log import log_log_svg

SVG = '{http://www.w3.org/2000/svg}'


def _lines(svg):
    root = ElementTree.fromstring(svg)
    return [
        [tuple(map(float, point.split(','))) for point in line.get('points').split()]
        for line in root.iter(f'{SVG}polyline')
    ]


def test_equal_ratios_are_equal_distances():
    svg = log_log_svg(
        [('a & b', [Line('up', [(64, 0.01), (128, 0.1), (256, 1.0)])])], x_label='width', y_label='change'
    )
    (points,) = _lines(svg)
    (x0, y0), (x1, y1), (x2, y2) = points
    assert abs((x1 - x0) - (x2 - x1)) < 0.2 and abs((y0 - y1) - (y1 - y2)) < 0.2
    assert x1 > x0 and y1 < y0
    assert 'a &amp; b' in svg


def test_panels_share_their_axes_and_stand_apart():
    panels = [('one', [Line('l', [(1, 1.0), (2, 1.0)])]), ('two', [Line('l', [(1, 1.0), (2, 100.0)])])]
    first, second = _lines(log_log_svg(panels, x_label='x', y_label='y'))
    assert first[0][1] == second[0][1]
    assert first[-1][0] < second[0][0]
