"""The train_classifier job: a linear classifier of documents from labelled examples, measured on held-out ones."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from llm.configuration import Invocation
from llm.data.documents.classification.examples import HELD_OUT, TRAINING, ExampleFiles, Examples, read_examples
from llm.data.documents.classification.features import NgramFeatures
from llm.data.documents.classification.model import STORAGES, load
from llm.data.documents.stage import Chain, Stage
from llm.data.sources import check_names
from llm.data.sources.files import unwritable
from llm.errors import UserError
from llm.evaluation.probability_metrics import probability_metrics
from llm.jobs.classifier_report import Curves, render
from llm.jobs.telling_ngrams import telling_ngrams
from llm.parallel.processes import require_one
from llm.training.classifier_fitting import check_labels, held_out_scores, train
from llm.training.linear_classifier import LinearTraining
from llm.training.run_directory import claim, write_atomically
from llm.training.run_lock import RunLock

METRICS, PAGE, SCORES = 'metrics.json', 'report.html', 'held_out.parquet'
_WORKING = 'examples'  # folder of features, there while the job runs
_HARDEST = 10
_LEAST_HELD_OUT = 30  # of a label, for its figures to say something
_LEAST_FOR_ADAM = 3000  # examples; of fewer, its epochs are too few steps


@dataclasses.dataclass(frozen=True)
class TrainClassifier:
    """Train a linear classifier of hashed n-grams, and measure it on documents that it has not seen.

    What comes out depends on the documents' content, the settings and the seed: not on files, nor on their order.

    Args:
        output_directory: gets classifier.json and weights.npz (for the rules `Classifier`), metrics.json, report.html
            and held_out.parquet (every held-out example with its labels and probabilities). Run again with the same
            config, the job says that it is complete; a directory of another config is refused.
        examples: labelled documents.
        labels: all of them, in the order of the rules.
        exclusive: every document has exactly one; else each holds or not, on its own.
        stages: what documents go through before, as those that will be scored do; those that a rule removes are left
            out.
        held_out, validation: shares of the documents that are measured on, and that tell Adam when to stop; L-BFGS
            learns from those, too.
        storage: of the weights, 'float32' or 'int8' (a quarter of the size).
        precisions, shares: thresholds that reach them are told.
    """

    output_directory: str
    examples: tuple[Examples, ...]
    labels: tuple[str, ...]
    exclusive: bool = True
    stages: tuple[Stage, ...] = ()
    features: NgramFeatures = NgramFeatures()
    training: LinearTraining = LinearTraining()
    held_out: float = 0.2
    validation: float = 0.1
    storage: str = 'float32'
    precisions: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.99)
    shares: tuple[float, ...] = (0.01, 0.1, 0.25, 0.5)

    def __post_init__(self) -> None:
        if not self.examples:
            raise UserError('there are no examples to learn from', fix='Set TrainClassifier.examples.')
        check_names([some.source.name for some in self.examples])
        if len(set(self.labels)) < len(self.labels) or len(self.labels) < 1 + self.exclusive:
            raise UserError(
                f'{self.labels} are not different labels, at least {1 + self.exclusive}', where='TrainClassifier.labels'
            )
        if '' in self.labels or any('/' in label for label in self.labels):
            raise UserError('a label must not be empty or have a slash', where='TrainClassifier.labels')
        if not (self.held_out > 0 and self.validation >= 0 and self.held_out + self.validation < 1):
            raise UserError(
                f'held_out = {self.held_out} and validation = {self.validation} leave nothing to learn from or measure',
                where='TrainClassifier',
            )
        if self.storage not in STORAGES:
            raise UserError(f'storage {self.storage!r} is none of {", ".join(STORAGES)}', where='TrainClassifier')
        if any(not 0 < share <= 1 for share in (*self.precisions, *self.shares)):
            raise UserError('precisions and shares must be above 0 and at most 1', where='TrainClassifier')
        for some in self.examples:
            for label in some.labels or ():
                if label not in self.labels:
                    raise UserError(f'{label!r} of source {some.source.name!r} is not in labels', where='Examples')
        Chain(self.stages)

    def __call__(self, invocation: Invocation) -> None:
        """Read, train, measure and write; or say what would be done."""
        if invocation.dry_run:
            print(self._plan())
            return
        require_one('train_classifier')
        directory = Path(self.output_directory)
        with RunLock(directory):
            claim(directory, self, invocation.operative_config, changeable=('output_directory',))
            if _is_complete(directory):
                print(f'{directory}: complete; see {directory / PAGE}')
                return
            try:
                metrics = self._make(directory)
            except OSError as error:
                raise unwritable(directory, error, 'files') from error
            finally:
                shutil.rmtree(directory / _WORKING, ignore_errors=True)
        print(f'{_summary(metrics)}\n{directory}: done; see {directory / PAGE}')

    def _plan(self) -> str:
        lines = [f'would train a classifier of {", ".join(self.labels)} into {self.output_directory}, from']
        lines += [f'  {some.source.name}: {len(some.source.shards()):,} shards' for some in self.examples]
        return '\n'.join(lines)

    def _make(self, directory: Path) -> dict[str, Any]:
        """Everything that is written but the config; the metrics."""
        clock = time.perf_counter()
        files = read_examples(
            self.examples,
            Chain(self.stages),
            self.features,
            self.labels,
            directory / _WORKING,
            exclusive=self.exclusive,
            held_out=self.held_out,
            validation=self.validation if self.training.solver == 'adam' else 0.0,
            seed=self.training.seed,
        )
        held_out = np.flatnonzero(files.split == HELD_OUT)
        check_labels(files.targets, self.labels, 'usable')
        check_labels(files.targets[held_out], self.labels, 'held-out')
        read = time.perf_counter() - clock
        print(f'read {len(files):,} examples, {files.bytes:,} bytes, in {read:.1f} s', flush=True)
        clock = time.perf_counter()
        model, history, used = train(
            files,
            self.features,
            self.training,
            self.labels,
            exclusive=self.exclusive,
            told=lambda line: print(line, flush=True),
        )
        print(f'trained {used.count:,} weights a label in {time.perf_counter() - clock:.1f} s', flush=True)
        model = model.stored(self.storage)
        scores, targets = held_out_scores(model, files, held_out), files.targets[held_out]
        by_label = {
            label: probability_metrics(targets[:, i], scores[:, i], precisions=self.precisions, shares=self.shares)
            for i, label in enumerate(self.labels)
        }
        metrics = {
            'labels': by_label,
            'examples': {
                'training': int((files.split == TRAINING).sum()),
                'held_out': len(held_out),
                'bytes': files.bytes,
                **files.counts,
            },
            'warnings': [
                *_too_few(by_label, exclusive=self.exclusive),
                *_warnings(history, self.training, int((files.split == TRAINING).sum()), files.counts),
            ],
            'digest': model.digest,
            'used_buckets': used.count,
            'history': history,
            'telling_ngrams': telling_ngrams(model, files, used),
        }
        if self.exclusive:
            metrics['accuracy'] = float(np.mean(scores.argmax(axis=1) == targets.argmax(axis=1)))
        model.save(directory, self.storage)
        _write_scores(directory / SCORES, self.labels, files, held_out, scores)
        page = render(metrics, Curves(targets, scores), _hardest(self.labels, files, held_out, scores))
        write_atomically(directory / PAGE, page)
        # Last, because it says that the job is complete.
        write_atomically(directory / METRICS, json.dumps(metrics, indent=1, ensure_ascii=False) + '\n')
        return metrics


def _is_complete(directory: Path) -> bool:
    """Whether an earlier run wrote all, and the weights are those that it measured."""
    try:
        written = json.loads((directory / METRICS).read_text(encoding='utf-8'))
        whole = all((directory / name).exists() for name in (PAGE, SCORES))
        return whole and load(str(directory)).digest == written['digest']
    except (OSError, ValueError, KeyError, UserError):
        return False


def _too_few(by_label: dict[str, dict[str, Any]], *, exclusive: bool) -> list[str]:
    """Labels that too few held-out examples have, or do not have, in words."""
    found = []
    for label, figures in by_label.items():
        # Of exclusive labels, those without this one have others, which are looked at.
        for kind, count in (('with', figures['positive']), *([] if exclusive else [('without', figures['negative'])])):
            if count < _LEAST_HELD_OUT:
                found.append(
                    f'Held-out examples {kind} the label {label}: {count}. Too few to measure by: give more examples, '
                    'or a larger HELD_OUT.'
                )
    return found


def _warnings(
    history: list[dict[str, float]], training: LinearTraining, examples: int, counts: dict[str, int]
) -> list[str]:
    """What else a person should look at, in words.

    Args:
        examples: that were learnt from.
    """
    found = []
    if training.solver == 'adam' and examples < _LEAST_FOR_ADAM:
        found.append(f"Only {examples:,} examples to learn from, few steps for Adam: take SOLVER = 'lbfgs'.")
    losses = [record['validation_loss'] for record in history if 'validation_loss' in record]
    if len(losses) == training.epochs and losses[-1] == min(losses):
        found.append("The loss still fell in the last epoch: give more EPOCHS, or take SOLVER = 'lbfgs'.")
    if contradicting := counts.get('repeated with other labels'):
        found.append(f'{contradicting:,} texts are there with other labels, too.')
    return found


def _write_scores(
    path: Path, labels: tuple[str, ...], files: ExampleFiles, which: np.ndarray, scores: np.ndarray
) -> None:
    import pyarrow
    import pyarrow.parquet

    columns: dict[str, Any] = {'excerpt': [files.excerpt(i) for i in which.tolist()]}
    for i, label in enumerate(labels):
        columns[f'{label}.holds'], columns[f'{label}.probability'] = files.targets[which, i], scores[:, i]
    temporary = path.with_name(f'partial.{path.name}')
    pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression='zstd')
    temporary.replace(path)


def _hardest(
    labels: tuple[str, ...], files: ExampleFiles, which: np.ndarray, scores: np.ndarray
) -> dict[str, dict[str, list[tuple[float, str]]]]:
    """For each label (probability, excerpt) of those that hold and were given the least, and the other way round."""
    result = {}
    for i, label in enumerate(labels):
        holds, column = files.targets[which, i], scores[:, i]
        order = np.argsort(column, kind='stable')
        missed, wrong = order[holds[order]][:_HARDEST], order[~holds[order]][::-1][:_HARDEST]
        kinds = ((f'{label}, and given the least', missed), (f'not {label}, and given the most', wrong))
        result[label] = {kind: [(float(column[j]), files.excerpt(int(which[j]))) for j in some] for kind, some in kinds}
    return result


def _summary(metrics: dict[str, Any]) -> str:
    """The figures of all labels as a table for the terminal."""
    lines = [f'{"held out":20}{"positive":>10}{"negative":>10}{"ROC AUC":>10}{"av. prec.":>10}{"cal. error":>11}']
    for label, figures in metrics['labels'].items():
        counted = f'{figures["positive"]:>10,}{figures["negative"]:>10,}'
        ranked = f'{figures["roc_auc"]:>10.4f}{figures["average_precision"]:>10.4f}'
        lines.append(f'{label:20}{counted}{ranked}{figures["expected_calibration_error"]:>11.4f}')
    lines += [f'warning: {warning}' for warning in metrics['warnings']]
    examples = metrics['examples']
    lines += [f'{name}: {examples[name]:,}' for name in examples if name not in ('training', 'held_out', 'bytes')]
    return '\n'.join(lines)
