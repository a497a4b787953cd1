"""A plan as text for a terminal."""

from collections.abc import Sequence

from llm.scaling.planner.quantities import byte_size, duration, microbatches
from llm.scaling.planner.records import Record
from llm.training.short_numbers import short_number

_MOST_CANDIDATES = 40


def table(rows: Sequence[Sequence[str]], *, indent: str = '  ') -> str:
    """Columns of text; the first is left-aligned, and so is the last if it is prose."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        if len(row) > 2 and ' ' in row[-1]:
            cells[-1] = row[-1]
        lines.append(indent + '  '.join(cells).rstrip())
    return '\n'.join(lines)


def format_plan(record: Record) -> str:
    """The whole plan."""
    parts = [_headline(record), _memory(record), _work(record), _time(record), _collectives(record)]
    return '\n\n'.join(part for part in parts if part) + '\n'


def mesh_words(record: Record) -> str:
    """'fsdp=16 tensor=2'."""
    sizes = record['run']['mesh']
    return ' '.join(f'{axis}={size}' for axis, size in sizes.items() if size > 1) or 'one device'


def _headline(record: Record) -> str:
    run, topology, memory = record['run'], record['topology'], record['memory']
    verdict = (
        f'fits: {byte_size(memory["needed"])} of {byte_size(memory["available"])} a device'
        if memory['fits']
        else f'DOES NOT FIT: needs {byte_size(memory["needed"])} of {byte_size(memory["available"])} a device, '
        f'{byte_size(memory["over"])} too much'
    )
    lines = [
        f'{short_number(run["parameters"])} parameters on {topology["name"]} ({topology["chips"]} chips, '
        f'{topology["devices"]} devices): {mesh_words(record)}',
        f'{run["batch_size"]} rows of {run["sequence_length"]} tokens a step in {microbatches(run["microbatches"])}, '
        f'{run["tokens_per_device"]:,.0f} tokens a device, remat {run["remat"]}',
        verdict,
    ]
    if 'advice' in record:
        advice = record['advice']
        change = f'{100 * advice["slower"]:.0f}% slower' if advice['slower'] >= 0 else 'no slower'
        lines.append(
            f'cheapest change that should make it fit: {advice["change"]} '
            f'({byte_size(advice["needed"])} by the analytic model, {change} for the same tokens)'
        )
    elif not memory['fits']:
        lines.append('no single change or pair of changes makes it fit: use more devices')
    return '\n'.join(lines)


def _memory(record: Record) -> str:
    lines = []
    compiler = record.get('compiler', {})
    if 'memory' in compiler:
        kinds = compiler['memory']
        rows = [(name, byte_size(kinds[name])) for name in ('arguments', 'outputs', 'aliased', 'temporaries', 'code')]
        rows.append(('total', byte_size(kinds['total'])))
        if kinds['host']:
            rows.append(('on the host, beside it', byte_size(kinds['host'])))
        lines += ['Memory of a device, by the compiler', table(rows), '']
    if 'refused' in compiler:
        lines += ['The compiler refuses it:', f'  {compiler["refused"]}', '']
    parts = record['memory']['estimate']
    names = (
        'parameters',
        'optimizer',
        'batch',
        'remembered',
        'gradients',
        'weights',
        'activations',
        'layer',
        'logits',
        'code',
    )
    rows = [
        *((name, byte_size(parts[name])) for name in names if parts[name] or name != 'remembered'),
        ('at the peak', byte_size(parts['peak'])),
    ]
    if parts['host']:
        rows.append(('on the host, beside it', byte_size(parts['host'])))
    lines += ['By what it is, by the analytic model (not all at once)', table(rows)]
    if 'estimate_error' in compiler:
        lines.append(f"  the model's peak is {100 * compiler['estimate_error']:+.1f}% off the compiler's")
    return '\n'.join(lines)


def _work(record: Record) -> str:
    flops, devices = record['flops'], record['topology']['devices']
    rows = [
        ('model, all of attention counted', short_number(flops['model'] / devices)),
        ('model, causal half only', short_number(flops['model_causal'] / devices)),
        ('hardware', short_number(flops['hardware'])),
        ('of these, computed again', short_number(flops['recomputed'])),
    ]
    return '\n'.join(['FLOPs of a step on a device', table(rows)])


def _time(record: Record) -> str:
    roof = record['roofline']
    rows = [
        ('compute', duration(roof['compute'])),
        (f'HBM ({byte_size(roof["hbm_bytes"])})', duration(roof['hbm'])),
        ('links, beside other work', duration(roof['asynchronous_links'])),
        ('links, that other work waits for', duration(roof['synchronous_links'])),
    ]
    if roof['host']:
        rows.append((f'to and from the host ({byte_size(roof["host_bytes"])})', duration(roof['host'])))
    if roof['bubble']:
        rows.append(('bubble of the pipeline', duration(roof['bubble'])))
    rows.append(('step, at the least', duration(roof['step'])))
    lines = ['Time of a step at published rates', table(rows)]
    lines.append(
        f'  at most {roof["tokens_per_second"]:,.0f} tokens/s, MFU {100 * roof["mfu"]:.1f}% '
        f'({100 * roof["mfu_causal"]:.1f}% with causal attention only); bound by {roof["bottleneck"]}'
    )
    if 'compiler' in record:
        lines.append(f'  compiled in {record["compiler"]["seconds"]:.0f} s')
    lines.append(f'  rates: {record["topology"]["source"]}')
    return '\n'.join(lines)


def _collectives(record: Record) -> str:
    if not record['collectives']:
        return ''
    rows = [('kind', 'axes', 'times', 'payload', 'sent', 'beside other work', 'time')]
    for each in record['collectives']:
        share = each['asynchronous_link_bytes'] / each['link_bytes'] if each['link_bytes'] else 0.0
        axes = '*'.join(each['axes']) or '-'
        rows.append(
            (
                each['kind'],
                f'{axes} (network)' if each['across_slices'] else axes,
                f'{each["executions"]:,}',
                byte_size(each['payload']),
                byte_size(each['link_bytes']),
                f'{100 * share:.0f}%',
                duration(each['seconds']),
            )
        )
    source = 'in the compiled program' if 'memory' in record.get('compiler', {}) else 'by the analytic model'
    lines = [f'Collectives of a step on a device, {source}', table(rows)]
    weights = record.get('compiler', {}).get('weights')
    if weights:
        lines.append(f'  weights and their gradients move {weights["ratio"]:.2f} times the least possible bytes')
    return '\n'.join(lines)


def format_search(candidates: Sequence[Record]) -> str:
    """The ranked table, without the runs that are impossible where the table is long."""
    rows = [('', 'memory', 'step', 'MFU', 'why not')]
    for each in candidates[:_MOST_CANDIDATES]:
        if 'step' in each:
            figures = (byte_size(each['needed']), duration(each['step']), f'{100 * each["mfu_causal"]:.1f}%')
        else:
            figures = ('-', '-', '-')
        rows.append((each['run'], *figures, each['reason'] or 'the best that was found'))
    lines = ['Tried', table(rows)]
    if len(candidates) > _MOST_CANDIDATES:
        lines.append(f'  and {len(candidates) - _MOST_CANDIDATES} more, in the JSON')
    return '\n'.join(lines) + '\n'
