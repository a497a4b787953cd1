"""The page of an ablation of data: the verdict, curves with what seeds span, all metrics, and what each variant is."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm.evaluation.reports.charts import Line, line_chart
from llm.evaluation.reports.curves import curves_svg
from llm.evaluation.reports.document import cards, details, document, grid
from llm.evaluation.reports.escaping import escape
from llm.training.short_numbers import short_number

# By held-out set and variant, the curve of each seed.
Curves = Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]]


def _lines(by_variant: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> list[Line]:
    """The mean over seeds of each variant, and a band from the lowest to the highest."""
    lines = []
    for colour, (name, seeds) in enumerate(by_variant.items()):
        steps = [x for x, _ in seeds[0]]
        columns = [[points[i][1] for points in seeds] for i in range(len(steps))]
        mean = [(x, sum(values) / len(values)) for x, values in zip(steps, columns, strict=True)]
        band = [(x, min(values), max(values)) for x, values in zip(steps, columns, strict=True)]
        lines.append(Line(name, mean, colour % 6, band))
    return lines


def chart_svg(curves: Curves) -> str:
    """Bits per byte of all held-out sets, without what comes before the first twentieth of the steps."""
    panels = []
    for name, by_variant in curves.items():
        last = max(x for seeds in by_variant.values() for points in seeds for x, _ in points)
        late = {
            variant: [[point for point in points if point[0] >= last / 20] for points in seeds]
            for variant, seeds in by_variant.items()
        }
        panels.append((f'{name}: bits per byte', _lines(late)))
    return curves_svg(panels, x_label='step')


def render_page(record: Mapping[str, Any], curves: Curves, config: str) -> str:
    """The page, from the content of verdict.json, the curves, and the config as text."""
    tokens = record['tokens_per_step']
    body = [
        f'<header><h1>{escape(record["name"])}</h1>{"".join(map(_status, record["overall"].items()))}</header>',
        *(f'<p><b>{escape(text)}</b></p>' for text in record['sentences']),
        _warnings(record['warnings']),
        cards(
            [
                ('Runs', str(len(record['seeds']) * len(record['data'])), f'{len(record["seeds"])} seeds each'),
                ('Parameters', short_number(record['parameters']), ''),
                ('Tokens of a run', short_number(record['steps'] * tokens), f'{record["steps"]:,} steps'),
                ('Vocabulary', f'{record["vocabulary_size"]:,}', 'the same for all'),
            ]
        ),
        '<section class="grid charts">'
        + ''.join(
            line_chart(f'{name}: bits per byte', _lines(some), tokens_per_step=tokens) for name, some in curves.items()
        )
        + '</section><p class="soft">Mean over seeds; the band is from the lowest seed to the highest.</p>',
        '<h2>Metrics</h2>',
        '<div class="narrow">',
        grid(
            ('set', 'metric', 'variant', 'verdict', 'baseline', 'value', 'difference', 'interval', 'p', 'corrected'),
            [_metric(each) for each in record['metrics']],
        ),
        '</div>',
        f'<p class="soft">↑ larger is better, ↓ smaller is. Intervals of {100 * record["confidence"]:g}%, of the '
        f'difference from {escape(record["baseline"])}. Chance is {escape(_chance(record["chance"]))}.</p>',
        '<h2>What each variant is</h2>',
        _data(record['data']),
        '<h2>Held-out text in the training text</h2>',
        grid(
            ('variant', 'set', 'texts', 'equal documents', 'texts that share words', 'share of word runs'),
            [
                (
                    variant,
                    name,
                    f'{each["documents"]:,}',
                    f'{each["equal"]:,}',
                    f'{each["touched"]:,}',
                    f'{each["share"]:.3%}',
                )
                for variant, sets in record['overlap'].items()
                for name, each in sets.items()
            ],
        ),
        '<h2>What the tests assume</h2>',
        '<ul>' + ''.join(f'<li>{escape(text)}</li>' for text in record['assumptions']) + '</ul>',
        details('Configuration', f'<pre>{escape(config)}</pre>'),
    ]
    return document(record['name'], body)


def _status(item: tuple[str, str]) -> str:
    name, verdict = item
    kind = 'status complete' if verdict == 'better' else 'status'
    return f'<span class="{kind}">{escape(name)}: {escape(verdict)}</span>'


def _warnings(warnings: Sequence[str]) -> str:
    items = ''.join(f'<li>{escape(text)}</li>' for text in warnings)
    return f'<section class="warnings"><ul>{items}</ul></section>' if items else ''


def _metric(each: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        each['dataset'],
        f'{each["metric"].replace("_", " ")} {"↑" if each["larger_is_better"] else "↓"}',
        each['variant'],
        each['verdict'],
        f'{each["baseline"]:.4f}',
        f'{each["value"]:.4f}',
        f'{each["difference"]:+.4f}',
        f'{each["low"]:+.4f} to {each["high"]:+.4f}',
        f'{each["p_value"]:.2g}',
        f'{each["corrected_p_value"]:.2g}',
    )


def _chance(chance: Mapping[str, float]) -> str:
    return ', '.join(f'{value:.4f} on {name}' for name, value in chance.items()) or 'no matter here'


def _data(data: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for figures in data.values() for name in figures))
    rows = [(name, *(_figure(figures.get(name, '')) for figures in data.values())) for name in names]
    return grid(('', *data), rows)


def _figure(value: Any) -> str:
    return f'{value:,}' if isinstance(value, int) else f'{value:.3f}' if isinstance(value, float) else str(value)
