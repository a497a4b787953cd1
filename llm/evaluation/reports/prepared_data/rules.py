"""What each rule removed: a table, and for each rule its figures with bounds and documents on both sides of them."""

from llm.evaluation.reports.document import details
from llm.evaluation.reports.escaping import escape
from llm.evaluation.reports.prepared_data.histogram import histogram
from llm.evaluation.reports.prepared_data.tables import (
    Json,
    data_table,
    number,
    percent,
    percent_cell,
    sample,
    section,
    select,
    words,
)

_GROUPS = 12
_KINDS = (
    ('just_removed', 'Just beyond the bound: removed'),
    ('just_kept', 'Just within it: not removed by this rule'),
    ('removed', 'Removed, at random'),
)
_NOTE = (
    'First: the rule is the first to remove the document. At all: whether or not others do. Only: no other rule does, '
    'so without this rule the document would stay (and go on to the phases over all shards, which see only what the '
    'stages left).'
)


def bounds_in_words(bounds: list[list]) -> str:
    """'≥ 50, ≤ 100,000', and those of other documents."""
    parts = []
    for least, most, of in bounds:
        limits = [f'{sign} {limit:,g}' for sign, limit in (('≥', least), ('≤', most)) if limit is not None]
        if limits:
            parts.append(', '.join(limits) + (f' ({of})' if of else ''))
    return '; '.join(parts)


def rules_table(report: Json) -> str:
    """All rules that removed something, for all documents and, with the script, for those of a source or language."""
    tokens = report['has_tokens']
    choices = [('', 'all documents')]
    rows = _rows(report, '', {rule['rule']: rule for rule in report['rules']}, report['totals']['judged']['documents'])
    for kind in ('source', 'language'):
        for group in report['groups'][kind][:_GROUPS]:
            value = f'{kind} {group["name"]}'
            own = {rule['rule']: rule['by'][kind].get(group['name']) for rule in report['rules']}
            some = _rows(report, value, own, group['judged']['documents'])
            if some:
                choices.append((value, f'{value} ({group["judged"]["documents"]:,})'))
                rows += some
    heads = ['rule', 'stays if', 'first', 'share', 'at all', 'share', 'only', 'share']
    heads += ['tokens, only'] if tokens else ['characters, only']
    control = select('Of', 'data-rows-of="rules-table"', choices)
    table = data_table(heads, rows, name='rules-table', left=(0, 1), whole=True)
    content = f'<div class="block"><p class="controls">{control}</p>{table}</div>' if rows else ''
    return section('rules', 'What each rule removed', _NOTE, content)


def _rows(report: Json, group: str, own: Json, judged: int) -> list[str]:
    rows = []
    for i, rule in enumerate(report['rules']):
        counts = own.get(rule['rule'])
        if not counts or not counts['at_all']['documents']:
            continue
        cells = words(rule['rule'], link=f'rule-{i}') + words(bounds_in_words(rule.get('bounds', [])))
        for which in ('first', 'at_all', 'only'):
            cells += number(counts[which]['documents']) + percent_cell(counts[which]['documents'], judged)
        cells += number(counts['only']['tokens' if report['has_tokens'] else 'characters'], exact=False)
        rows.append(f'<tr data-group="{escape(group)}"{" hidden" if group else ""}>{cells}</tr>')
    return rows


def rule_figures(report: Json) -> str:
    """A card for each rule, those that removed most first; those that removed nothing folded up."""
    order = sorted(range(len(report['rules'])), key=lambda i: -report['rules'][i]['at_all']['documents'])
    active = [i for i in order if report['rules'][i]['at_all']['documents']]
    idle = [i for i in sorted(order) if i not in active]
    content = f'<div class="rules">{"".join(_card(report, i) for i in active)}</div>' if active else ''
    if idle:
        cards = f'<div class="rules">{"".join(_card(report, i) for i in idle)}</div>'
        content += details(f'{len(idle)} rules that removed nothing', cards)
    note = (
        'The figure that each rule judges by, of all documents: bars of what it keeps and of what it removes, with its '
        'bounds. Heights are square roots, so that few documents show; counts and the shares on both sides are under '
        'the pointer. Open the documents of a rule to see what it decides on; next to a bound, those that no other '
        'rule removes come first.'
    )
    legend = '<p class="legend"><span class="kept">kept by the rule</span><span class="gone">removed by it</span></p>'
    return section('figures', 'Why: figures, bounds and documents', note, legend + content if content else '')


def _card(report: Json, number_of: int) -> str:
    rule = report['rules'][number_of]
    name, judged = rule['rule'], report['totals']['judged']['documents']
    first, at_all, only = (rule[which]['documents'] for which in ('first', 'at_all', 'only'))
    line = f'removed <b>{at_all:,}</b> ({percent(at_all, judged)})'
    if rule['over_all_shards']:
        line += ', over all shards, of what the rules before it left'
    elif at_all:
        line += f', first <b>{first:,}</b>, only it <b>{only:,}</b>'
    bounds = bounds_in_words(rule.get('bounds', []))
    figure = histogram(rule['histogram'], name) if rule.get('histogram') else ''
    without = sum(rule['histogram']['without_figure']) if rule.get('histogram') else 0
    if bounds:
        line += f' · stays if {escape(bounds)}'
    if without:
        line += f' · {without:,} without a figure'
    columns = []
    for kind, title in _KINDS:
        documents = report['samples']['rules'].get(name, {}).get(kind, [])
        if documents:
            columns.append(
                f'<div><h3>{title}</h3>{"".join(sample(document, of="figure") for document in documents)}</div>'
            )
    shown = f'<details><summary>Documents</summary><div class="columns">{"".join(columns)}</div></details>'
    return (
        f'<article class="block" id="rule-{number_of}"><h3>{escape(name)}</h3><p class="facts-line">{line}</p>'
        f'{figure}{shown if columns else ""}</article>'
    )
