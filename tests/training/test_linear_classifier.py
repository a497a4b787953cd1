"""Linear classifiers against scikit-learn's optimum, gradients against differences, weights of examples."""

import jax
import jax.test_util
import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression

from llm.data.documents.classification.model import probabilities_of
from llm.errors import UserError
from llm.training.linear_classifier import (
    Batch,
    LinearTraining,
    example_weights,
    fit_at_once,
    fit_batches,
    objective,
)

ROWS, BUCKETS = 120, 40


def problem(outputs, softmax, seed=0):
    """(CSR matrix, targets [rows, outputs]) of random sparse examples, the labels linear in them but for noise."""
    drawn = np.random.default_rng(seed)
    matrix = drawn.random((ROWS, BUCKETS)) * (drawn.random((ROWS, BUCKETS)) < 0.2)
    logits = matrix @ drawn.normal(0, 3, (BUCKETS, outputs)) + drawn.normal(0, 1, (ROWS, outputs))
    targets = np.eye(outputs, dtype=bool)[logits.argmax(axis=1)] if softmax else logits > 0
    return csr_matrix(matrix), targets


def batch_of(matrix, targets, weights, dtype=np.float64):
    """Padded, so that all batches of so many rows are of one shape."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    columns = [matrix.indices.astype(np.int32), rows, matrix.data.astype(dtype)]
    padded = (np.pad(column, (0, 20 * matrix.shape[0] - len(column))) for column in columns)
    return Batch(*padded, targets.astype(dtype), weights.astype(dtype))


@pytest.mark.oracle
@pytest.mark.parametrize(('outputs', 'softmax'), [(2, False), (3, True)])
@pytest.mark.parametrize('balance', ['labels', 'none'])
def test_the_optimum_is_that_of_scikit_learn(outputs, softmax, balance):
    matrix, targets = problem(outputs, softmax)
    l2 = 3e-3
    weights = example_weights(targets, balance, softmax=softmax)
    with jax.enable_x64():
        batch = batch_of(matrix, targets, weights)
        config = LinearTraining(solver='lbfgs', l2=l2, tolerance=1e-10, steps=2000)
        fit = fit_at_once(config, batch, ROWS, BUCKETS, softmax=softmax)
        parameters = (fit.weights, fit.bias)
        loss = float(objective(parameters, batch, l2, ROWS, softmax=softmax))
    classes = [targets.argmax(axis=1)] if softmax else list(targets.T)
    theirs, their_loss = [], 0.0
    for i, column in enumerate(classes):
        class_weight = 'balanced' if balance == 'labels' else None
        # By Newton's method: scikit-learn's own L-BFGS ends some 1e-7 before the optimum.
        peer = LogisticRegression(C=1 / (l2 * ROWS), class_weight=class_weight, solver='newton-cholesky', tol=1e-10)
        peer.fit(matrix, column)
        probabilities = peer.predict_proba(matrix)
        each = weights[:, i]
        chosen = probabilities[np.arange(ROWS), column.astype(int)]
        their_loss += float(np.mean(-each * np.log(chosen)) + l2 / 2 * np.sum(peer.coef_**2))
        theirs.append(probabilities if softmax else probabilities[:, 1:])
    logits = matrix @ fit.weights + fit.bias
    ours = probabilities_of(logits, outputs, exclusive=softmax)
    np.testing.assert_allclose(ours, np.concatenate(theirs, axis=1), atol=1e-7)
    assert loss == pytest.approx(their_loss, rel=1e-11)
    assert fit.history[0]['largest_gradient'] <= 1e-10


@pytest.mark.parametrize('softmax', [False, True])
def test_gradients_are_what_differences_say(softmax):
    matrix, targets = problem(3, softmax)
    drawn = np.random.default_rng(1)
    with jax.enable_x64():
        batch = batch_of(matrix, targets, example_weights(targets, 'labels', softmax=softmax))
        point = (drawn.normal(0, 1, (BUCKETS, 3)), drawn.normal(0, 1, 3))
        jax.test_util.check_grads(
            lambda *p: objective(p, batch, 0.1, ROWS, softmax=softmax), point, order=1, modes=('rev',), rtol=1e-7
        )


@pytest.mark.parametrize('softmax', [False, True])
def test_balanced_labels_have_equal_weight(softmax):
    targets = np.zeros((10, 2), bool)
    targets[:, 1], targets[:2] = True, [True, False]
    weights = example_weights(targets, 'labels', softmax=softmax)
    assert weights.mean() == pytest.approx(1)
    for column in (0, 1):
        each = weights[:, 0 if softmax else column]
        assert each[targets[:, column]].sum() == pytest.approx(each[~targets[:, column]].sum())
    assert (example_weights(targets, 'none', softmax=softmax) == 1).all()


def fitted(config, matrix, targets, validation=True):
    weights = example_weights(targets, config.balance, softmax=False)

    def batch(which):
        return batch_of(matrix[which], targets[which], weights[which], np.float32)

    rows = np.arange(ROWS)
    training, held_out = (rows[:90], rows[90:]) if validation else (rows, rows[:0])
    return fit_batches(
        config,
        lambda some: batch(training[some]),
        len(training),
        lambda: iter([batch(held_out)]),
        len(held_out),
        BUCKETS,
        1,
        softmax=False,
    )


def test_adam_comes_to_the_optimum_gives_the_same_bits_and_stops_when_it_should():
    matrix, targets = problem(1, False)
    config = LinearTraining(l2=3e-3, epochs=40, batch_size=45, learning_rate=0.1, balance='none')
    fit = fitted(config, matrix, targets, validation=False)
    batch = batch_of(matrix, targets, np.ones((ROWS, 1)), np.float32)
    peer = LogisticRegression(C=1 / (3e-3 * ROWS), solver='newton-cholesky').fit(matrix, targets[:, 0])
    points = [(fit.weights, fit.bias), (np.float32(peer.coef_.T), np.float32(peer.intercept_))]
    losses = [float(objective(point, batch, 3e-3, ROWS, softmax=False)) for point in points]
    assert losses[1] <= losses[0] < losses[1] * 1.001
    again = fitted(config, matrix, targets, validation=False)
    assert again.weights.tobytes() == fit.weights.tobytes()

    free = LinearTraining(l2=0.0, epochs=60, batch_size=45, learning_rate=0.3, patience=3)
    early = fitted(free, matrix, targets)
    figures = [record['validation_loss'] for record in early.history]
    assert len(figures) < 60
    assert min(figures) == figures[-4] and all(later >= figures[-4] for later in figures[-3:])
    stopped = fitted(LinearTraining(l2=0.0, epochs=60, batch_size=45, learning_rate=0.3, patience=0), matrix, targets)
    assert len(stopped.history) == 60
    assert stopped.weights.tobytes() == early.weights.tobytes()  # of the best epoch


def test_mistakes_are_refused():
    for settings in ({'solver': 'sgd'}, {'balance': 'all'}, {'epochs': 0}, {'l2': -1.0}, {'learning_rate': 0.0}):
        with pytest.raises(UserError):
            LinearTraining(**settings)
    matrix, targets = problem(1, False)
    with pytest.raises(UserError, match='lower LEARNING_RATE'):
        fitted(LinearTraining(learning_rate=1e30, l2=1e30), matrix, targets)
