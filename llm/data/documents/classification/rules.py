"""Rules by trained classifiers: one for each label, with its probability as figure; sets for `quality.rules.Rules`."""

import abc
import dataclasses
import itertools
import re
from collections.abc import Sequence

import numpy as np

from llm.data.documents import fasttext_models
from llm.data.documents.bounds import Bounds
from llm.data.documents.classification.model import LinearClassifier, load
from llm.data.documents.quality.batch import Batch
from llm.data.documents.quality.rules import Judgement
from llm.data.documents.quality.words import offsets
from llm.data.sources.files import file_identity
from llm.errors import UserError

# What is removed: the pattern of what lies between two parts of a text.
_BETWEEN = {'lines': r'\r?\n', 'paragraphs': r'\r?\n[^\S\n]*\r?\n\s*'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ByProbability(abc.ABC):
    """Args:
    labels: of the model's, those that get a rule; it may have others.
    name: of the set; a rule is called NAME/LABEL.
    least: (label, probability): what has less is removed. most: what has more is. A label in neither is only told.
    remove: 'documents'; or 'lines' or 'paragraphs', whose own probabilities are then judged: those that fail are cut
        out, and a document goes only when nothing is left. The figure is always the whole document's.
    """

    labels: tuple[str, ...]
    name: str
    least: tuple[tuple[str, float], ...] = ()
    most: tuple[tuple[str, float], ...] = ()
    remove: str = 'documents'

    def __post_init__(self) -> None:
        if self.remove != 'documents' and self.remove not in _BETWEEN:
            raise UserError(
                f'remove = {self.remove!r} is not known',
                where=type(self).__name__,
                fix=f'There are documents, {", ".join(_BETWEEN)}.',
            )
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise UserError(f'{self.labels} are not different labels', where=f'labels of {type(self).__name__}')
        for label, threshold in (*self.least, *self.most):
            if not 0 <= threshold <= 1:
                raise UserError(
                    f'{threshold} for {label!r} is not from 0 to 1', where=f'thresholds of {type(self).__name__}'
                )
            if label not in self.labels:
                raise UserError(
                    f'{label!r} is not one of its labels {", ".join(self.labels)}',
                    where=f'thresholds of {type(self).__name__}',
                    fix='Name it in labels, too.',
                )

    @abc.abstractmethod
    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, labels]; NaN of a text of which nothing can be said. Raises UserError for a label of no model."""

    @abc.abstractmethod
    def identities(self) -> list[str]:
        """Change where the model's content does."""

    @property
    def rules(self) -> tuple[str, ...]:
        """One for each label."""
        return tuple(f'{self.name}/{label}' for label in self.labels)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """Of documents; none where it is their parts that are judged, of which the figure is not."""
        return self._thresholds() if self.remove == 'documents' else tuple(Bounds(rule) for rule in self.rules)

    def _thresholds(self) -> tuple[Bounds, ...]:
        least, most = dict(self.least), dict(self.most)
        return tuple(
            Bounds(rule, least.get(label), most.get(label)) for rule, label in zip(self.rules, self.labels, strict=True)
        )

    def judge(self, batch: Batch) -> Judgement:
        """See RuleSet. A text without words has no figure, and stays."""
        values = self.probabilities(batch.texts)
        if self.remove == 'documents' or not (self.least or self.most):
            return Judgement(tuple(values.T), tuple(self._keep(values).T), batch)
        parts = [_parts(text, self.remove) for text in batch.texts]
        bounds = offsets([len(some) for some in parts], len(parts))
        flat = [part for some in parts for part in some]
        passed = self._keep(self.probabilities(flat))
        texts, keep = [], np.ones(values.shape, np.bool_)
        for i, text in enumerate(batch.texts):
            verdicts: np.ndarray = passed[bounds[i] : bounds[i + 1]]
            good = np.logical_and.reduce(verdicts, axis=1).tolist()
            rests = [part for part, stays in zip(parts[i], good, strict=True) if stays]
            if not ''.join(rests).strip() and text.strip():  # the text stays as it is for who looks at what was removed
                keep[i] = verdicts.all(axis=0)
                texts.append(text)
            else:
                texts.append(''.join(rests) if len(rests) < len(parts[i]) else text)
        return Judgement(tuple(values.T), tuple(keep.T), Batch(batch.documents, texts))

    def _keep(self, values: np.ndarray) -> np.ndarray:
        """[n, labels]: whether each is within its thresholds."""
        thresholds = self._thresholds()
        return np.stack([threshold.keep(values[:, i]) for i, threshold in enumerate(thresholds)], axis=1)


def _parts(text: str, kind: str) -> list[str]:
    """The lines or paragraphs of a text, each with what lies between it and the next; joined they are the text."""
    starts = [0, *(match.end() for match in re.finditer(_BETWEEN[kind], text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(starts) if a < b]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classifier(_ByProbability):
    """A linear classifier of train_classifier's; the arguments beside `directory` are those of all such sets.

    Args:
        directory: the job's output directory, or a copy of its classifier.json and weights.npz.
    """

    directory: str
    name: str = 'classifier'

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        model = self._model()
        return model.probabilities(texts)[:, [model.labels.index(label) for label in self.labels]]

    def identities(self) -> list[str]:
        return [self._model().digest]

    def _model(self) -> LinearClassifier:
        model = load(self.directory)
        for label in self.labels:
            if label not in model.labels:
                raise _no_label(label, self.directory, model.labels)
        return model


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastText(_ByProbability):
    """A supervised fastText model (.bin or .ftz), as of DCLM or of dolma; needs the package fasttext-predict.

    Line breaks are spaces to it, and nothing else is done to the text before.

    Args:
        model: its file; its labels are without '__label__' here.
    """

    model: str
    name: str = 'fasttext'

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        rows = [self._row(fasttext_models.probabilities(self.model, text)) for text in texts]
        return np.array(rows, np.float64).reshape(len(texts), len(self.labels))

    def _row(self, found: dict[str, float]) -> list[float]:
        for label in self.labels if found else ():
            if label not in found:
                raise _no_label(label, self.model, sorted(found))
        return [found[label] if found else np.nan for label in self.labels]

    def identities(self) -> list[str]:
        return [file_identity(self.model)]


def _no_label(label: str, where: str, labels: Sequence[str]) -> UserError:
    return UserError(f'has no label {label!r}', where=where, fix=f'It has {", ".join(labels[:8])}.')
