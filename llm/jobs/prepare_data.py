"""The prepare_data job: raw sources to documents that a model can learn from, with a ledger of every decision."""

import dataclasses
import json
import time
from pathlib import Path

from llm.configuration import Invocation
from llm.data.documents.beam import Beam
from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.decontamination import Decontamination
from llm.data.documents.deduplication.pipeline import earlier_indexes, finish
from llm.data.documents.deduplication.verdicts import FinalCounts
from llm.data.documents.reporting.config import DataReport
from llm.data.documents.reporting.ledger import write_rules
from llm.data.documents.runner import Summary, run
from llm.data.documents.sources import Source
from llm.data.documents.stage import Chain, Stage
from llm.data.sources import check_names
from llm.errors import UserError
from llm.evaluation.reports.prepared_data import PAGE_FILE, printed_rules, write_data_report
from llm.parallel.processes import require_one
from llm.training.run_directory import claim, flatten_config
from llm.training.run_lock import RunLock


@dataclasses.dataclass(frozen=True)
class PrepareData:
    """Read documents, send them through stages, and write those that stay.

    Given again after it was stopped, it goes on where it was: shards (a file of a source each) appear whole or not at
    all, and are not done twice.

    Args:
        output_directory: gets documents/ (Parquet, for `TextFiles`), ledger/ (Parquet: every document with the first
            rule that removed it and the verdicts of all), quarantine/ (what could not be read or judged), shards/ and
            summary.json. With deduplication or decontamination also final/ (the documents that stay then), verdicts/
            (for each of documents/ the rule that removed it, and for which other), contamination/ (every hit),
            deduplication/ (the index for later runs) and final.json. At the end rules.json (what stages judge by),
            report.json and report.html, if there is a report.
        sources: where raw documents come from.
        stages: what they go through, in order.
        deduplication: of what stays, over all shards; None leaves all.
        decontamination: against evaluation sets, after deduplication; None leaves all.
        report: how large report.html is; None writes none. The job report_data writes it later, too.
        processes: 0 takes one for each processor.
        seconds_per_batch: a worker that is longer at 128 documents is killed; the one at fault is quarantined.
        runner: None works on this machine, by `processes`; Beam() through pipelines, here or on a cluster.
    """

    output_directory: str
    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]
    deduplication: Deduplication | None = None
    decontamination: Decontamination | None = None
    report: DataReport | None = DataReport()
    processes: int = 0
    seconds_per_batch: float = 600.0
    runner: Beam | None = None

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise UserError('there are no sources', fix='Set PrepareData.sources.')
        check_names(names)
        if self.processes < 0 or self.seconds_per_batch <= 0:
            raise UserError('processes must not be negative, and seconds_per_batch positive', where='PrepareData')
        if self.runner is not None and self.runner.directory and self.report is not None:
            raise UserError(
                'a report reads output_directory, and Beam.directory has the files',
                where='PrepareData.report',
                fix='Set it to None, or leave Beam.directory empty.',
            )
        Chain(self.stages)

    def __call__(self, invocation: Invocation) -> None:
        """Do the shards that are missing, and say what became of all documents; or say what would be done."""
        chain = Chain(self.stages)
        plan = self._plan(chain)
        if invocation.dry_run:
            print(plan)
            return
        require_one('prepare_data')
        if self.report is not None:
            self.report.check()
        directory = Path(self.output_directory)
        started = time.perf_counter()
        with RunLock(directory):
            claim(
                directory,
                self,
                invocation.operative_config,
                changeable=(
                    'output_directory',
                    'report',
                    'processes',
                    'seconds_per_batch',
                    'runner.index',
                    'runner.options',
                    'runner.salts',
                ),
            )
            settings = json.dumps([flatten_config(chain), chain.identities()], sort_keys=True)
            if self.runner is not None:
                summary = self.runner.prepare(self.sources, chain, directory, settings, self.seconds_per_batch)
            else:
                summary = run(
                    self.sources,
                    chain,
                    directory,
                    settings=settings,
                    processes=self.processes,
                    seconds_per_batch=self.seconds_per_batch,
                )
            report, stay = _table(summary), summary.counts.kept
            if summary.counts.quarantined:
                report += f'\n{_quarantined(directory, summary.counts.quarantined)}'
            if self.deduplication is not None or self.decontamination is not None:
                if self.runner is not None:
                    counts = self.runner.finish(directory, self.deduplication, self.decontamination)
                else:
                    counts = finish(directory, self.deduplication, self.decontamination, processes=self.processes)
                report, stay = f'{report}\n{_final_table(counts)}', counts.kept
            write_rules(directory, chain)
            if self.report is not None:
                report += f'\n{printed_rules(write_data_report(directory, self.report))}see {directory / PAGE_FILE}'
        print(report)
        if summary.counts.documents and summary.counts.quarantined == summary.counts.documents:
            raise UserError(
                f'none of {summary.counts.documents:,} documents could be judged',
                where=str(directory / 'quarantine'),
                fix='It says why of each. Set the sources or stages right, and use another output_directory.',
            )
        if not stay:
            print('warning: no document stays; the report and the ledger say which rules removed them')
        print(f'{directory}: done in {time.perf_counter() - started:.1f} s')

    def _plan(self, chain: Chain) -> str:
        """What would be done. What is read besides documents is looked at: a mistake there would stop late phases."""
        chain.identities()
        lines = [f'would write into {self.output_directory}, from']
        lines += [f'  {source.name}: {len(source.shards()):,} shards' for source in self.sources]
        lines.append('through')
        for stage in chain.stages:
            lines.append(f'  {stage.name}' + (f': {", ".join(stage.rules)}' if stage.rules else ''))
        if self.runner is not None:
            self.runner.check(self.deduplication)
            lines.append(f'by Beam: {" ".join(self.runner.options)}')
        if self.deduplication is not None:
            earlier = sum(index.count for index in earlier_indexes(self.deduplication))
            lines.append(f'  deduplication: {", ".join(self.deduplication.rules)}')
            lines += [f'    against {earlier:,} documents of earlier runs'] if earlier else []
        if self.decontamination is not None:
            lines.append(f'  decontamination: {", ".join(rule.name for rule in self.decontamination.rules)}')
            lines.append(f'    against {self.decontamination.count():,} items')
        return '\n'.join(lines)


