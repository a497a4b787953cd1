"""The head of the page: totals, what stands out, and how many documents are left after each step."""

import itertools
from typing import Any

from llm.evaluation.reports.document import cards
from llm.evaluation.reports.escaping import escape
from llm.evaluation.reports.prepared_data.tables import Json, number, percent, section, select, words
from llm.training.short_numbers import short_number

_SOURCES = 8


def totals(report: Json) -> str:
    """Large figures."""
    total = report['totals']
    read, stays, sources = total['read'], total['stays'], len(report['groups']['source'])
    figures = [
        ('Documents read', f'{read:,}', f'{sources} source{"s" if sources != 1 else ""}'),
        ('Documents that stay', f'{stays["documents"]:,}', percent(stays['documents'], read)),
        (
            'Characters that stay',
            short_number(total['final_characters']),
            percent(total['final_characters'], total['judged']['characters']),
        ),
    ]
    if report['has_tokens']:
        of = percent(stays['tokens'], total['judged']['tokens'])
        if total['final_characters'] < stays['characters']:
            of += ', counted before passages were cut'
        figures.append(('Tokens that stay', short_number(stays['tokens']), of))
    else:
        figures.append(('Tokens', 'not counted', 'the stage tokens.TokenCount counts them'))
    for name, over_all in (('Removed by stages', False), ('Removed over all shards', True)):
        if over_all and not report['final']:
            figures.append((name, 'not looked at', 'no deduplication, no decontamination'))
            continue
        count = sum(rule['first']['documents'] for rule in report['rules'] if rule['over_all_shards'] == over_all)
        figures.append((name, f'{count:,}', percent(count, read)))
    figures.append(('Quarantined', f'{total["quarantined"]:,}', percent(total['quarantined'], read)))
    return cards(figures)


def stands_out(report: Json) -> str:
    """What to look at first, in sentences."""
    read = report['totals']['read']
    found = []
    files, of = report['files']
    if files < of:
        found.append(
            f'All of this is of {files:,} of {of:,} files, chosen by a hash in each source; summary.json is of all.'
        )
    if not report['totals']['stays']['documents']:
        found.append('No document stays.')
    for row in report['groups']['source']:
        judged, stays = row['judged']['documents'], row['stays']['documents']
        if judged >= 10 and stays < 0.2 * judged:
            rule, counts = next(iter(row['removed'].items()))
            found.append(
                f'Of source {row["name"]} {percent(stays, judged)} stays ({stays:,} of {judged:,}); most went by '
                f'{rule} ({percent(counts["documents"], judged)}).'
            )
    unit = 'tokens' if report['has_tokens'] else 'characters'
    judged = report['totals']['judged'][unit]
    for rule in report['rules']:
        documents, text = rule['first']['documents'], rule['first'][unit]
        if documents > 0.2 * read or text > 0.2 * judged:
            shares = f'{percent(documents, read)} of the documents with {percent(text, judged)} of the {unit}'
            found.append(f'{rule["rule"]} removes {shares}.')
    own = [rule for rule in report['rules'] if not rule['over_all_shards']]
    never = [rule['rule'] for rule in own if rule['at_all']['documents'] and not rule['only']['documents']]
    if never:
        found.append(
            f'{len(never)} rules remove nothing that no other rule removes; without any one of them the same documents '
            f'would stay: {", ".join(never)}.'
        )
    if report['totals']['quarantined'] > 0.01 * read:
        found.append(f'{percent(report["totals"]["quarantined"], read)} of the documents could not be judged.')
    if not found:
        return ''
    items = ''.join(f'<li>{escape(text)}</li>' for text in found)
    return f'<section class="warnings" id="look"><b>Look at these first</b><ul>{items}</ul></section>'


def steps(report: Json) -> list[tuple[str, list[str]]]:
    """(name, rules) of each step: rules of one set in a row are one."""
    named = ((rule['rule'].partition('/')[0], rule['rule']) for rule in report['rules'])
    return [(name, [rule for _, rule in some]) for name, some in itertools.groupby(named, key=lambda pair: pair[0])]


