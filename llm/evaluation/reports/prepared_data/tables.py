"""Pieces of the page that several sections have: tables that can be sorted, shares, documents to look at."""

from collections.abc import Iterable, Sequence
from typing import Any

from llm.evaluation.reports.escaping import escape
from llm.training.short_numbers import short_number

Json = dict[str, Any]
# Rows of a table that scrolls by itself.
_TALL = 16


def section(name: str, title: str, note: str, content: str) -> str:
    """A part of the page with its anchor; '' without content."""
    if not content:
        return ''
    return f'<section id="{name}"><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{content}</section>'


def number(value: float, *, exact: bool = True) -> str:
    """A cell of a number that sorts by its value."""
    shown = f'{value:,.0f}' if exact else short_number(value) if value else '0'
    return f'<td data-value="{value:.10g}" title="{value:,.0f}">{shown}</td>'


def decimal(value: float, digits: int = 3) -> str:
    """A cell of a number with decimals."""
    return f'<td data-value="{value:.10g}">{value:.{digits}f}</td>'


def percent(part: float, whole: float) -> str:
    """'12.3 %', with as many digits as tell that it is not nothing."""
    if not whole or not part:
        return '0 %'
    share = 100 * part / whole
    if share < 0.01:
        return '<0.01 %'
    return f'{share:.2f} %' if share < 1 else f'{share:.1f} %' if part < whole else '100 %'


def percent_cell(part: float, whole: float) -> str:
    """A cell of a share."""
    return f'<td data-value="{part / whole if whole else 0:.10g}">{percent(part, whole)}</td>'


def words(text: Any, *, link: str = '') -> str:
    """A cell of text."""
    shown = escape(text)
    return f'<td class="words">{f"<a href={chr(34)}#{link}{chr(34)}>{shown}</a>" if link else shown}</td>'


def stays_cell(stays: float, judged: float) -> str:
    """A cell with the share that stays, as a bar and in figures."""
    share = stays / judged if judged else 0.0
    return (
        f'<td class="meter" data-value="{share:.10g}"><span class="share"><i style="width:{100 * share:.1f}%"></i>'
        f'</span>{percent(stays, judged)}</td>'
    )


def data_table(
    heads: Sequence[str], rows: Iterable[str], *, name: str = '', left: Sequence[int] = (0,), whole: bool = False
) -> str:
    """A table of rows that are HTML, which scrolls sideways where it must; columns `left` are of words.

    Args:
        whole: whether it never scrolls downwards.
    """
    body = ''.join(row if row.startswith('<tr') else f'<tr>{row}</tr>' for row in rows)
    if not body:
        return ''
    head = ''.join(
        f'<th{" class=words" if i in left else ""} scope="col">{escape(text)}</th>' for i, text in enumerate(heads)
    )
    mark = f' id="{name}"' if name else ''
    table = f'<table class="data sortable"{mark}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll{" tall" if not whole and body.count("<tr") > _TALL else ""}">{table}</div>'


def sample(document: Json, *, of: str = '') -> str:
    """A document: what became of it, where it is from, how it begins."""
    rule = document['removed_by']
    outcome = '<span class="badge stays">stays</span>' if rule is None else f'<span class="badge">{escape(rule)}</span>'
    facts = [str(document['source'])]
    if document.get('language'):
        facts.append(document['language'])
    facts.append(f'{document["characters"]:,} characters')
    if 'tokens' in document:
        facts.append(f'{document["tokens"]:,} tokens')
    value = f'<span class="value">{of} {document["value"]:g}</span>' if 'value' in document else ''
    data = {
        'source': document['source'],
        'domain': document.get('domain') or '',
        'language': document.get('language') or '',
        'outcome': rule or 'stays',
    }
    attributes = ''.join(f' data-{name}="{escape(text)}"' for name, text in data.items())
    return (
        f'<article class="document"{attributes}><header>{outcome}{value}<span>{escape(", ".join(facts))}</span>'
        f'<span>{address(document.get("url")) or escape(document["id"])}</span></header>'
        f'<pre dir="auto">{escape(document["excerpt"] or "")}</pre></article>'
    )


def address(url: str | None) -> str:
    """A URL to follow, if it is one of the web; any other is text."""
    if not url:
        return ''
    shown = escape(url if len(url) <= 100 else f'{url[:99]}…')
    if not url.startswith(('http://', 'https://')):
        return shown
    return f'<a href="{escape(url)}" rel="noreferrer noopener nofollow" target="_blank">{shown}</a>'


def select(label: str, attribute: str, options: Iterable[tuple[str, str]]) -> str:
    """A choice for the script; `attribute` says of what. Options are (value, words)."""
    items = ''.join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
    return f'<label>{escape(label)} <select {attribute}>{items}</select></label>'


def reasons(removed: Json, judged: int, most: int = 3) -> str:
    """The rules that removed most, in words."""
    parts = []
    for rule, count in list(removed.items())[:most]:
        documents = count['documents'] if isinstance(count, dict) else count
        parts.append(f'{rule} {percent(documents, judged)}')
    return ', '.join(parts)
