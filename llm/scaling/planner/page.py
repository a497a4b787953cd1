"""A plan as one self-contained HTML page."""

import json
from collections.abc import Sequence

from llm.evaluation.reports.document import bars, cards, details, document, grid
from llm.evaluation.reports.escaping import escape
from llm.scaling.planner.quantities import byte_size, duration, microbatches
from llm.scaling.planner.records import Record
from llm.scaling.planner.text import mesh_words
from llm.training.short_numbers import short_number

_MOST_BARS = 24
# Parts of the analytic model, in words.
_PARTS = {
    'parameters': 'parameters',
    'optimizer': 'optimizer state',
    'batch': 'batch',
    'remembered': 'rows before, as layers remember them',
    'gradients': 'gradients',
    'weights': 'weights in the compute type, gathered',
    'activations': 'activations kept for the backward pass',
    'layer': 'the layer at work',
    'logits': 'logits',
    'code': 'the program',
}


def render(record: Record, candidates: Sequence[Record]) -> str:
    """The page as text."""
    run, topology = record['run'], record['topology']
    title = f'{short_number(run["parameters"])} parameters on {topology["name"]}'
    return document(
        title,
        [
            _header(title, record),
            _advice(record),
            cards(_figures(record)),
            _section('Memory of a device', _memory(record)),
            _section('Time of a step at published rates', _time(record)),
            _section('Collectives of a step on a device', _collectives(record)),
            _section('What was tried', _search(candidates)),
            details('Everything as JSON', f'<pre>{escape(json.dumps(record, indent=1))}</pre>'),
        ],
    )


def _section(title: str, content: str) -> str:
    return f'<section><h2>{escape(title)}</h2>{content}</section>' if content else ''


def _header(title: str, record: Record) -> str:
    fits = record['memory']['fits']
    words = 'fits' if fits else f'{byte_size(record["memory"]["over"])} too much'
    mark = ' complete' if fits else ''
    return (
        f'<header><h1>{escape(title)}</h1><span class="status{mark}">{escape(words)}</span>'
        f'<span class="soft">{escape(mesh_words(record))}, {microbatches(record["run"]["microbatches"])}, '
        f'remat {escape(record["run"]["remat"])}</span></header>'
    )


def _advice(record: Record) -> str:
    if record['memory']['fits']:
        return ''
    advice = record.get('advice')
    text = 'No single change or pair of changes makes it fit: use more devices.'
    if advice:
        text = f'Cheapest change that should make it fit: {advice["change"]} ({byte_size(advice["needed"])}).'
    return f'<section class="warnings"><b>It does not fit.</b> {escape(text)}</section>'


def _figures(record: Record) -> list[tuple[str, str, str]]:
    roof, memory, run = record['roofline'], record['memory'], record['run']
    share = 100 * memory['needed'] / memory['available']
    figures = [
        ('Memory of a device', byte_size(memory['needed']), f'{share:.0f}% of {byte_size(memory["available"])}'),
        ('Step, at the least', duration(roof['step']), f'bound by {roof["bottleneck"]}'),
        (
            'Model FLOPs utilization',
            f'{100 * roof["mfu"]:.1f}%',
            f'at most; {100 * roof["mfu_causal"]:.1f}% with causal attention only',
        ),
        ('Tokens per second', short_number(roof['tokens_per_second']), 'at most'),
        ('Tokens a device', f'{run["tokens_per_device"]:,.0f}', f'{short_number(run["tokens_per_step"])} a step'),
    ]
    compiler = record.get('compiler', {})
    if 'seconds' in compiler:
        figures.append(('Compiled in', f'{compiler["seconds"]:.0f} s', ''))
    if 'weights' in compiler:
        figures.append(('Weight bytes moved', f'{compiler["weights"]["ratio"]:.2f}', 'times the least possible'))
    return figures