def left_after(report: Json) -> list[tuple[str, dict[str, Json]]]:
    """(step, what is left after it: 'all' and by source, each in measures), from all that was judged."""
    sources = report['groups']['source']
    left = {row['name']: dict(row['judged']) for row in sources}
    result: list[tuple[str, dict[str, Json]]] = [('judged', _with_all(left))]
    for name, rules in steps(report):
        for row in sources:
            for rule in rules:
                for measure, count in row['removed'].get(rule, {}).items():
                    left[row['name']][measure] -= count
        result.append((name, _with_all(left)))
    return result


def _with_all(left: dict[str, Json]) -> dict[str, Json]:
    every: Json = {}
    for counts in left.values():
        for measure, count in counts.items():
            every[measure] = every.get(measure, 0) + count
    return {'': every, **{name: dict(counts) for name, counts in left.items()}}


def funnel(report: Json) -> str:
    """A table of what is left after each step, for all and for each of the large sources."""
    after = left_after(report)
    begin = after[0][1]
    measures = list(begin[''])
    sources = [row['name'] for row in report['groups']['source'][:_SOURCES]] if len(begin) > 2 else []
    quarantined = report['totals']['quarantined']
    rows = [_read_row(report, measures, len(sources))] if quarantined else []
    before = begin
    over_all = {rule['rule'].partition('/')[0] for rule in report['rules'] if rule['over_all_shards']}
    for name, left in after:
        title = 'judged by the stages' if name == 'judged' else f'after {name}'
        if name in over_all:
            title += ', over all shards'
        cells = [words(title), f'<td class="meter">{_each(measures, left[""], begin[""], _bar)}</td>']
        cells += [f'<td>{_each(measures, left[""], begin[""], _count)}</td>']
        cells += [f'<td>{_each(measures, left[""], begin[""], _share)}</td>']
        cells += [f'<td>{_each(measures, _less(before[""], left[""]), begin[""], _count)}</td>']
        cells += [f'<td>{_each(measures, left[source], begin[source], _share)}</td>' for source in sources]
        last = ' class="final"' if name == after[-1][0] else ''
        rows.append(f'<tr{last}>{"".join(cells)}</tr>')
        before = left
    heads = ['step', '', 'left', 'share', 'removed here', *sources]
    head = ''.join(
        f'<th{" class=words" if i < 2 else ""} scope="col">{escape(name)}</th>' for i, name in enumerate(heads)
    )
    table = (
        f'<div class="scroll"><table class="data" id="funnel-table" data-measure="documents"><thead><tr>{head}</tr>'
        f'</thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    control = select('Count', 'data-measure-of="funnel-table"', [(name, name) for name in measures])
    cut = report['totals']['stays']['characters'] - report['totals']['final_characters']
    also = f' Of the documents that stay, {cut:,} characters were cut out as repeated or contaminated.' if cut else ''
    more = len(begin) - 1 - _SOURCES
    note = (
        'What is left after each step, in their order; a document counts where the first rule removes it.'
        f'{also}{f" Columns are the {_SOURCES} largest of {more + _SOURCES} sources." if more > 0 else ""}'
    )
    return section(
        'funnel', 'From read to kept', note, f'<div class="block"><p class="controls">{control}</p>{table}</div>'
    )


def _read_row(report: Json, measures: list[str], sources: int) -> str:
    """The documents that were read, of which not all could be judged."""
    cells = words('read') + '<td></td>' + number(report['totals']['read']) + '<td></td>' * (2 + sources)
    return f'<tr>{cells}</tr>'


def _less(before: Json, after: Json) -> Json:
    return {measure: before[measure] - after[measure] for measure in before}


def _each(measures: list[str], counts: Json, whole: Json, show: Any) -> str:
    return ''.join(
        f'<span class="m {measure}">{show(counts[measure], whole[measure], measure)}</span>' for measure in measures
    )


def _bar(count: float, whole: float, measure: str) -> str:
    return f'<span class="share wide-share"><i style="width:{100 * count / whole if whole else 0:.2f}%"></i></span>'


def _count(count: float, whole: float, measure: str) -> str:
    return f'{count:,}' if measure == 'documents' or count < 100_000 else short_number(count)


def _share(count: float, whole: float, measure: str) -> str:
    return percent(count, whole) if whole else '–'
