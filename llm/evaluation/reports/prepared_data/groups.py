"""Tables by source, language, domain, URL, licence and year; documents to look at; what could not be judged."""

from collections.abc import Iterable

from llm.evaluation.reports.document import details
from llm.evaluation.reports.escaping import escape
from llm.evaluation.reports.prepared_data.tables import (
    Json,
    data_table,
    number,
    reasons,
    sample,
    section,
    select,
    stays_cell,
    words,
)

_TITLES = {
    'source': ('Sources', ''),
    'language': ('Languages', ''),
    'domain': ('Domains', ''),
    'url': ('URLs', 'Those that come most often; of equally frequent ones the longest.'),
    'licence': ('Licences', ''),
    'year': ('Dates', 'Years that documents were fetched or published in, as far as their source says.'),
}
_REASON_DOCUMENTS = 20


def group_tables(report: Json) -> str:
    """One table for each kind of name; kinds that no document has are left out."""
    parts = []
    for kind, (title, note) in _TITLES.items():
        rows = report['groups'][kind]
        if not rows or (len(rows) == 1 and rows[0]['name'] == 'unknown'):
            continue
        if kind == 'year':
            rows = sorted(rows, key=lambda row: row['name'])
        total = report['names'][kind]
        about = f'{len(rows)} of {total:,}' if total > len(rows) else f'{total}'
        if kind in report['forgotten']:
            about = f'{len(rows)} of very many; rare ones were not counted to the end'
        table = _table(report, title, rows)
        heading = f'<h3>{title} ({about})</h3>'
        text = f'<p class="note">{escape(note)}</p>' if note else ''
        if kind in ('source', 'language', 'domain'):
            parts.append(f'<div class="block" id="{kind}s">{heading}{text}{table}</div>')
        else:
            parts.append(f'<div id="{kind}s">{details(f"{title} ({about})", text + table)}</div>')
    note = 'Shares that stay at the end, of documents and of text, and the rules that removed most of each.'
    return section('groups', 'Where documents are from', note, ''.join(parts))


def _table(report: Json, title: str, rows: list[Json]) -> str:
    unit = 'tokens' if report['has_tokens'] else 'characters'
    heads = [title.lower(), 'documents', 'stay', 'of documents', unit, f'of {unit}', 'removed most by']
    cells = []
    for row in rows:
        judged, stays = row['judged'], row['stays']
        why = reasons({rule: count['documents'] for rule, count in row['removed'].items()}, judged['documents'])
        cells.append(
            words(row['name'])
            + number(judged['documents'])
            + number(stays['documents'])
            + stays_cell(stays['documents'], judged['documents'])
            + number(judged[unit], exact=False)
            + stays_cell(stays[unit], judged[unit])
            + words(why)
        )
    return data_table(heads, cells, left=(0, len(heads) - 1))


def samples(report: Json) -> str:
    """Documents of each source and of frequent domains, kept and removed, to be filtered."""
    found: dict[str, Json] = {}
    for kind in ('sources', 'domains'):
        for groups in report['samples'][kind].values():
            for documents in groups.values():
                found |= {f'{document["source"]}\0{document["id"]}': document for document in documents}
    documents = list(found.values())
    if not documents:
        return ''
    controls = []
    for name, title in (('source', 'Source'), ('outcome', 'Outcome'), ('language', 'Language'), ('domain', 'Domain')):
        key = {'outcome': 'removed_by'}.get(name, name)
        values = sorted({document[key] or ('stays' if name == 'outcome' else '') for document in documents} - {''})
        if len(values) > 1:
            controls.append(
                select(title, f'data-filter="{name}"', [('', 'any'), *((value, value) for value in values)])
            )
    controls.append('<label>Text <input type="search" data-filter="text" aria-label="Text"></label>')
    controls.append('<span id="shown-samples" class="soft"></span>')
    note = (
        'By a hash of their ids, so at random: of each source, and of each of the domains above, some that stay and '
        'some that do not. The beginning of each text as it was after the stages.'
    )
    items = ''.join(sample(document) for document in documents)
    return section(
        'samples',
        'Documents',
        note,
        f'<div class="block"><p class="controls">{"".join(controls)}</p><div class="browser">{items}</div></div>',
    )


def _lists(groups: Iterable[tuple[str, list[str]]]) -> str:
    """Lists of HTML, each under its heading, a text."""
    return ''.join(
        f'<h3>{escape(heading)}</h3><ul>' + ''.join(f'<li>{item}</li>' for item in items) + '</ul>'
        for heading, items in groups
    )


def quarantine(report: Json) -> str:
    """Reasons, with where it happened."""
    rows = report['quarantined']
    ignored = report['totals']['ignored']
    content = ''
    if rows:
        cells = [words(row['stage']) + words(row['reason']) + number(row['count']) for row in rows]
        shown = _lists(
            (
                row['reason'],
                [
                    f'<code>{escape(item["where"])}</code> {escape(item["id"])} {escape(item["reason"])}'
                    for item in row['samples']
                ],
            )
            for row in rows[:_REASON_DOCUMENTS]
        )
        table = data_table(['stage', 'reason', 'documents'], cells, left=(0, 1))
        content += f'<div class="block">{table}</div>{details("Where", shown)}'
    if ignored:
        table = data_table(
            ['no documents by their nature', 'records'], [words(k) + number(v) for k, v in ignored.items()]
        )
        content += f'<div class="block">{table}</div>'
    note = (
        'Records that could not be read, or on which a stage failed. Numbers and quoted parts of reasons are left out.'
    )
    return section('quarantine', 'Quarantined', note, content)


def contamination(report: Json) -> str:
    """Hits by evaluation set."""
    found = report['contamination']
    if found is None:
        return ''
    cells = [words(row['set']) + words(row['rule']) + number(row['hits']) for row in found['sets']]
    shown = _lists(
        (
            f'{row["set"]}, {row["rule"]}',
            [f'{escape(hit["item"])} in {escape(hit["id"])}: <q>{escape(hit["text"])}</q>' for hit in row['samples']],
        )
        for row in found['sets']
    )
    table = data_table(['evaluation set', 'rule', 'hits'], cells, left=(0, 1))
    content = f'<div class="block">{table}</div>{details("What was found", shown)}' if cells else ''
    nothing = '<p>Nothing of the evaluation sets was found.</p>'
    note = 'What documents and evaluation sets have in common, before it was removed.'
    return section('contamination', 'Evaluation sets', note, content or nothing)
