"""The training step and the evaluation step, as pure functions of (state, batch)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llm.errors import UserError
from llm.models.multi_token import MultiTokenConfig
from llm.parallel.sharding import Axes, constrain
from llm.training.layout import placed, token_order
from llm.training.losses import summed_loss
from llm.training.multi_token import (
    depth_metrics,
    depths_of,
    is_of_depths,
    summed_losses,
    weighted_depths,
    with_targets_ahead,
)
from llm.training.optimizers import optimized
from llm.training.parametrization import trained, with_trained
from llm.training.routing import routing_loss, routing_metrics, with_routing_weights
from llm.training.sentence_pairs import pair_metrics, summed_pairs, with_pair_weights

# {'parameters': nested dict, 'optimizer': optax state, 'step': int32 []} and, of models that have one, 'memory', a
# nested dict: what each row of the next batch goes on from.
State = dict[str, Any]
# targets and loss_weights, [B, S]; and what the model's `hidden` reads, of a decoder: inputs, segment_ids, positions.
# Arrays of the encoder's side of an encoder-decoder have another length.
Batch = dict[str, jax.Array]
Metrics = dict[str, Any]  # sums or means by name; sums of routers are a tree under 'routing'


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What one step computes.

    Attributes:
        batch_size: rows of the global batch. sequence_length: tokens per row.
        gradient_accumulation: microbatches that the batch is cut into, one after the other or in a pipeline; does not
            change the loss or the gradient.
        z_loss: coefficient of log_z ** 2; see `llm.training.losses`.
        seed: of initial parameters and dropout.
    """

    batch_size: int
    sequence_length: int
    gradient_accumulation: int = 1
    z_loss: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.sequence_length < 1 or self.gradient_accumulation < 1:
            raise UserError(
                'batch_size, sequence_length and gradient_accumulation must be positive', where='StepConfig'
            )
        if self.batch_size % self.gradient_accumulation:
            raise UserError(
                f'a batch of {self.batch_size} rows cannot be cut into {self.gradient_accumulation} microbatches',
                where='StepConfig.gradient_accumulation',
                fix='Make gradient_accumulation divide batch_size.',
            )


def microbatches_of(x: jax.Array, count: int, axes: Axes) -> jax.Array:
    """An array of a batch in microbatches: [B, ...] with these logical axes -> [count, B / count, ...].

    Row r goes to microbatch r mod count, so that each device cuts up the rows that it already holds.
    """
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return constrain(x, (None, *axes))


def _memory_in_microbatches(memory: Any, count: int) -> Any:
    """Of every array, [repeats, B, M, D] -> [count, repeats, B / count, M, D]: that of the rows of each microbatch."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, count, *x.shape[2:]), 2, 0)

    return jax.tree.map(one, memory)


def _memory_of_microbatches(memory: Any) -> Any:
    """The inverse of `_memory_in_microbatches`."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])

    return jax.tree.map(one, memory)


def _read_by_model(batch: Batch, dropout_key: jax.Array | None) -> dict[str, Any]:
    """What `hidden` of the model takes, of what is in a batch."""
    own = (
        *('targets', 'loss_weights', 'next_sentence', 'pair_weights', 'memory'),
        *('routing_weights', 'encoder_routing_weights'),
    )
    arrays: dict[str, Any] = {name: x for name, x in batch.items() if name not in own and not is_of_depths(name)}
    targets, _ = depths_of(batch)
    if len(targets) > 1:
        arrays['tokens_ahead'] = targets[:-1]
    orders: dict[str, Any] = {'token_index': token_order(batch['inputs'].shape[1])}
    if 'encoder_inputs' in batch:
        orders['encoder_token_index'] = token_order(batch['encoder_inputs'].shape[1])
    if 'encoder_routing_weights' in batch:
        orders['encoder_token_weights'] = batch['encoder_routing_weights']
    return arrays | {**orders, 'dropout_key': dropout_key, 'token_weights': batch.get('routing_weights')}


def _summed_loss(
    model: nnx.GraphDef, parameters: Any, batch: Batch, dropout_key: jax.Array | None, z_loss: float
) -> tuple[jax.Array, Metrics]:
    module = nnx.merge(model, parameters)
    arrays = _read_by_model(batch, dropout_key)
    routing: Any = {}
    memory: Any = None
    pairs: tuple[Any, Metrics] | None = None
    if 'next_sentence' in batch:
        hidden, pair_logits, routing = module.hidden_and_pair_logits(**arrays)
        pairs = summed_pairs(pair_logits, batch)
    elif 'memory' in batch:
        hidden, routing, memory = module.hidden_sums_and_memory(memory=batch['memory'], **arrays)
    else:
        hidden, routing = module.hidden_and_sums(**arrays)
    targets, weights = depths_of(batch)
    if len(targets) > 1:
        loss, sums = summed_losses(module.projection(), hidden, targets, weights, z_loss)
    else:
        loss, sums = summed_loss(module.projection(), hidden, targets[0], weights[0], z_loss)
    if pairs is not None:
        loss, sums = loss + pairs[0], sums | {'pairs': pairs[1]}
    if memory is not None:
        sums = sums | {'memory': memory}
    return (loss + routing_loss(routing), sums | {'routing': routing}) if routing else (loss, sums)