def _memory(record: Record) -> str:
    memory = record['memory']
    parts = [(words, memory['estimate'][name], byte_size(memory['estimate'][name])) for name, words in _PARTS.items()]
    parts = [part for part in parts if part[1] or part[0] != _PARTS['remembered']]
    pieces = []
    if 'memory' in record.get('compiler', {}):
        kinds = record['compiler']['memory']
        rows = [(name, float(kinds[name]), byte_size(kinds[name])) for name in ('arguments', 'temporaries', 'code')]
        fresh = kinds['outputs'] - kinds['aliased']
        rows.append(('outputs not in place of arguments', float(fresh), byte_size(fresh)))
        rows.append(('total', float(kinds['total']), byte_size(kinds['total'])))
        rows.append(('available', memory['available'], byte_size(memory['available'])))
        if kinds['host']:
            rows.append(('on the host, beside it', float(kinds['host']), byte_size(kinds['host'])))
        pieces.append(f'<div class="card"><small>By kind, from the compiler</small>{bars(rows, own="total")}</div>')
    peak = memory['estimate']['peak']
    parts += [
        ('at the peak', peak, byte_size(peak)),
        ('available', memory['available'], byte_size(memory['available'])),
    ]
    if host := memory['estimate']['host']:
        parts.append(('on the host, beside it', host, byte_size(host)))
    note = 'By what it is, from the analytic model; not all of it is there at once'
    pieces.append(f'<div class="card"><small>{note}</small>{bars(parts, own="at the peak")}</div>')
    return f'<div class="grid charts">{"".join(pieces)}</div>'


def _time(record: Record) -> str:
    roof = record['roofline']
    rows = [
        ('compute', roof['compute']),
        (f'HBM, {byte_size(roof["hbm_bytes"])}', roof['hbm']),
        (f'to and from the host, {byte_size(roof["host_bytes"])}', roof['host']),
        ('links, beside other work', roof['asynchronous_links']),
        ('links, that other work waits for', roof['synchronous_links']),
        ('bubble of the pipeline', roof['bubble']),
        ('step', roof['step']),
    ]
    drawn = [(name, value, duration(value)) for name, value in rows if value or name == 'step']
    source = escape(record['topology']['source'])
    return f'<div class="card">{bars(drawn, own="step")}</div><p class="soft">Rates: {source}</p>'


def _collectives(record: Record) -> str:
    found = record['collectives']
    if not found:
        return ''
    names = [f'{each["kind"]}, {"*".join(each["axes"]) or "network"}' for each in found]
    drawn = [(name, each['link_bytes'], byte_size(each['link_bytes'])) for name, each in zip(names, found, strict=True)]
    rows = [
        (
            each['kind'],
            '*'.join(each['axes']) or '-',
            'network' if each['across_slices'] else 'links',
            f'{each["executions"]:,}',
            byte_size(each['payload']),
            byte_size(each['link_bytes']),
            byte_size(each['asynchronous_link_bytes']),
            duration(each['seconds']),
        )
        for each in found
    ]
    header = ('kind', 'mesh axes', 'over', 'times', 'payload', 'sent', 'beside other work', 'time')
    chart = f'<div class="card"><small>Bytes that a device sends</small>{bars(drawn)}</div>'
    return chart + details('As a table', grid(header, rows))


def _search(candidates: Sequence[Record]) -> str:
    if not candidates:
        return ''
    timed = [each for each in candidates if 'step' in each][:_MOST_BARS]
    drawn = [(each['run'], each['step'], duration(each['step'])) for each in timed]
    rows = [
        (
            each['run'],
            byte_size(each['needed']) if 'needed' in each else '-',
            duration(each['step']) if 'step' in each else '-',
            f'{100 * each["mfu_causal"]:.1f}%' if 'mfu_causal' in each else '-',
            'compiler' if each['compiled'] else 'analytic model',
            each['reason'] or 'the best that was found',
        )
        for each in candidates
    ]
    best = candidates[0]['run'] if not candidates[0]['reason'] else ''
    chart = f'<div class="card"><small>Predicted step, best first</small>{bars(drawn, own=best)}</div>'
    header = ('run', 'memory', 'step', 'MFU, causal', 'figures from', 'why not')
    return chart + details('Ranked, with reasons', grid(header, rows))
