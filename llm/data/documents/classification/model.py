"""A trained linear classifier: its weights in a directory, and the probabilities that it gives texts, in NumPy."""

import dataclasses
import functools
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.classification.features import NgramFeatures, Sparse
from llm.data.sources.files import file_state
from llm.errors import UserError

DESCRIPTION, WEIGHTS = 'classifier.json', 'weights.npz'
_FORMAT = 1
STORAGES = ('float32', 'int8')
# Of all scripts and kinds of character that are treated in their own way: where tokenisation changes, its features do.
_PROBE = 'Naïve words, don’t – 10,000 of them! ΑΒΓ Ёж 東京 こんにちは สวัสดี ½ x²\tA_b\x85c 𝒟'


@dataclasses.dataclass(frozen=True, eq=False)
class LinearClassifier:
    """Logits that are linear in the features; sigmoids or a softmax over them.

    Attributes:
        exclusive: of the labels a text has exactly one. Two exclusive labels have one logit, that of the first.
        weights: float32 [buckets, outputs]. bias: float32 [outputs].
    """

    features: NgramFeatures
    labels: tuple[str, ...]
    exclusive: bool
    weights: np.ndarray
    bias: np.ndarray

    @property
    def digest(self) -> str:
        """SHA-256 in hex of everything that decides what it says."""
        hashed = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for array in (self.weights, self.bias):
            hashed.update(np.ascontiguousarray(array, '<f4').data)
        return hashed.hexdigest()

    def _settings(self) -> dict[str, Any]:
        probe = self.features([_PROBE])
        return {
            'format': _FORMAT,
            'features': dataclasses.asdict(self.features),
            'tokenisation': hashlib.sha256(probe.indices.astype('<i4').data).hexdigest()[:16],
            'labels': list(self.labels),
            'exclusive': self.exclusive,
        }

    def logits(self, sparse: Sparse) -> np.ndarray:
        """float64 [rows, outputs]."""
        rows = sparse.rows
        columns = [
            np.bincount(rows, sparse.values * self.weights[:, i][sparse.indices], len(sparse))
            for i in range(self.weights.shape[1])
        ]
        return np.stack(columns, axis=1) + self.bias

    def score(self, sparse: Sparse) -> np.ndarray:
        """float64 [rows, labels]: probabilities; NaN for a row without features, of which nothing can be said."""
        result = probabilities_of(self.logits(sparse), len(self.labels), exclusive=self.exclusive)
        result[np.diff(sparse.offsets) == 0] = np.nan
        return result

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [texts, labels]; see `score`."""
        return self.score(self.features(texts))

    def stored(self, storage: str) -> 'LinearClassifier':
        """As it is after `save` with this storage and `load`: 'int8' rounds to 127 steps on each side of 0."""
        if storage == 'float32':
            return self
        scaled, scale = _quantised(self.weights)
        return dataclasses.replace(self, weights=scaled.astype(np.float32) * scale)

    def save(self, directory: Path, storage: str) -> None:
        """Write the two files, the description last. What `storage` cannot hold is rounded: save what `stored` gives.

        Raises:
            OSError: the directory cannot be written.
        """
        arrays: dict[str, Any] = {'weights': self.weights, 'bias': self.bias}
        if storage == 'int8':
            arrays['weights'], arrays['scale'] = _quantised(self.weights)
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / f'partial.{WEIGHTS}'
        np.savez_compressed(temporary, **arrays)
        temporary.replace(directory / WEIGHTS)
        description = {**self._settings(), 'storage': storage, 'digest': self.digest}
        (directory / DESCRIPTION).write_text(json.dumps(description, indent=1) + '\n')


def _quantised(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [buckets, outputs], float32 [outputs])."""
    scale = (np.maximum(np.abs(weights).max(axis=0), np.float32(1e-30)) / np.float32(127)).astype(np.float32)
    return np.rint(weights / scale).astype(np.int8), scale


def probabilities_of(logits: np.ndarray, num_labels: int, *, exclusive: bool) -> np.ndarray:
    """Logits [n, outputs] as probabilities [n, labels]."""
    if exclusive and num_labels > 2:
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        softmax: np.ndarray = shifted / shifted.sum(axis=1, keepdims=True)
        return softmax
    small = np.exp(-np.abs(logits))
    positive = np.where(logits >= 0, 1 / (1 + small), small / (1 + small))
    if not exclusive:
        return positive
    return np.concatenate([positive, np.where(logits >= 0, small / (1 + small), 1 / (1 + small))], axis=1)


def describe(directory: str) -> dict[str, Any]:
    """What classifier.json says, checked.

    Raises:
        UserError: it is not there, cannot be read, or is of another format.
    """
    path = Path(directory) / DESCRIPTION
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise UserError(
            f'has no {DESCRIPTION}, so it is not a finished classifier',
            where=directory,
            fix='Give the output directory of train_classifier.',
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f'cannot be read ({error})', where=str(path), fix='Train it again.') from error
    if not isinstance(found, dict) or found.get('format') != _FORMAT:
        version = found.get('format') if isinstance(found, dict) else None
        raise UserError(
            f'is a classifier of format {version}; this version reads {_FORMAT}', where=str(path), fix='Train it again.'
        )
    return found


def load(directory: str) -> LinearClassifier:
    """The classifier in a directory, read once in a process while its files stay.

    Raises:
        UserError: it is not there, damaged, or was trained with another tokenisation.
    """
    paths = (os.path.join(directory, name) for name in (DESCRIPTION, WEIGHTS))
    return _load(directory, tuple(file_state(path) for path in paths if os.path.exists(path)))


@functools.lru_cache(maxsize=8)
def _load(directory: str, state: tuple[tuple[int, int, int], ...]) -> LinearClassifier:
    description = describe(directory)
    path = Path(directory) / WEIGHTS
    damaged = UserError('is damaged: its digest is not what classifier.json says', where=str(path), fix='Train again.')
    try:
        with np.load(path, allow_pickle=False) as arrays:
            weights, bias = arrays['weights'], arrays['bias']
            if description['storage'] == 'int8':
                weights = weights.astype(np.float32) * arrays['scale']
        settings = dict(description['features'])
        settings['character_ngrams'] = tuple(settings['character_ngrams'])
        model = LinearClassifier(
            NgramFeatures(**settings), tuple(description['labels']), description['exclusive'], weights, bias
        )
    except (OSError, KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f'cannot be read ({error})', where=str(path), fix='Train it again.') from error
    if description.get('tokenisation') != model._settings()['tokenisation']:
        raise UserError(
            'was trained when texts were divided into words in another way, so its scores would mean nothing',
            where=directory,
            fix='Train it again with this version.',
        )
    outputs = 1 if model.exclusive and len(model.labels) == 2 else len(model.labels)
    if (
        weights.shape != (model.features.buckets, outputs)
        or bias.shape != (outputs,)
        or model.digest != description.get('digest')
    ):
        raise damaged
    return model