def make_train_step(
    model: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: StepConfig,
    specs: Any,
    gradients_of_sums: Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]] | None = None,
    multi_token: MultiTokenConfig | None = None,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The pure training step.

    Args:
        optimizer: of the parameters that are trained.
        specs: nested dict of ParameterSpec, which says which ones are.
        gradients_of_sums: (parameters, batch, key of the step) -> (gradients of the summed loss for what is trained,
            its sums) in place of accumulation over microbatches one after the other: a pipeline, or another loss.
        multi_token: of the model, if it is a decoder that has it.

    Gradients and losses are summed over tokens in every microbatch and divided once by the batch's number of real
    tokens, so padding, accumulation and sharding change neither. A row keeps its dropout mask under accumulation only
    as far as microbatches are drawn apart: masks depend on (seed, step, microbatch, layer) and position.

    Metrics, all fp32 scalars: loss (mean nll in nats), z_loss, gradient_norm (before clipping), learning_rate, tokens;
    with layers of experts those of `routing_metrics`, with multi-token prediction those of `depth_metrics`,
    with pairs of texts those of `pair_metrics`.
    """
    microbatches = config.gradient_accumulation

    def gradient_of_sum(parameters: Any, batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
        def summed(part: Any) -> tuple[jax.Array, Metrics]:
            return _summed_loss(model, with_trained(parameters, part), batch, key, config.z_loss)

        return jax.grad(summed, has_aux=True)(trained(parameters, specs))

    def accumulated(parameters: Any, batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
        if microbatches == 1:
            return gradient_of_sum(parameters, batch, key)

        memory = _memory_in_microbatches(batch.get('memory', {}), microbatches)

        def microbatch(index: jax.Array, rows: Batch, memory: Any) -> tuple[tuple[Any, Metrics], Any]:
            given = rows | ({'memory': memory} if memory else {})
            gradients, sums = gradient_of_sum(parameters, given, jax.random.fold_in(key, index))
            return (gradients, sums), sums.pop('memory', {})

        def body(total: Any, part: tuple[jax.Array, Batch, Any]) -> tuple[Any, Any]:
            found, memory = microbatch(*part)
            return jax.tree.map(jnp.add, total, found), memory

        rows = {
            name: microbatches_of(x, microbatches, ('batch', 'sequence'))
            for name, x in batch.items()
            if name != 'memory'
        }
        parts = jnp.arange(microbatches), rows, memory
        shapes, _ = jax.eval_shape(microbatch, *jax.tree.map(lambda x: x[0], parts))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (gradients, sums), memory = jax.lax.scan(body, zero, parts)
        return gradients, sums | ({'memory': _memory_of_microbatches(memory)} if memory else {})

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        batch = weighted_depths(placed(with_targets_ahead(batch, multi_token)), multi_token)
        batch = with_pair_weights(with_routing_weights(batch))
        if 'memory' in state:
            batch = batch | {'memory': state['memory']}
        key = jax.random.fold_in(jax.random.key(config.seed), state['step'])
        gradients, sums = (gradients_of_sums or accumulated)(state['parameters'], batch, key)
        tokens = jnp.maximum(sums['tokens'], 1)
        gradients = jax.tree.map(lambda g: g / tokens, gradients)
        part = trained(state['parameters'], specs)
        updates, optimizer_state = optimizer.update(gradients, state['optimizer'], part)
        metrics = {
            'loss': sums['nll'] / tokens,
            'z_loss': sums['z_loss'] / tokens,
            'gradient_norm': optax.tree.norm(optimized(trained(specs, specs), gradients)),
            'learning_rate': schedule(state['step']),
            'tokens': sums['tokens'],
            **routing_metrics(sums.get('routing', {}), tokens),
            **depth_metrics(sums),
            **pair_metrics(sums),
        }
        new_state = {
            'parameters': with_trained(state['parameters'], optax.apply_updates(part, updates)),
            'optimizer': optimizer_state,
            'step': state['step'] + 1,
        }
        if 'memory' in state:
            new_state['memory'] = sums['memory']
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return train_step


def make_evaluation_step(
    model: nnx.GraphDef,
    sums_of: Callable[[Any, Batch, None], tuple[Any, Metrics]] | None = None,
    multi_token: MultiTokenConfig | None = None,
) -> Callable[[Any, Batch], Metrics]:
    """A pure function of (parameters, batch) to {'nll': summed nats, 'tokens': summed weights} over the batch.

    With multi-token prediction also 'ahead', the same of the further depths, [depths] each; with pairs of texts
    'pairs', see `summed_pairs`; with layers of experts 'routing', see `routing_metrics`.
    Given a memory too, what rows go on from, the sums have the next one as 'memory'.

    Args:
        sums_of: (parameters, batch, no key) -> (anything, sums), in place of the model on one device: a pipeline.
    """

    def evaluation_step(parameters: Any, batch: Batch, memory: Any = None) -> Metrics:
        batch = with_routing_weights(placed(with_targets_ahead(batch, multi_token)))
        if memory is not None:
            batch = batch | {'memory': memory}
        if sums_of is not None:
            sums = sums_of(parameters, batch, None)[1]
        else:
            sums = _summed_loss(model, parameters, batch, None, 0.0)[1]
        kept = ('nll', 'tokens', 'routing', 'ahead', 'pairs', 'memory')
        return {name: sums[name] for name in kept if name in sums}

    return evaluation_step


def make_prediction_step(model: nnx.GraphDef) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """A pure function of (parameters, batch) to what `make_evaluation_step`'s gives, and in the same pass 'predicted':
    what the model says of each token, [B, S, outputs], for models of few outputs."""

    def prediction_step(parameters: Any, batch: Batch) -> dict[str, jax.Array]:
        batch = placed(batch)
        module = nnx.merge(model, parameters)
        hidden, projection = module.hidden(**_read_by_model(batch, None)), module.projection()
        sums = summed_loss(projection, hidden, batch['targets'], batch['loss_weights'])[1]
        predicted, order = projection(hidden), token_order(batch['inputs'].shape[1])
        if order is not None:
            predicted = predicted[:, np.argsort(order)]
        return {'nll': sums['nll'], 'tokens': sums['tokens'], 'predicted': predicted}

    return prediction_step
