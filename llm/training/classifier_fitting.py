"""From files of labelled features to a linear classifier: which buckets are used, batches for JAX, the fit."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from llm.data.documents.classification.examples import TRAINING, VALIDATION, ExampleFiles
from llm.data.documents.classification.features import NgramFeatures
from llm.data.documents.classification.model import LinearClassifier
from llm.errors import UserError
from llm.training.linear_classifier import Batch, Fit, LinearTraining, example_weights, fit_at_once, fit_batches

# Examples that are gone through at once where all are.
CHUNK = 2048


@dataclasses.dataclass(frozen=True)
class UsedBuckets:
    """Buckets that training examples have; the weights of all others stay 0.

    Attributes:
        number: int32 [buckets], of each its row in the trained weights, or -1.
        examples: int64 [buckets], how many training examples have it.
        deviation: float64 [buckets], the standard deviation of its value over all training examples.
    """

    number: np.ndarray
    examples: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, files: ExampleFiles, training: np.ndarray, buckets: int) -> 'UsedBuckets':
        """Of the training examples."""
        examples, sums, squares = np.zeros(buckets, np.int64), np.zeros(buckets), np.zeros(buckets)
        for chunk in chunks(training):
            sparse = files.batch(chunk)
            examples += np.bincount(sparse.indices, minlength=buckets)
            values = sparse.values.astype(np.float64)
            sums += np.bincount(sparse.indices, values, buckets)
            squares += np.bincount(sparse.indices, values**2, buckets)
        number = np.full(buckets, -1, np.int32)
        used = np.flatnonzero(examples)
        number[used] = np.arange(len(used), dtype=np.int32)
        n = max(len(training), 1)
        return cls(number, examples, np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0)))

    @property
    def count(self) -> int:
        return int((self.examples > 0).sum())


def chunks(which: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of bounded size, in order."""
    for start in range(0, len(which), CHUNK):
        yield which[start : start + CHUNK]


def outputs_of(targets: np.ndarray, *, exclusive: bool) -> np.ndarray:
    """[n, labels] as [n, outputs]: two exclusive labels have one logit."""
    return targets[:, :1] if exclusive and targets.shape[1] == 2 else targets


def train(
    files: ExampleFiles,
    features: NgramFeatures,
    config: LinearTraining,
    labels: Sequence[str],
    *,
    exclusive: bool,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[LinearClassifier, list[dict[str, float]], UsedBuckets]:
    """The classifier, a record for each epoch, and what buckets are used.

    Raises:
        UserError: a label has no training example, or all have it.
    """
    training, validation = (np.flatnonzero(files.split == split) for split in (TRAINING, VALIDATION))
    check_labels(files.targets[training], labels, 'training')
    used = UsedBuckets.of(files, training, features.buckets)
    softmax = exclusive and len(labels) > 2
    targets = outputs_of(files.targets, exclusive=exclusive)
    # Those of validation weigh as those of training do: their losses are then comparable.
    weights = np.ones((len(files), 1 if softmax else targets.shape[1]), np.float32)
    weights[training] = example_weights(targets[training], config.balance, softmax=softmax)
    if len(validation):
        check_labels(files.targets[validation], labels, 'validation')
        weights[validation] = example_weights(targets[validation], config.balance, softmax=softmax)

    make = functools.partial(example_batch, files, used, targets, weights)
    if config.solver == 'lbfgs':
        everything = make(training, len(training), padded=False)
        fit = fit_at_once(config, everything, len(training), used.count, softmax=softmax)
    else:
        fit = fit_batches(
            config,
            lambda some: make(training[some], config.batch_size),
            len(training),
            lambda: (make(chunk, CHUNK) for chunk in chunks(validation)),
            len(validation),
            used.count,
            targets.shape[1],
            softmax=softmax,
            told=told,
        )
    return _model(fit, used, features, labels, exclusive), fit.history, used


def check_labels(targets: np.ndarray, labels: Sequence[str], kind: str) -> None:
    """Raises UserError for a label that no example has, or all have; `kind`: of the examples, in a word."""
    for label, count in zip(labels, targets.sum(axis=0).tolist(), strict=True):
        if not 0 < count < len(targets):
            raise UserError(
                f'of {len(targets):,} {kind} examples {"all" if count else "none"} have the label {label!r}',
                where='examples',
                fix='Give more examples of each kind'
                + (f', or a larger share of {kind} ones.' if kind != 'usable' else '.'),
            )


def _model(
    fit: Fit, used: UsedBuckets, features: NgramFeatures, labels: Sequence[str], exclusive: bool
) -> LinearClassifier:
    weights = np.zeros((features.buckets, fit.weights.shape[1]), np.float32)
    weights[used.number >= 0] = fit.weights
    return LinearClassifier(features, tuple(labels), exclusive, weights, fit.bias.astype(np.float32))


def example_batch(
    files: ExampleFiles,
    used: UsedBuckets,
    targets: np.ndarray,
    weights: np.ndarray,
    which: np.ndarray,
    rows: int,
    *,
    padded: bool = True,
) -> Batch:
    """Some examples for JAX, padded to `rows` rows and one of few numbers of features, so that few are compiled."""
    sparse = files.batch(which)
    length = _length(len(sparse.indices)) if padded else len(sparse.indices)
    numbers = used.number[sparse.indices]
    known = numbers >= 0
    return Batch(
        _padded(np.where(known, numbers, 0), length),
        _padded(sparse.rows.astype(np.int32), length),
        _padded(np.where(known, sparse.values, np.float32(0)), length),
        _padded(targets[which].astype(np.float32), rows),
        _padded(weights[which], rows),
    )


def _length(least: int) -> int:
    """The next of 4, 5, 6 or 7 times a power of two, at least 4,096."""
    step = max(1 << max(least - 1, 0).bit_length() - 3, 1024)
    return max(-(-least // step) * step, 4096)


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def held_out_scores(model: LinearClassifier, files: ExampleFiles, which: np.ndarray) -> np.ndarray:
    """[len(which), labels]: the probabilities of some examples, as the stage would give them."""

    return np.concatenate([model.score(files.batch(chunk)) for chunk in chunks(which)])
