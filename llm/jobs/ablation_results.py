"""What the ablate_data job writes when all of its runs are finished: a table, a verdict, a page and a plot."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.evaluation.data_ablation import ASSUMPTIONS, BITS_PER_BYTE, Scores, compare, sentence, verdicts
from llm.evaluation.multiple_choice import Item, item_figures
from llm.evaluation.reports.ablation import chart_svg, render_page
from llm.evaluation.reports.run_record import RunRecord, read_run
from llm.training.run_directory import write_atomically

CHOICES = 'multiple_choice.json'  # of a run: the log-likelihoods of all choices of all items, by set
RESULTS, VERDICT, REPORT, CHART = 'results.csv', 'verdict.json', 'report.html', 'curves.svg'


@dataclasses.dataclass(frozen=True)
class Settings:
    """Those of the job that its results depend on; see AblateData."""

    held_out: tuple[str, ...]
    seeds: tuple[int, ...]
    total_steps: int
    batch_size: int
    sequence_length: int
    confidence: float
    level: float
    overlap_words: int


def write_results(
    directory: Path,
    settings: Settings,
    run_directories: Mapping[str, Sequence[Path]],
    items: Mapping[str, Sequence[Item]],
    overlap: Mapping[str, Mapping[str, Any]],
    epochs: Mapping[str, Mapping[str, float]],
) -> str:
    """Compare finished runs, and write into `directory`; what to print of it.

    Args:
        run_directories: by variant, in the order of the seeds; the first variant is the baseline.
        items: of the sets of multiple choice. overlap: by variant and set, fields of `Overlap`.
        epochs: by variant and component, how often a run reads it.
    """
    runs = {name: [read_run(each) for each in some] for name, some in run_directories.items()}
    scores = {
        name: [_scores(run, each, items) for run, each in zip(runs[name], some, strict=True)]
        for name, some in run_directories.items()
    }
    compared = compare(scores, confidence=settings.confidence, level=settings.level)
    baseline, *others = runs
    data = {name: _facts(some[0], settings, epochs[name]) for name, some in runs.items()}
    facts = runs[baseline][0].summary['facts']
    record = {
        'name': directory.resolve().name,
        'sentences': [sentence(compared, name, baseline, len(settings.seeds), settings.level) for name in others],
        'overall': verdicts(compared),
        'baseline': baseline,
        'seeds': list(settings.seeds),
        'steps': settings.total_steps,
        'tokens_per_step': settings.batch_size * settings.sequence_length,
        'parameters': facts['parameters'],
        'vocabulary_size': facts['vocabulary size'],
        'confidence': settings.confidence,
        'level': settings.level,
        'metrics': [each.record() for each in compared],
        'chance': {name: float(np.mean([1 / len(each.choices) for each in some])) for name, some in items.items()},
        'data': data,
        'overlap': overlap,
        'warnings': _warnings(data, overlap, settings.overlap_words),
        'assumptions': list(ASSUMPTIONS),
    }
    curves = {
        held_out: {
            name: [run.evaluation_series(held_out, BITS_PER_BYTE) for run in some] for name, some in runs.items()
        }
        for held_out in settings.held_out
    }
    write_atomically(directory / RESULTS, _table(settings.seeds, runs, scores))
    write_atomically(directory / CHART, chart_svg(curves))
    config = (directory / 'config.gin').read_text(encoding='utf-8')
    write_atomically(directory / REPORT, render_page(record, curves, config))
    write_atomically(directory / VERDICT, json.dumps(record, indent=1, allow_nan=False) + '\n')
    lines = [*(f'warning: {text}' for text in record['warnings']), *record['sentences']]
    return '\n'.join([*lines, f'{directory}: complete; see {directory / REPORT}'])


def _scores(run: RunRecord, directory: Path, items: Mapping[str, Sequence[Item]]) -> Scores:
    """Of a finished run, from its directory."""
    last = {name: lines[-1][BITS_PER_BYTE] for name, lines in run.evaluations.items()}
    found = json.loads((directory / CHOICES).read_text(encoding='utf-8')) if items else {}
    choices = {name: item_figures(some, [np.array(x) for x in found[name]]) for name, some in items.items()}
    return Scores(last, choices)


def _facts(run: RunRecord, settings: Settings, epochs: Mapping[str, float]) -> dict[str, int | float]:
    """What a variant's data is, over all of its components, from one of its runs."""
    facts = run.summary['facts']
    total = {what: sum(facts[f'{name}: {what}'] for name in epochs) for what in ('documents', 'bytes', 'tokens')}
    trained = round((run.tokens_per_step or 0.0) * settings.total_steps)
    per_token = total['bytes'] / max(1, total['tokens'] - total['documents'])
    found: dict[str, int | float] = {**total, 'bytes per token': per_token, 'tokens trained on': trained}
    for name, times in epochs.items():
        found['epochs' if len(epochs) == 1 else f'epochs of {name}'] = times
    return found


def _warnings(data: Mapping[str, Mapping[str, Any]], overlap: Mapping[str, Mapping[str, Any]], words: int) -> list[str]:
    found = [
        f'{name} is in the training text of {variant} in part: {each["equal"]:,} equal documents, '
        f'{each["touched"]:,} of {each["documents"]:,} texts share {words} words in a row with it'
        for variant, sets in overlap.items()
        for name, each in sets.items()
        if each['equal'] or each['touched']
    ]
    trained = {name: figures['tokens trained on'] for name, figures in data.items()}
    if max(trained.values()) > 1.01 * min(trained.values()):
        shown = ', '.join(f'{tokens:,} for {name}' for name, tokens in trained.items())
        found.append(f"tokens that are not padding differ: {shown}; DataConfig.packing = 'concatenate' has no padding")
    return found


def _table(
    seeds: Sequence[int], runs: Mapping[str, Sequence[RunRecord]], scores: Mapping[str, Sequence[Scores]]
) -> str:
    """All figures, one a row: of evaluation sets at every evaluation, of multiple choice at the end."""
    rows: list[tuple[Any, ...]] = [('variant', 'seed', 'step', 'set', 'metric', 'value')]
    for name, some in runs.items():
        for seed, run, score in zip(seeds, some, scores[name], strict=True):
            for dataset, lines in run.evaluations.items():
                for metric in (BITS_PER_BYTE, 'loss'):
                    rows += [(name, seed, line['step'], dataset, metric, repr(line[metric])) for line in lines]
            for dataset, figures in score.choices.items():
                rows += [(name, seed, run.last_step, dataset, key, repr(float(x.mean()))) for key, x in figures.items()]
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    return text.getvalue()
