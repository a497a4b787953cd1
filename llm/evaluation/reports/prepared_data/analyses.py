"""Duplicates side by side, how the vocabulary fits, and clusters of alike documents as a map and a table."""

from llm.evaluation.reports.document import details
from llm.evaluation.reports.escaping import escape
from llm.evaluation.reports.prepared_data.tables import (
    Json,
    address,
    data_table,
    decimal,
    number,
    percent,
    percent_cell,
    reasons,
    sample,
    section,
    stays_cell,
    words,
)

_WIDTH, _HEIGHT, _MARGIN = 1000, 600, 14


def duplicates(report: Json) -> str:
    """The largest groups."""
    parts = []
    for group in report['duplicates']:
        count = sum(group['rules'].values())
        by = ', '.join(f'{rule} {n:,}' for rule, n in group['rules'].items())
        head = f'<h3>{count:,} went for {escape(group["id"])}</h3><p class="facts-line">{escape(by)}'
        head += f' · {escape(group["source"])}' if group['source'] else ' · the one that stays is of an earlier run'
        head += f' · {address(group["url"])}</p>' if group['url'] else '</p>'
        shown = ''
        for i, member in enumerate(group['members']):
            about = f'{escape(member["source"])} · {escape(member["id"])} · {escape(member["rule"])}'
            if member['differences'] is None:
                continue
            left, right = _sides(member['differences'])
            shown += (
                f'<details{" open" if i == 0 else ""}><summary>{about}</summary><div class="beside">'
                f'<div><small class="soft">stays</small><pre dir="auto">{left}</pre></div>'
                f'<div><small class="soft">went</small><pre dir="auto">{right}</pre></div></div></details>'
            )
        parts.append(f'<div class="block">{head}{shown}</div>')
    note = (
        'The largest groups: the document that stays, beside some that went for it. Words that differ are marked, '
        'equal words far from them left out, and the first thousand words of each compared.'
    )
    return section('duplicates', 'Duplicates', note, ''.join(parts))


def _sides(differences: list[list[str]]) -> tuple[str, str]:
    left, right = [], []
    for kind, *texts in differences:
        if kind == 'changed':
            left.append(f'<del>{escape(texts[0])}</del>' if texts[0] else '')
            right.append(f'<ins>{escape(texts[1])}</ins>' if texts[1] else '')
        else:
            text = escape(texts[0])
            text = f' <span class="left-out">[{text} equal words]</span> ' if kind == 'left_out' else text
            left.append(text)
            right.append(text)
    return ''.join(left), ''.join(right)


def tokenizer(report: Json) -> str:
    """By source and language, and which tokens are used."""
    found = report['tokenizer']
    if found is None:
        return ''
    parts = []
    for kind in ('source', 'language'):
        heads = [kind, 'bytes per token', 'tokens per word', 'unknown', 'single bytes', 'parts of characters']
        rows = [
            words(name)
            + decimal(fit['bytes_per_token'])
            + decimal(fit['tokens_per_word'])
            + percent_cell(fit['unknown_share'], 1)
            + percent_cell(fit['single_byte_share'], 1)
            + percent_cell(fit['partial_share'], 1)
            + number(fit['documents'])
            + number(fit['tokens'])
            for name, fit in found[kind].items()
        ]
        parts.append(f'<div class="block">{data_table([*heads, "documents", "tokens"], rows)}</div>')
    lists = ''.join(
        f'<div><h3>{title}</h3>{data_table(["token", "id", "bytes", "uses"], map(_token, found[key]))}</div>'
        for title, key in (('Used most', 'most_used'), ('Longest that are used', 'longest'))
    )
    parts.append(details('Tokens', f'<div class="columns">{lists}</div>'))
    note = (
        f'{found["vocabulary"]}: {found["used"]:,} of {found["size"]:,} tokens came up in a sample of the documents '
        'that the stages left. Single bytes are those of characters beyond ASCII, as byte fallback gives them; tokens '
        'per word mean little in scripts without spaces.'
    )
    return section('tokens', 'Tokens', note, ''.join(parts))


def _token(token: Json) -> str:
    visible = token['text'].replace(' ', '·').replace('\n', '⏎').replace('\t', '→').replace('\r', '␍')
    return (
        f'<td class="words"><code>{escape(visible)}</code></td>'
        + number(token['id'])
        + number(token['bytes'])
        + number(token['uses'])
    )


def clusters(report: Json) -> str:
    """The map and its table."""
    found = report['clusters']
    if found is None:
        return ''
    count = len(found['clusters'])
    circles = []
    for point in found['points']:
        cluster = found['clusters'][point['cluster']]
        colour = _colour(point['cluster'], count)
        x = _MARGIN + point['x'] * (_WIDTH - 2 * _MARGIN)
        y = _MARGIN + point['y'] * (_HEIGHT - 2 * _MARGIN)
        gone = point['removed_by'] is not None
        look = f'fill="none" stroke="{colour}"' if gone else f'fill="{colour}"'
        outcome = f'removed by {point["removed_by"]}' if gone else 'stays'
        title = f'{", ".join(cluster["words"][:4])}\n{point["source"]}, {outcome}\n{point["excerpt"]}'
        circles.append(
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3.4" data-cluster="{point["cluster"]}" {look}>'
            f'<title>{escape(title)}</title></circle>'
        )
    rows = []
    for i, cluster in enumerate(found['clusters']):
        dot = f'<span class="dot" style="background:{_colour(i, count)}"></span>'
        rows.append(
            f'<tr data-cluster="{i}"><td class="words">{dot}{escape(", ".join(cluster["words"]))}</td>'
            + number(cluster['documents'])
            + stays_cell(cluster['stays'], cluster['documents'])
            + words(reasons(cluster['removed'], cluster['documents']))
            + '</tr>'
        )
    table = data_table(['words', 'documents', 'stay', 'removed most by'], rows, left=(0, 3))
    nearest = ''.join(
        f'<h3>{escape(", ".join(cluster["words"][:6]))}</h3>' + ''.join(sample(item) for item in cluster['nearest'])
        for cluster in found['clusters']
    )
    stays = sum(cluster['stays'] for cluster in found['clusters'])
    note = (
        f'{found["documents"]:,} documents, a sample by a hash, of which {percent(stays, found["documents"])} stay: '
        f'the beginnings of their texts by {found["by"]}, grouped by k-means. Of the map (t-SNE) only nearness means '
        'something; circles are documents that were removed. The pointer on a row of the table shows its documents '
        'alone.'
    )
    drawing = (
        f'<svg class="map" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Clusters">{"".join(circles)}</svg>'
    )
    content = (
        f'<div class="block">{drawing}</div><div class="block">{table}</div>{details("Typical documents", nearest)}'
    )
    return section('clusters', 'What they are about', note, content)


def _colour(cluster: int, count: int) -> str:
    """Hues far from each other for clusters that follow each other."""
    return f'hsl({(cluster * 137.5) % 360:.0f} 62% {(45, 58)[cluster % 2]}%)'
