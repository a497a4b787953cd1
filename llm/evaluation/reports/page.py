"""The report of a run as one HTML page: no file, font or address besides it is needed to read it."""

import functools
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.evaluation.reports.charts import Level, Line, line_chart
from llm.evaluation.reports.document import cards, details, document, table
from llm.evaluation.reports.escaping import escape
from llm.evaluation.reports.run_record import Points, RunRecord, read_run
from llm.training.run_directory import write_atomically
from llm.training.short_numbers import short_duration, short_number

REPORT_FILE = 'report.html'
_SAMPLED_STEPS = 20
_EXAMPLES = 20
# Of the baselines in a summary, by name: in words, and short enough for a chart.
_BASELINE_NAMES = {
    'xz_alone_bits_per_byte': ('xz -9 alone', 'xz -9 alone'),
    'xz_primed_bits_per_byte': ('xz -9 primed with the training text', 'xz -9 primed'),
}


def write_report(run_directory: Path) -> Path:
    """Write `report.html` in `run_directory` from what is there, however far the run has come; the file's path.

    Raises:
        UserError: the file cannot be written.
    """
    path = run_directory / REPORT_FILE
    write_atomically(path, render(read_run(run_directory)))
    return path


def render(run: RunRecord) -> str:
    """The page as text."""
    body = [
        _header(run),
        _warnings(run.warnings),
        _scores(run),
        _figures(run),
        _charts(run),
        _samples(run.samples),
        _bad_records(run.summary),
        details('Configuration', f'<pre>{escape(run.config)}</pre>' if run.config else ''),
        details('Environment', table(_flat(run.environment))),
    ]
    return document(run.name, body)


def _header(run: RunRecord) -> str:
    step, total = run.last_step, run.total_steps
    if total is None:
        status = f'<span class="status">step {step:,}</span>'
    elif step >= total:
        status = f'<span class="status complete">complete, {total:,} steps</span>'
    else:
        status = f'<span class="status">step {step:,} of {total:,}</span>'
    return f'<header><h1>{escape(run.name)}</h1>{status}</header>'


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return ''
    items = ''.join(f'<li>{escape(text)}</li>' for text in warnings)
    return f'<section class="warnings"><b>{_plural(len(warnings), "warning")}</b><ul>{items}</ul></section>'


def _scores(run: RunRecord) -> str:
    """One card for each evaluation set: the last score, and bars that set it against the baselines."""
    cards = [_score(run, name) for name in run.evaluations]
    baselines = run.summary.get('baselines')
    waiting = [name for name in baselines if name not in run.evaluations] if isinstance(baselines, dict) else []
    cards += [_score_card(name, '', _bars(None, run.baselines(name))) for name in waiting]
    return f'<section class="grid scores">{"".join(cards)}</section>' if cards else ''


def _score(run: RunRecord, name: str) -> str:
    points = {metric: run.evaluation_series(name, metric) for metric in ('bits_per_byte', 'loss', 'perplexity')}
    last = {metric: series[-1][1] for metric, series in points.items() if series}
    words = [f'step {run.evaluations[name][-1]["step"]:,}']
    if 'loss' in last:
        words.append(f'loss {last["loss"]:.4f} nats per token')
    if 'perplexity' in last:
        words.append(f'perplexity {short_number(last["perplexity"])}')
    own, figure = last.get('bits_per_byte'), 'no finite score'
    if own is not None:
        figure = f'{own:.4f} <small>bits per byte</small>'
    elif 'loss' in last:
        figure = f'{last["loss"]:.4f} <small>nats per token</small>'
    note = f'<small>{", ".join(words)}</small>'
    return _score_card(name, f'<b class="figure">{figure}</b>{note}', _bars(own, run.baselines(name)))


def _score_card(name: str, figure: str, bars: str) -> str:
    return f'<div class="card"><small>Held out: {escape(name)}</small>{figure}{bars}</div>'


def _bars(own: float | None, baselines: dict[str, float]) -> str:
    """Bars of bits per byte, shorter is better."""
    if not baselines:
        return ''
    rows = [] if own is None else [('this model', own, ' class="own"', '')]
    for name, value in sorted(baselines.items(), key=lambda item: -item[1]):
        gap = ''
        if own:
            gap = f' <span class="soft">{abs(100 * (value / own - 1)):.1f}% {"more" if value > own else "less"}</span>'
        rows.append((_BASELINE_NAMES.get(name, (name, name))[0], value, '', gap))
    longest = max(value for _, value, _, _ in rows) or 1.0
    cells = ''.join(
        f'<span{mark}>{escape(name)}</span><i{mark} style="width:{100 * value / longest:.1f}%"></i>'
        f'<span{mark}>{value:.3f}{gap}</span>'
        for name, value, mark, gap in rows
    )
    return f'<div class="bars">{cells}</div>'


