"""Contrastive training: texts that belong together get vectors that are alike, and unlike those of all other texts.

The loss is InfoNCE over in-batch negatives (van den Oord et al. 2018, eq. 4): of all second texts of the global batch,
which one belongs to this first text? Pairs of a text and itself, told apart by dropout alone, are unsupervised SimCSE
(Gao et al. 2021, eq. 1); pairs with hard negatives its supervised form (eq. 5).

A batch holds the arrays of rows of text once for each side: `inputs`, `positive_inputs` and maybe `negative_inputs`,
each with its `segment_ids` and `positions`; and `loss_weights`, whose sum over a row is 1, or 0 where the row is
padding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm.errors import UserError
from llm.models.encoder import Encoder
from llm.models.pooling import PoolingConfig, pool
from llm.parallel.sharding import constrain
from llm.training.layout import placed, token_order
from llm.training.parametrization import trained, with_trained
from llm.training.routing import routing_loss
from llm.training.step import Batch, Metrics, microbatches_of

SIDES = ('', 'positive_', 'negative_')


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """How vectors are made and compared.

    Attributes:
        temperature: similarities are divided by it.
        symmetric: whether the first text is also to be found by the second, among the first texts of the batch; the
            loss is then the mean of both.
        pooling: of the last states to a vector; similarities are cosines if it normalizes, and dot products if not.
    """

    temperature: float = 0.05
    symmetric: bool = False
    pooling: PoolingConfig = PoolingConfig('mean', normalize=True)

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(
                f'temperature is {self.temperature}', where='ContrastiveConfig', fix='Use a number above 0, as 0.05.'
            )


def _texts(batch: Batch) -> Batch:
    """What models read of the texts, in one array for all sides: [B, n, S] each."""
    sides = [side for side in SIDES if f'{side}inputs' in batch]
    names = ('inputs', 'segment_ids', 'positions', 'routing_weights')
    return {name: jnp.stack([batch[side + name] for side in sides], axis=1) for name in names if name in batch}


def _vectors(states: jax.Array, segment_ids: jax.Array, pooling: PoolingConfig) -> jax.Array:
    """[B, S, D] and [B, S], as `placed` has laid them out -> [B, D]."""
    real, order = segment_ids > 0, token_order(states.shape[1])
    if order is not None:  # the first and the last token are those of the text
        states, real = states[:, np.argsort(order)], real[:, np.argsort(order)]
    return pool(states, real, pooling)


def embed(
    model: nnx.GraphDef, parameters: Any, batch: Batch, dropout_key: jax.Array | None, pooling: PoolingConfig
) -> tuple[jax.Array, Any]:
    """The vectors of a batch of n sides that `placed` has laid out, [B, n, D], and the sums of routers."""
    texts = _texts(batch)
    sides = texts['inputs'].shape[1]
    arrays: dict[str, Any] = {
        # Sides lie beside each other, so that no row leaves its device and each has dropout of its own.
        name: constrain(x.reshape(-1, x.shape[2]), ('batch', 'sequence'))
        for name, x in texts.items()
    }
    arrays |= {'token_weights': arrays.pop('routing_weights', None), 'dropout_key': dropout_key}
    module = nnx.merge(model, parameters)
    states_of = module.encode_and_sums if isinstance(module, Encoder) else module.hidden_and_sums
    states, routing = states_of(**arrays, token_index=token_order(batch['inputs'].shape[1]))
    vectors = _vectors(states, arrays['segment_ids'], pooling)
    return constrain(vectors.reshape(-1, sides, vectors.shape[-1]), ('batch', None, 'embed')), routing


def contrastive_loss(
    vectors: jax.Array, weights: jax.Array, config: ContrastiveConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of a whole batch, on every mesh the same: each device compares its rows with those of all.

    Args:
        vectors: [B, n, D], a text, the one that belongs to it, and perhaps one that does not.
        weights: [B], 1, and 0 for rows that are padding, which are no one's negatives.

    Returns:
        (sum over rows, to be divided by the sum of weights; {'nll': the same, 'z_loss': 0, 'tokens': sum of weights}).
    """
    weights = weights.astype(vectors.dtype)

    def found(texts: jax.Array, others: jax.Array, belonging: jax.Array, present: jax.Array) -> jax.Array:
        # Gathered here, so that scores are cut up by row alone.
        others, present = constrain(others, (None, None)), constrain(present, (None,))
        scores = jnp.where(present > 0, jnp.einsum('BD,TD->BT', texts, others) / config.temperature, -jnp.inf)
        own = jnp.einsum('BD,BD->B', texts, belonging) / config.temperature
        return jnp.where(weights > 0, jax.nn.logsumexp(scores, axis=1) - own, 0)

    texts, positives = (constrain(vectors[:, side], ('batch', 'embed')) for side in (0, 1))
    candidates = jnp.concatenate([vectors[:, side] for side in range(1, vectors.shape[1])])
    losses = found(texts, candidates, positives, jnp.tile(weights, vectors.shape[1] - 1))
    if config.symmetric:
        losses = (losses + found(positives, vectors[:, 0], texts, weights)) / 2
    loss = jnp.sum(losses)
    return loss, {'nll': loss, 'z_loss': jnp.zeros_like(loss), 'tokens': jnp.sum(weights)}


