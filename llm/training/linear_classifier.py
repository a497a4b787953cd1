"""Training linear classifiers of sparse features: cross-entropy with L2, by Adam on batches or L-BFGS on all at once.

The objective is the mean over examples of (weight times negative log-likelihood) + l2 / 2 * |weights|^2, the bias free:
scikit-learn's LogisticRegression with C = 1 / (l2 * examples).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm.errors import UserError

SOLVERS, BALANCES = ('adam', 'lbfgs'), ('labels', 'none')
_LBFGS_MEMORY = 10
# Features of all examples that L-BFGS may hold on the device: 12 bytes each.
_MOST_AT_ONCE = 200_000_000


@dataclasses.dataclass(frozen=True)
class LinearTraining:
    """How weights are found.

    Args:
        solver: 'adam' draws batches from disk, in another order each epoch, with a rate that falls to 0; 'lbfgs' holds
            all features at once and goes to the optimum.
        epochs: of Adam, at most. steps: of L-BFGS, at most.
        batch_size: examples of Adam's batches.
        learning_rate: Adam's first.
        l2: see the module.
        balance: 'labels' weighs examples so that each label (with independent labels: its presence and its absence) has
            as much weight in all; probabilities are then those among equally frequent labels. 'none' weighs all alike.
        patience: epochs in a row without a lower loss on validation data after which Adam stops; 0 goes to the end. The
            weights of the best epoch stay.
        tolerance: L-BFGS stops where no entry of the gradient is larger.
        seed: of the order of examples.
    """

    solver: str = 'adam'
    epochs: int = 10
    steps: int = 500
    batch_size: int = 128
    learning_rate: float = 0.05
    l2: float = 1e-6
    balance: str = 'labels'
    patience: int = 2
    tolerance: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS or self.balance not in BALANCES:
            raise UserError(
                f'solver {self.solver!r} with balance {self.balance!r} is not known',
                where='LinearTraining',
                fix=f'There are {", ".join(SOLVERS)}, and {", ".join(BALANCES)}.',
            )
        if min(self.epochs, self.steps, self.batch_size) < 1 or min(self.learning_rate, self.tolerance) <= 0:
            raise UserError(
                'epochs, steps, batch_size, learning_rate and tolerance must be positive', where='LinearTraining'
            )
        if self.l2 < 0 or self.patience < 0:
            raise UserError('l2 and patience must not be negative', where='LinearTraining')


class Batch(NamedTuple):
    """Examples with sparse features; padding has the value 0, and rows of it the weight 0.

    Shapes: indices, rows, values [N]; targets, weights [B, outputs], or weights [B, 1] with a softmax.
    """

    indices: Any
    rows: Any
    values: Any
    targets: Any
    weights: Any


# Weights [buckets, outputs] and bias [outputs].
Parameters = tuple[jax.Array, jax.Array]


def logits(parameters: Parameters, batch: Batch) -> jax.Array:
    """[B, outputs]."""
    weights, bias = parameters
    products = batch.values[:, None] * weights[batch.indices]
    return jax.ops.segment_sum(products, batch.rows, num_segments=batch.targets.shape[0]) + bias


def loss_sum(parameters: Parameters, batch: Batch, *, softmax: bool) -> jax.Array:
    """The weighted sum of the negative log-likelihood over the batch."""
    scores = logits(parameters, batch)
    if softmax:
        losses = optax.softmax_cross_entropy(scores, batch.targets)[:, None]
    else:
        losses = optax.sigmoid_binary_cross_entropy(scores, batch.targets)
    return jnp.sum(batch.weights * losses)


def objective(parameters: Parameters, batch: Batch, l2: float, count: Any, *, softmax: bool) -> jax.Array:
    """What is minimised, of a batch that stands for all; `count`: its examples."""
    penalty = 0.5 * l2 * jnp.sum(parameters[0] ** 2)
    return loss_sum(parameters, batch, softmax=softmax) / count + penalty


def example_weights(targets: np.ndarray, balance: str, *, softmax: bool) -> np.ndarray:
    """[n, outputs], or [n, 1] with a softmax, of mean 1: see LinearTraining.balance.

    Args:
        targets: bool [n, outputs]; each column of a sigmoid has both values.
    """
    n, outputs = targets.shape
    if balance == 'none':
        return np.ones((n, 1 if softmax else outputs), np.float32)
    share = targets.mean(axis=0)
    if softmax:
        result: np.ndarray = (1 / (outputs * share))[targets.argmax(axis=1)][:, None].astype(np.float32)
        return result
    return np.where(targets, 0.5 / share, 0.5 / (1 - share)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Trained parameters and how they came about.

    Attributes:
        weights: float32 [buckets, outputs]. bias: float32 [outputs]. history: a record for each epoch.
    """

    weights: np.ndarray
    bias: np.ndarray
    history: list[dict[str, float]]


_ADAM = optax.scale_by_adam()


@functools.partial(jax.jit, static_argnames=('softmax',), donate_argnums=(0, 1))
def _step(
    parameters: Parameters, state: Any, batch: Batch, l2: float, size: int, rate: Any, *, softmax: bool
) -> tuple[Parameters, Any, jax.Array]:
    """(parameters, state, objective before the step)."""
    value, gradient = jax.value_and_grad(objective)(parameters, batch, l2, size, softmax=softmax)
    updates, state = _ADAM.update(gradient, state)
    return jax.tree.map(lambda p, update: p - rate * update, parameters, updates), state, value


