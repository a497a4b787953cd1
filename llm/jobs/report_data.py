"""The report_data job: the report on prepared documents once more, or what other bounds of rules would remove."""

import dataclasses
import functools
import time
from pathlib import Path

import numpy as np

from llm.configuration import Invocation
from llm.data.documents.bounds import Bounds
from llm.data.documents.reporting.config import DataReport
from llm.data.documents.reporting.counting import MEASURES
from llm.data.documents.reporting.ledger import Ledger
from llm.data.documents.reporting.what_if import WhatIf, what_if
from llm.errors import UserError
from llm.evaluation.reports.prepared_data import PAGE_FILE, printed_rules, write_data_report
from llm.parallel.processes import require_one


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Writes report.html and report.json of a directory that prepare_data wrote; or, with other bounds, says what
    these would remove, from the ledger and without a new run.

    Args:
        directory: the output_directory of prepare_data.
        bounds: (rule, least, most) in place of the rule's own, None for no bound; of these the outcome is printed, and
            no report is written.
        encoder: run directory of a model of one's own, as `Embed` takes it, whose vectors clusters are sought in; None
            takes TF-IDF.
        report: how large the report is.
    """

    directory: str
    bounds: tuple[tuple[str, float | None, float | None], ...] = ()
    encoder: str | None = None
    report: DataReport = DataReport()

    def __post_init__(self) -> None:
        rules = [rule for rule, _, _ in self.bounds]
        for rule, least, most in self.bounds:
            if rules.count(rule) > 1 or (least is not None and most is not None and least > most):
                raise UserError(
                    f'{rule!r} is given twice, or no figure is from {least} to {most}', where='ReportData.bounds'
                )

    def __call__(self, invocation: Invocation) -> None:
        """Write the report, or print what other bounds would remove."""
        directory = Path(self.directory)
        ledger = Ledger(directory)
        changes = tuple(Bounds(*bound) for bound in self.bounds)
        if invocation.dry_run:
            what = f'say what other bounds of {len(changes)} rules remove' if changes else f'write {PAGE_FILE}'
            print(f'would {what}, from {len(ledger.shards):,} files of {directory / "ledger"}')
            return
        require_one('report_data')
        self.report.check()
        started = time.perf_counter()
        if changes:
            print(_compared(what_if(ledger, changes), tokens=ledger.has_tokens))
            return
        embed = None
        if self.encoder is not None:
            from llm.jobs.embed import embed_with  # imports JAX, which takes seconds

            embed = functools.partial(embed_with, self.encoder)
        report = write_data_report(directory, self.report, embed)
        print(f'{printed_rules(report)}{directory / PAGE_FILE}: done in {time.perf_counter() - started:.1f} s')


def _compared(found: WhatIf, *, tokens: bool) -> str:
    """The outcome now and then, as a table for the terminal."""
    unit = 2 if tokens else 1
    heads = ['stay now', 'then', 'returning', 'going', f'{MEASURES[unit]} now', 'then']
    lines = [f'{"source":24}' + ''.join(f'{head:>18}' for head in heads)]
    rows = [*found.sources.items(), ('all', np.sum(list(found.sources.values()), axis=0))]
    for name, counts in rows if len(rows) > 2 else rows[-1:]:
        figures = [*counts[:, 0], *counts[:2, unit]]
        lines.append(f'{name:24}' + ''.join(f'{figure:>18,.0f}' for figure in figures))
    changed = {rule: counts for rule, counts in found.rules.items() if counts[0, 0] != counts[1, 0]}
    lines += [f'removed first by {rule}: {now[0]:,.0f}, then {then[0]:,.0f}' for rule, (now, then) in changed.items()]
    return '\n'.join(lines)
