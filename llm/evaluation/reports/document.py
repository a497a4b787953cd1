"""What the pages have in common: one self-contained HTML file, tables, bars, and things folded up."""

from collections.abc import Iterable, Sequence
from typing import Any

from llm.evaluation.reports.escaping import escape
from llm.evaluation.reports.style import SCRIPT, STYLE


def document(title: str, parts: Iterable[str], *, style: str = '', script: str = '') -> str:
    """A page of the HTML pieces that are not empty, with a style and a script beyond those of all pages."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>\n'
        + '\n'.join(part for part in parts if part)
        + f'\n</main>\n<script>{SCRIPT}{script}</script></body></html>\n'
    )


def cards(figures: Iterable[tuple[str, str, str]]) -> str:
    """Large figures side by side, each (what it is, value, note)."""
    items = ''.join(
        f'<div class="card"><small>{escape(name)}</small><b class="figure">{escape(value)}</b>'
        f'<small>{escape(note)}</small></div>'
        for name, value, note in figures
    )
    return f'<section class="grid figures">{items}</section>' if items else ''


def details(title: str, content: str) -> str:
    """`content`, which is HTML, folded up under a title."""
    return f'<details><summary>{escape(title)}</summary><div>{content}</div></details>' if content else ''


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Names and values."""
    cells = ''.join(f'<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<table>{cells}</table>' if cells else ''


def grid(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a header, which scrolls sideways where it must."""
    head = ''.join(f'<th>{escape(name)}</th>' for name in header)
    body = ''.join('<tr>' + ''.join(f'<td>{escape(cell)}</td>' for cell in row) + '</tr>' for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def bars(rows: Sequence[tuple[str, float, str]], *, own: str = '') -> str:
    """Horizontal bars of (name, length, words beside it), the longest across the page; `own` is drawn in colour."""
    longest = max((value for _, value, _ in rows), default=0.0) or 1.0
    cells = []
    for name, value, words in rows:
        mark = ' class="own"' if name == own else ''
        cells.append(
            f'<span{mark}>{escape(name)}</span><i{mark} style="width:{100 * value / longest:.1f}%"></i>'
            f'<span{mark}>{escape(words)}</span>'
        )
    return f'<div class="bars">{"".join(cells)}</div>' if cells else ''
