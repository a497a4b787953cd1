"""The encoder as stages of a pipeline: the same layers, and a loss of some tokens, or of what heads say of them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm.models.context import Context
from llm.models.encoder import Encoder, EncoderConfig
from llm.parallel.pipeline.stages import Batch, Layers, Stages, Sums
from llm.training.losses import summed_loss
from llm.training.sentence_pairs import summed_pairs
from llm.training.stages.model import StagedModel, completed, remat_of, token_index_of
from llm.training.stages.stack import StagedStack


def staged_encoder(config: EncoderConfig, z_loss: float) -> StagedModel:
    """The functions of `config`'s encoder; remat is of a whole repeat of the layers.

    Raises:
        UserError: what StackConfig.remat keeps cannot be kept from tick to tick.
    """
    remat = remat_of(config.layers.remat, config.layers.remat_names, 'StackConfig.remat')
    encoder = Encoder(config)
    graph, abstract = nnx.split(encoder)
    unused = nnx.to_pure_dict(abstract)
    stack, dtype = StagedStack(encoder.encoder), jnp.dtype(config.compute_dtype)

    def merged(shared: Any) -> Encoder:
        return nnx.merge(graph, completed(unused, shared))

    def embed(shared: Any, rows: Batch, key: jax.Array | None) -> jax.Array:
        inputs = rows['inputs']
        return merged(shared).embed(inputs, rows['positions'], rows.get('token_types'), key, token_index_of(inputs))

    def context(rows: Batch, key: jax.Array | None) -> Any:
        segment_ids, routed = rows['segment_ids'], config.layers.routed
        read = Context(
            segment_ids,
            token_index=token_index_of(segment_ids),
            token_ids=rows['inputs'] if routed else None,
            token_weights=rows.get('routing_weights') if routed else None,
            global_tokens=encoder.global_tokens(rows.get('global_tokens'), segment_ids, segment_ids),
        )
        return stack.context(rows['positions'], read, dtype), key

    def repeat(parameters: Any, x: jax.Array, index: jax.Array, context: Any) -> Layers:
        return stack.repeat(parameters, x, index, *context)

    def remainder(parameters: Any, x: jax.Array, context: Any) -> Layers:
        return stack.remainder(parameters, x, *context)

    def loss(shared: Any, x: jax.Array, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, Sums]:
        model = merged(shared)
        states = model.encoder.normalize(x)
        index = token_index_of(rows['inputs'])
        hidden = model.transformed(states, rows.get('predicted'), token_index=index, dropout_key=key)
        loss, sums = summed_loss(model.projection(), hidden, rows['targets'], rows['loss_weights'], z_loss)
        if 'next_sentence' not in rows:
            return loss, sums
        of_pairs, pairs = summed_pairs(model.next_sentence_logits(states), rows)
        return loss + of_pairs, sums | {'pairs': pairs}

    def parts(tree: Any) -> dict[str, Any]:
        layers, remainder, rest = stack.parts(tree['encoder'])
        return {'layers': layers, 'leading': {}, 'remainder': remainder, 'ends': {**tree, 'encoder': rest}}

    def states(shared: Any, x: jax.Array) -> jax.Array:
        return merged(shared).encoder.normalize(x)

    functions = Stages(embed, context, repeat, None, remainder, loss, remat, states)
    return StagedModel(functions, config.layers.repeats, parts, lambda sums: sums)