def _table(summary: Summary) -> str:
    """What became of all documents, as a table for the terminal."""
    lines = [f'{"source":24}{"documents":>12}{"kept":>12}{"removed":>12}{"quarantined":>12}{"kept characters":>18}']
    rows = [*summary.sources.items(), ('all', summary.counts)]
    for name, counts in rows if len(rows) > 2 else rows[-1:]:
        figures = (counts.documents, counts.kept, counts.removed.total(), counts.quarantined)
        lines.append(f'{name:24}' + ''.join(f'{figure:>12,}' for figure in figures) + f'{counts.kept_characters:>18,}')
    lines += [f'removed by {rule}: {count:,}' for rule, count in summary.counts.removed.most_common()]
    lines += [f'not documents: {reason}: {count:,}' for reason, count in summary.counts.ignored.most_common()]
    if summary.resumed:
        lines.append(f'{summary.resumed:,} of {summary.shards:,} shards had been done before')
    return '\n'.join(lines)


def _quarantined(directory: Path, count: int) -> str:
    """One of the quarantined records, to say what it was."""
    for path in sorted((directory / 'quarantine').glob('*.jsonl')):
        with open(path, encoding='utf-8') as file:
            if line := file.readline():
                record = json.loads(line)
                return f'quarantined: {count:,}, as {record["where"]}: {record["reason"]}; see {path.parent}'
    return f'quarantined: {count:,}'


def _final_table(counts: FinalCounts) -> str:
    """What became of the kept documents over all shards."""
    lines = [f'of {counts.documents:,} documents {counts.kept:,} are final, with {counts.kept_characters:,} characters']
    lines += [f'removed by {rule}: {count:,}' for rule, count in counts.removed.most_common()]
    if counts.changed:
        lines.append(f'cut: {counts.changed:,}')
    return '\n'.join(lines)
