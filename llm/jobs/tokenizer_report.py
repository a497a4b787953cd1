"""The page about a trained vocabulary, complete in one file."""

from collections.abc import Sequence
from typing import Any

from llm.evaluation.reports.escaping import escape
from llm.evaluation.reports.style import STYLE

# On top of the style of all reports.
_TABLES = """
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; }
.bar { display: inline-block; height: .7em; background: var(--c0); border-radius: 2px; margin-right: 8px; }
code { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--prompt); border-radius: 4px; padding: 0 4px; }
"""


def render(report: dict[str, Any]) -> str:
    """The page as text, from what report.json holds."""
    title = f'{report["kind"]} vocabulary of {report["size"]:,} tokens'
    warnings = ''.join(f'<li>{escape(warning)}</li>' for warning in report['warnings'])
    special = ', '.join(f'<code>{escape(name)}</code> {i}' for name, i in report['special_tokens'].items())
    longest, unused = report['longest_tokens'], report['unused_tokens']
    body = [
        f'<header><h1>{escape(title)}</h1></header>',
        f'<p class="soft">Digest {escape(report["digest"])}. Special tokens: {special or "none"}.</p>',
        f'<section class="warnings"><ul>{warnings}</ul></section>' if warnings else '',
        '<h2>Fit by source</h2>',
        _source_table(report['sources']),
        '<p class="soft">A word is a run of characters without white space: tokens per word mean little in scripts '
        'that are written without spaces.</p>',
        f'<h2>The {len(longest)} longest tokens</h2>',
        _token_table(longest),
        f'<h2>{report["num_unused_tokens"]:,} unused tokens</h2>',
        '<p class="soft">In neither the sample nor the held-out text.</p>',
        _token_table(unused) if unused else '',
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><style>{STYLE}{_TABLES}</style></head>\n<body><main>\n'
        + '\n'.join(part for part in body if part)
        + '\n</main></body></html>\n'
    )


def _source_table(sources: dict[str, dict[str, Any]]) -> str:
    best = max(source['held_out_bytes_per_token'] or 0 for source in sources.values())
    rows = []
    for name, source in sources.items():
        held_out = source['held_out_bytes_per_token']
        bar = f'<span class="bar" style="width:{100 * held_out / best:.0f}px"></span>' if held_out else ''
        rows.append(
            [
                escape(name),
                'none' if held_out is None else f'{bar}{held_out:.3f}',
                f'{source["sampled_bytes_per_token"]:.3f}',
                'none' if held_out is None else f'{source["held_out_tokens_per_word"]:.3f}',
                f'{source["held_out_bytes"]:,}',
                f'{source["sampled_bytes"]:,}',
                f'{source["train"]["documents"]:,}',
            ]
        )
    heads = ['Source', 'Bytes per token, held out', 'in the sample', 'Tokens per word, held out']
    return _table([*heads, 'Bytes held out', 'Bytes sampled', 'Training documents'], rows)


def _token_table(tokens: Sequence[dict[str, Any]]) -> str:
    rows = [[_token(t['text']), str(t['id']), str(t['bytes']), f'{t["uses"]:,}'] for t in tokens]
    return _table(['Token', 'Id', 'Bytes', 'Uses'], rows)


def _token(text: str) -> str:
    """A token's text with its white space made visible."""
    visible = text.replace(' ', '·').replace('\n', '⏎').replace('\t', '→').replace('\r', '␍')
    return f'<code>{escape(visible)}</code>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = ''.join(f'<th>{escape(text)}</th>' for text in heads)
    body = ''.join(f'<tr>{"".join(f"<td>{cell}</td>" for cell in row)}</tr>' for row in rows)
    return f'<div class="card"><table><tr>{head}</tr>{body}</table></div>'