def _figures(run: RunRecord) -> str:
    """The figures of the run, the short facts of its summary as more of them, and the long ones as a table."""
    figures = _measured_figures(run)
    facts = run.summary.get('facts')
    facts = {name: _number(value) for name, value in facts.items()} if isinstance(facts, dict) else {}
    figures += [(name, value, '') for name, value in facts.items() if len(value) <= 14]
    long_facts = table((name, value) for name, value in facts.items() if len(value) > 14)
    return cards(figures) + (f'<section class="card facts">{long_facts}</section>' if long_facts else '')


def _measured_figures(run: RunRecord) -> list[tuple[str, str, str]]:
    """(name, value, note) of what the metrics tell."""
    figures = []
    if losses := run.series('loss'):
        last = losses[-max(1, len(losses) // 50) :]
        value = statistics.fmean(loss for _, loss in last)
        note = f'mean of the last {len(last):,} logged steps' if len(last) > 1 else 'last logged step'
        figures.append(('Training loss', f'{value:.4f}', note))
    if tokens := run.tokens_per_step:
        total = run.last_step * tokens
        figures.append(('Tokens trained on', short_number(total), f'{short_number(tokens)} a step'))
    if (seconds := run.seconds) is not None:
        resumed = len(run.resumed_at)
        figures.append(('Time', short_duration(seconds), f'resumed {_plural(resumed, "time")}' if resumed else ''))
    if (rate := run.median('tokens_per_second')) is not None:
        figures.append(('Tokens per second', short_number(rate), 'median step'))
    if (share := run.median('mfu')) is not None:
        causal = run.median('mfu_causal')
        note = 'median step' if causal is None else f'median step; {100 * causal:.1f}% with causal attention only'
        figures.append(('Model FLOPs utilization', f'{100 * share:.1f}%', note))
    return figures


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f'{value:,}' if abs(value) < 1_000_000 else short_number(value)
    return short_number(value) if isinstance(value, float) else str(value)


def _charts(run: RunRecord) -> str:
    chart = functools.partial(line_chart, marks=run.resumed_at, tokens_per_step=run.tokens_per_step)
    sets = {name: colour % 5 + 1 for colour, name in enumerate(run.evaluations)}
    scores = [Line(name, run.evaluation_series(name, 'bits_per_byte'), colour) for name, colour in sets.items()]
    levels = [
        Level(_level_name(baseline, name, len(sets)), value)
        for name in sets
        for baseline, value in run.baselines(name).items()
    ]
    losses = [Line('training', run.series('loss'), 0)]
    losses += [Line(name, run.evaluation_series(name, 'loss'), colour) for name, colour in sets.items()]
    conventions = (('mfu', 'all of attention counted'), ('mfu_causal', 'causal half only'))
    utilization = [Line(words, _percent(run.series(name)), colour) for colour, (name, words) in enumerate(conventions)]
    accuracy = _percent(run.series('next_sentence_accuracy'))
    drawn = [
        chart('Bits per byte, held out', scores, levels=levels, wide=True),
        chart('Loss, nats per token', losses, wide=True),
        chart('Learning rate', [Line('learning rate', run.series('learning_rate'))], from_zero=True),
        chart('Gradient norm', [Line('before clipping', run.series('gradient_norm'))], from_zero=True),
        chart('Tokens per second', [Line('by step', run.series('tokens_per_second'))], from_zero=True),
        chart('Model FLOPs utilization, %', utilization, from_zero=True),
        *_depth_charts(run, chart),
        chart('Pairs of texts told apart, %', [Line('training', accuracy)]),
        *_routing_charts(run, chart),
    ]
    if not any(drawn):
        return '<p class="soft">No step has been logged yet.</p>'
    return f'<section class="grid charts">{"".join(drawn)}</section>'


def _depth_charts(run: RunRecord, chart: Callable[..., str]) -> list[str]:
    """Of multi-token prediction; nothing is drawn of runs without it."""
    known = {name for record in run.train[-1:] for name in record}
    ahead = sorted(name for name in known if re.fullmatch(r'loss_\d+_ahead', name))
    if not ahead:
        return []
    lines = [Line('next token', run.series('loss'), 0)]
    lines += [Line(f'{name.split("_")[1]} ahead', run.series(name), colour % 5) for colour, name in enumerate(ahead, 1)]
    return [chart('Loss by token ahead, nats per token', lines)]


def _routing_charts(run: RunRecord, chart: Callable[..., str]) -> list[str]:
    """Of layers of experts; nothing is drawn of runs without them."""
    loads = (('expert_load', 'mean over layers'), ('worst_expert_load', 'worst layer'))
    dropped = [Line('training', _percent(run.series('drop_rate')), 0)]
    entropy = [Line('training', run.series('routing_entropy'), 0)]
    for colour, name in enumerate(run.evaluations, 1):
        dropped.append(Line(name, _percent(run.evaluation_series(name, 'drop_rate')), colour % 5))
        entropy.append(Line(name, run.evaluation_series(name, 'routing_entropy'), colour % 5))
    return [
        chart(
            'Load of the busiest expert over the mean',
            [Line(words, run.series(name), colour) for colour, (name, words) in enumerate(loads)],
            from_zero=True,
        ),
        chart('Entropy of routing, nats, mean over layers', entropy, from_zero=True),
        chart('Choices dropped, %, mean over layers', dropped, from_zero=True),
    ]


def _percent(points: Points) -> Points:
    return [(step, 100 * share) for step, share in points]


def _level_name(baseline: str, evaluation_set: str, num_sets: int) -> str:
    name = _BASELINE_NAMES.get(baseline, (baseline, baseline))[1]
    return name if num_sets == 1 else f'{evaluation_set}: {name}'


def _samples(samples: list[dict[str, Any]]) -> str:
    """The last step's samples, and those of the steps before it folded up."""
    by_step: dict[int, list[str]] = {}
    for sample in samples:
        text = f'<span class="prompt">{escape(sample.get("prompt", ""))}</span>{escape(sample.get("continuation", ""))}'
        by_step.setdefault(sample['step'], []).append(f'<div class="card sample"><pre dir="auto">{text}</pre></div>')
    if not by_step:
        return ''
    last, *earlier = sorted(by_step, reverse=True)
    # Evenly spread over the run, where there are too many to show.
    shown = earlier[:: -(-len(earlier) // _SAMPLED_STEPS)] if earlier else []
    older = ''.join(details(f'Step {step:,}', ''.join(by_step[step])) for step in shown)
    key = '<p class="key"><span class="prompt">&nbsp;Shaded&nbsp;</span> is the prompt, the rest is the model\'s.</p>'
    return f'<section><h2>Samples at step {last:,}</h2>{key}{"".join(by_step[last])}{older}</section>'


def _bad_records(summary: dict[str, Any]) -> str:
    counts, examples = summary.get('bad_records'), summary.get('bad_examples')
    if not isinstance(counts, dict) or not counts:
        return ''
    reasons = table((reason, f'{number:,}' if isinstance(number, int) else number) for reason, number in counts.items())
    rows = ''
    if isinstance(examples, list):
        found = [example for example in examples if isinstance(example, dict)][:_EXAMPLES]
        rows = ''.join(
            f'<tr><th>{escape(example.get("where", ""))}</th><td>{escape(example.get("reason", ""))}</td>'
            f'<td><pre>{escape(str(example.get("record", ""))[:300])}</pre></td></tr>'
            for example in found
        )
    shown = f'<details><summary>Some of them</summary><div class="scroll"><table>{rows}</table></div></details>'
    return (
        f'<section><h2>Bad records in the data</h2><div class="card">{reasons}</div>{shown if rows else ""}</section>'
    )


def _flat(value: Any, prefix: str = '') -> list[tuple[str, Any]]:
    """Nested JSON as rows: ('devices.kind', 'cpu'), ..."""
    if isinstance(value, dict) and value:
        return [row for name, inner in value.items() for row in _flat(inner, f'{prefix}.{name}' if prefix else name)]
    if isinstance(value, list):
        return [(prefix, ', '.join(map(str, value)))]
    return [(prefix, value)] if prefix else []


def _plural(number: int, noun: str) -> str:
    return f'{number:,} {noun}' if number == 1 else f'{number:,} {noun}s'