@functools.partial(jax.jit, static_argnames=('softmax',))
def _losses(parameters: Parameters, batch: Batch, softmax: bool) -> jax.Array:
    return loss_sum(parameters, batch, softmax=softmax)


def fit_batches(
    config: LinearTraining,
    training: Callable[[np.ndarray], Batch],
    count: int,
    validation: Callable[[], Iterator[Batch]],
    validation_count: int,
    buckets: int,
    outputs: int,
    *,
    softmax: bool,
    told: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Train by Adam.

    Args:
        training: the batch of some of the training examples, given their numbers below `count`.
        validation: all validation batches, anew at each call.
        buckets: of the weights: that many different features there are.
        told: gets a line after each epoch.

    Raises:
        UserError: the loss is not finite.
    """
    batches = -(-count // config.batch_size)
    schedule = optax.linear_schedule(config.learning_rate, 0.0, config.epochs * batches)
    parameters = (jnp.zeros((buckets, outputs)), jnp.zeros(outputs))
    state = _ADAM.init(parameters)
    best = Fit(np.zeros((buckets, outputs), np.float32), np.zeros(outputs, np.float32), [])
    history: list[dict[str, float]] = []
    best_loss, waited = np.inf, 0
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(count)
        total = 0.0
        for i, start in enumerate(range(0, count, config.batch_size)):
            some = order[start : start + config.batch_size]
            rate = schedule(epoch * batches + i)
            parameters, state, value = _step(
                parameters, state, training(some), config.l2, len(some), rate, softmax=softmax
            )
            total += float(value) * len(some)
        record = {'epoch': epoch + 1, 'loss': total / count}
        if validation_count:
            losses = [float(_losses(parameters, batch, softmax)) for batch in validation()]
            record['validation_loss'] = sum(losses) / validation_count
        if not np.isfinite(record['loss']):
            raise UserError(f'the loss is {record["loss"]} in epoch {epoch + 1}', fix='Set a lower LEARNING_RATE.')
        history.append(record)
        told(
            ', '.join(f'{name} {value:.4f}' if name != 'epoch' else f'epoch {value}' for name, value in record.items())
        )
        judged = record.get('validation_loss', -epoch)  # without validation data the last epoch is the best
        if judged < best_loss:
            best_loss, waited = judged, 0
            best = Fit(np.array(parameters[0]), np.array(parameters[1]), history)
        else:
            waited += 1
            if 0 < config.patience <= waited:
                break
    return best


def fit_at_once(config: LinearTraining, batch: Batch, count: int, buckets: int, *, softmax: bool) -> Fit:
    """Train by L-BFGS on all examples, in the type of the batch's values.

    Raises:
        UserError: there are too many features to hold.
    """
    if len(batch.values) > _MOST_AT_ONCE:
        raise UserError(f'{len(batch.values):,} features are more than lbfgs holds at once', fix="Set SOLVER = 'adam'.")
    outputs = batch.targets.shape[1]
    dtype = batch.values.dtype
    start = (jnp.zeros((buckets, outputs), dtype), jnp.zeros(outputs, dtype))
    parameters, steps, loss, gradient = _minimise(
        start, batch, config.l2, count, config.steps, config.tolerance, softmax=softmax
    )
    if not np.isfinite(float(loss)):
        raise UserError(f'the loss is {float(loss)}', where='lbfgs', fix='Set a larger L2.')
    record = {'steps': int(steps), 'loss': float(loss), 'largest_gradient': float(gradient)}
    return Fit(np.array(parameters[0]), np.array(parameters[1]), [record])


@functools.partial(jax.jit, static_argnames=('softmax',))
def _minimise(
    start: Parameters, batch: Batch, l2: float, count: int, most: int, tolerance: float, *, softmax: bool
) -> tuple[Parameters, Any, Any, Any]:
    """(parameters, steps, objective, largest entry of the gradient)."""
    optimizer = optax.lbfgs(memory_size=_LBFGS_MEMORY)

    def value_of(parameters: Parameters) -> jax.Array:
        return objective(parameters, batch, l2, count, softmax=softmax)

    value_and_gradient = optax.value_and_grad_from_state(value_of)

    def largest(state: Any) -> Any:
        return optax.tree.norm(optax.tree.get(state, 'grad'), ord=np.inf)

    def going(carried: tuple[Parameters, Any, Any]) -> Any:
        _, state, step = carried
        return (step == 0) | ((step < most) & (largest(state) > tolerance))

    def one(carried: tuple[Parameters, Any, Any]) -> tuple[Parameters, Any, Any]:
        parameters, state, step = carried
        value, gradient = value_and_gradient(parameters, state=state)
        updates, state = optimizer.update(gradient, state, parameters, value=value, grad=gradient, value_fn=value_of)
        return optax.apply_updates(parameters, updates), state, step + 1

    parameters, state, steps = jax.lax.while_loop(going, one, (start, optimizer.init(start), jnp.asarray(0)))
    return parameters, steps, optax.tree.get(state, 'value'), largest(state)
