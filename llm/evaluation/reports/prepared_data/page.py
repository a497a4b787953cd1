"""`report.html` and `report.json` of a directory of prepared documents."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.reporting.config import DataReport
from llm.data.documents.reporting.report import collect
from llm.evaluation.reports.document import document
from llm.evaluation.reports.escaping import escape
from llm.evaluation.reports.prepared_data import style
from llm.evaluation.reports.prepared_data.analyses import clusters, duplicates, tokenizer
from llm.evaluation.reports.prepared_data.funnel import funnel, stands_out, totals
from llm.evaluation.reports.prepared_data.groups import contamination, group_tables, quarantine, samples
from llm.evaluation.reports.prepared_data.rules import bounds_in_words, rule_figures, rules_table
from llm.training.run_directory import write_atomically

REPORT_FILE, PAGE_FILE = 'report.json', 'report.html'
_SECTIONS = {
    'funnel': 'From read to kept',
    'rules': 'Rules',
    'figures': 'Figures and bounds',
    'groups': 'Sources',
    'duplicates': 'Duplicates',
    'contamination': 'Evaluation sets',
    'samples': 'Documents',
    'clusters': 'Clusters',
    'tokens': 'Tokens',
    'quarantine': 'Quarantined',
}


def write_data_report(
    directory: Path, config: DataReport, embed: Callable[[Sequence[str]], np.ndarray] | None = None
) -> dict[str, Any]:
    """Write both files into the directory; returns what report.json holds.

    Args:
        embed: texts -> vectors [texts, D], for clusters; None takes TF-IDF.

    Raises:
        UserError: the directory holds no finished run, cannot be read, or cannot be written.
    """
    report = collect(directory, config, embed)
    write_atomically(directory / PAGE_FILE, render(report))
    write_atomically(directory / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=True) + '\n')
    return report


def render(report: dict[str, Any]) -> str:
    """The page as text, from what report.json holds: what is most important first."""
    name = Path(report['directory']).name
    parts = [
        funnel(report),
        rules_table(report),
        rule_figures(report),
        group_tables(report),
        duplicates(report),
        contamination(report),
        samples(report),
        clusters(report),
        tokenizer(report),
        quarantine(report),
    ]
    there = [key for key, part in zip(_SECTIONS, parts, strict=True) if part]
    links = ''.join(f'<a href="#{key}">{escape(_SECTIONS[key])}</a>' for key in there)
    head = f'<header><h1>{escape(name)}</h1><span class="soft">documents, and why the others went</span></header>'
    body = [head, f'<nav>{links}</nav>', totals(report), stands_out(report), *parts]
    return document(name, body, style=style.STYLE, script=style.SCRIPT)


def printed_rules(report: dict[str, Any]) -> str:
    """What each rule removed, as lines of a table for the terminal; empty where none removed anything."""
    unit = 'tokens' if report['has_tokens'] else 'characters'
    lines = [f'{"rule":40}{"first":>12}{"at all":>12}{"only":>12}{f"{unit}, only":>18}  stays if']
    for rule in report['rules']:
        if rule['at_all']['documents']:
            figures = ''.join(f'{rule[which]["documents"]:>12,}' for which in ('first', 'at_all', 'only'))
            bounds = bounds_in_words(rule.get('bounds', []))
            lines.append(f'{rule["rule"]:40}{figures}{rule["only"][unit]:>18,}  {bounds}'.rstrip())
    return '\n'.join([*lines, '']) if len(lines) > 1 else ''