def make_contrastive_gradients(
    model: nnx.GraphDef, config: ContrastiveConfig, specs: Any, microbatches: int
) -> Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]]:
    """(parameters, batch, key of the step) -> (gradients of the summed loss for what is trained, its sums).

    Microbatches are not batches of their own here, since a text's negatives are all of the batch. Gao et al. 2021,
    "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (GradCache), section 3.2: vectors of all
    microbatches first, the loss's gradient for them, and each microbatch once more for that of the parameters, with the
    same dropout. The price is a second forward pass.
    """

    def gradients(parameters: Any, batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
        part, weights = trained(parameters, specs), jnp.sum(batch['loss_weights'], axis=1)

        def vectors_of(part: Any, rows: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            return embed(model, with_trained(parameters, part), rows, key, config.pooling)

        if microbatches == 1:

            def whole(part: Any) -> tuple[jax.Array, Metrics]:
                vectors, routing = vectors_of(part, batch, key)
                loss, sums = contrastive_loss(vectors, weights, config)
                return loss + routing_loss(routing), sums | {'routing': routing}

            return jax.grad(whole, has_aux=True)(part)
        rows = {name: microbatches_of(x, microbatches, ('batch', 'sequence')) for name, x in batch.items()}
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(microbatches))
        vectors = jax.lax.map(lambda each: vectors_of(part, *each)[0], (rows, keys))
        joined = vectors.swapaxes(0, 1).reshape(-1, *vectors.shape[2:])
        joined = constrain(joined, ('batch', None, 'embed'))
        of_vectors, sums = jax.grad(lambda x: contrastive_loss(x, weights, config), has_aux=True)(joined)
        of_vectors = microbatches_of(of_vectors, microbatches, ('batch', None, 'embed'))

        def again(microbatch: Batch, key: jax.Array, cotangents: jax.Array) -> tuple[Any, Any]:
            def product(part: Any) -> tuple[jax.Array, Any]:
                vectors, routing = vectors_of(part, microbatch, key)
                return jnp.sum(vectors * cotangents) + routing_loss(routing), routing

            return jax.grad(product, has_aux=True)(part)

        def body(total: Any, each: tuple[Batch, jax.Array, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, again(*each)), None

        each = rows, keys, of_vectors
        shapes = jax.eval_shape(again, *jax.tree.map(lambda x: x[0], each))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        found, routing = jax.lax.scan(body, zero, each)[0]
        return found, sums | {'routing': routing}

    return gradients


# (states [B, S, D], rows) -> (loss, sums); (parameters, rows, key of the step) -> (gradients, sums).
LossOfStates = Callable[[jax.Array, Batch], tuple[jax.Array, Metrics]]
Pass = Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]]


def make_pipelined_contrastive_gradients(
    forward: Callable[[LossOfStates], Pass],
    backward: Callable[[LossOfStates], Pass],
    config: ContrastiveConfig,
    specs: Any,
    microbatches: int,
) -> Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]]:
    """What `make_contrastive_gradients` gives, with both of its passes through a pipeline.

    The first collects vectors as sums: each microbatch adds its own to zeros. The loss of the second is the inner
    product of vectors and the gradient for them.

    Args:
        forward, backward: a pipeline that gives sums alone, and one that gives gradients, of a loss like this.
    """

    def in_turn(x: jax.Array) -> jax.Array:
        """[B, n, ...] -> [B n, ...]: to a pipeline row r is of microbatch r mod M, and all sides are of its row's."""
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(1, 2).reshape(-1, *x.shape[2:])

    def gradients(parameters: Any, batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
        sides, texts = _texts(batch)['inputs'].shape[1], {name: in_turn(x) for name, x in _texts(batch).items()}
        count = len(texts['inputs'])

        def collected(states: jax.Array, rows: Batch) -> tuple[jax.Array, Metrics]:
            vectors = _vectors(states, rows['segment_ids'], config.pooling)
            every = jnp.zeros((count, vectors.shape[1]), vectors.dtype)
            return jnp.zeros((), vectors.dtype), {'vectors': every.at[rows['index']].set(vectors)}

        def product(states: jax.Array, rows: Batch) -> tuple[jax.Array, Metrics]:
            return jnp.sum(_vectors(states, rows['segment_ids'], config.pooling) * rows['cotangents']), {}

        vectors = forward(collected)(parameters, texts | {'index': jnp.arange(count)}, key)[1]['vectors']
        vectors = vectors.reshape(-1, sides, microbatches, vectors.shape[1]).swapaxes(1, 2)
        vectors = constrain(vectors.reshape(-1, sides, vectors.shape[3]), ('batch', None, 'embed'))
        weights = jnp.sum(batch['loss_weights'], axis=1)
        of_vectors, sums = jax.grad(lambda x: contrastive_loss(x, weights, config), has_aux=True)(vectors)
        found, more = backward(product)(parameters, texts | {'cotangents': in_turn(of_vectors)}, key)
        return trained(found, specs), sums | more

    return gradients


def make_contrastive_prediction(
    model: nnx.GraphDef, config: ContrastiveConfig
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """A pure function of (parameters, batch) to {'nll', 'tokens': as of a batch of training, 'predicted': vectors}."""

    def prediction(parameters: Any, batch: Batch) -> dict[str, jax.Array]:
        batch = placed(batch)
        vectors, _ = embed(model, parameters, batch, None, config.pooling)
        sums = contrastive_loss(vectors, jnp.sum(batch['loss_weights'], axis=1), config)[1]
        return {'nll': sums['nll'], 'tokens': sums['tokens'], 'predicted': vectors}

    return prediction
