"""What a run directory holds, read for the report. Everything may be missing or cut off: runs are killed.

Beside config.gin, config.json, environment.json, metrics.jsonl and samples.jsonl (lines of `step`, `prompt` and
`continuation`) there is summary.json, with what a job knows that is no metric. All its keys are optional:

    total_steps   of the run
    facts         {label: text or number}: parameters, vocabulary size, the corpus and its SHA-256, ...
    baselines     {evaluation set: {name: bits per byte}}, names as in llm.evaluation.compression_baseline
    bad_records   {reason: number of records that were skipped or repaired}
    bad_examples  [{'where': file and line, 'reason': ..., 'record': the beginning of it}]
    warnings      [text]: rejected checkpoints, a changed environment, ...
"""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm.training.metrics import read_json_lines, read_metrics
from llm.training.run_directory import write_atomically

SUMMARY_FILE = 'summary.json'

Points = list[tuple[float, float]]


def update_summary(run_directory: Path, entries: Mapping[str, Any]) -> None:
    """Set `entries` in summary.json, which keeps its others; see the module's docstring.

    Raises:
        UserError: the file cannot be written.
    """
    path = run_directory / SUMMARY_FILE
    summary = _read_object(path, []) | dict(entries)
    write_atomically(path, json.dumps(summary, indent=1, sort_keys=True) + '\n')


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as far as it is known.

    Attributes:
        name: of the run directory.
        train: lines of kind `train`, in order of steps. evaluations: lines of kind `evaluation`, by evaluation set.
        samples: lines of samples.jsonl. config: text of config.gin. environment, summary: contents of the JSON files.
        warnings: of the summary, of the metrics, and of what could not be read here.
    """

    name: str
    train: list[dict[str, Any]]
    evaluations: dict[str, list[dict[str, Any]]]
    samples: list[dict[str, Any]]
    config: str
    environment: dict[str, Any]
    summary: dict[str, Any]
    total_steps: int | None
    warnings: list[str]

    @property
    def last_step(self) -> int:
        """Last step of which anything is known."""
        lines = itertools.chain(self.train[-1:], *(lines[-1:] for lines in self.evaluations.values()))
        return max((line['step'] for line in lines), default=0)

    @property
    def tokens_per_step(self) -> float | None:
        """Real tokens of an average step."""
        tokens = [line['tokens'] for line in self.train if _is_number(line.get('tokens'))]
        return statistics.fmean(tokens) if tokens else None

    @property
    def seconds(self) -> float | None:
        """Time that the processes of this run took for the steps that are kept; without the time between them."""
        processes: dict[float, float] = {}
        for line in self._all_lines():
            timing = line.get('timing', {})
            if 'started' in timing and 'elapsed' in timing:
                started = timing['started']
                processes[started] = max(processes.get(started, 0.0), timing['elapsed'])
        return sum(processes.values()) if processes else None

    @property
    def resumed_at(self) -> list[int]:
        """Steps at which another process took over."""
        starts = [(line['step'], line.get('timing', {}).get('started')) for line in self.train]
        return [step for (step, before), (_, after) in itertools.pairwise(starts) if before != after]

    def series(self, name: str) -> Points:
        """(step, value) of a training metric or timing, where it is a finite number."""
        return _series(self.train, name)

    def evaluation_series(self, evaluation_set: str, name: str) -> Points:
        """(step, value) of a metric of an evaluation set."""
        return _series(self.evaluations[evaluation_set], name)

    def median(self, name: str) -> float | None:
        """Median over training steps; compilation and evaluation fall into few of them."""
        values = [value for _, value in self.series(name)]
        return statistics.median(values) if values else None

    def baselines(self, evaluation_set: str) -> dict[str, float]:
        """Bits per byte that others reach on this set, by name."""
        baselines = self.summary.get('baselines')
        entries = baselines.get(evaluation_set) if isinstance(baselines, dict) else None
        return {k: v for k, v in entries.items() if _is_number(v)} if isinstance(entries, dict) else {}

    def _all_lines(self) -> list[dict[str, Any]]:
        return [*self.train, *itertools.chain(*self.evaluations.values())]


def read_run(run_directory: Path) -> RunRecord:
    """Everything that the report shows of the run in `run_directory`."""
    warnings: list[str] = []
    summary = _read_object(run_directory / SUMMARY_FILE, warnings)
    environment = _read_object(run_directory / 'environment.json', warnings)
    config = run_directory / 'config.gin'
    train: list[dict[str, Any]] = []
    evaluations: dict[str, list[dict[str, Any]]] = {}
    reported = summary.get('warnings')
    warnings += [str(text) for text in reported] if isinstance(reported, list) else []
    for line in read_metrics(run_directory):
        if line.get('kind') == 'train':
            train.append(line)
        elif line.get('kind') == 'evaluation':
            evaluations.setdefault(str(line.get('set', 'evaluation')), []).append(line)
        elif line.get('kind') == 'warning':
            warnings.append(f'Step {line["step"]}: {line.get("message", "")}')
    total_steps = summary.get('total_steps')
    return RunRecord(
        name=run_directory.resolve().name,
        train=train,
        evaluations=evaluations,
        samples=read_json_lines(run_directory / 'samples.jsonl'),
        config=config.read_text(encoding='utf-8', errors='replace') if config.exists() else '',
        environment=environment,
        summary=summary,
        total_steps=total_steps if isinstance(total_steps, int) else None,
        warnings=warnings,
    )


def _read_object(path: Path, warnings: list[str]) -> dict[str, Any]:
    """The JSON object in `path`, {} if there is none; what is wrong with the file is added to `warnings`."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        warnings.append(f'{path.name} could not be read: {error}')
        return {}
    if not isinstance(content, dict):
        warnings.append(f'{path.name} does not hold a JSON object')
        return {}
    return content


def _series(lines: list[dict[str, Any]], name: str) -> Points:
    values = ((line['step'], line.get(name, line.get('timing', {}).get(name))) for line in lines)
    return [(float(step), float(value)) for step, value in values if _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
