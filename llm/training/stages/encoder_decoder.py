"""The encoder-decoder as stages of a pipeline, which have the decoder's layers.

The encoder's layers come before the first stage: all stages run them together, each some of the rows, and run them
again for the backward pass. What they make of a row goes from stage to stage beside the decoder's stream, so that the
gradient of every layer's attention to it adds up on the way back.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm.models.context import Context
from llm.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from llm.parallel.pipeline.outside import gathering_again, run_repeats
from llm.parallel.pipeline.stages import Batch, Gather, Layers, Stages, Sums
from llm.parallel.sharding import constrain, names, rules_in_force
from llm.training.losses import summed_loss
from llm.training.stages.model import StagedModel, completed, remat_of, token_index_of
from llm.training.stages.stack import StagedStack


def _pieces(*lengths: int) -> int:
    """Into how many pieces rows of these lengths are cut between layers."""
    current = rules_in_force()
    if current is None:
        return 1
    mesh, rules = current
    axes = names(rules.partition(('residual',), mesh, parameters=False)[0])
    while any(length % math.prod(mesh.shape[axis] for axis in axes) for length in lengths):
        axes = axes[:-1]
    return math.prod(mesh.shape[axis] for axis in axes)


def _side_by_side(memory: jax.Array, stream: jax.Array) -> jax.Array:
    """[B, T, D] and [B, S, D] -> [B, n, (T + S) / n, D]: each of the n pieces of a row has its part of both.

    So devices that share rows send each other nothing, which one stage could not do while others do something else.
    """
    (batch, length, width), (_, other, _) = memory.shape, stream.shape
    count = _pieces(length, other)
    parts = (memory.reshape(batch, count, length // count, width), stream.reshape(batch, count, other // count, width))
    return constrain(jnp.concatenate(parts, axis=2), ('batch', 'residual', None, 'embed'))


def _apart(x: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The inverse of `_side_by_side`, for a memory of T = `length`."""
    cut = length // x.shape[1]

    def rows(part: jax.Array) -> jax.Array:
        return constrain(part.reshape(x.shape[0], -1, x.shape[3]), ('batch', 'residual', 'embed'))

    return rows(x[:, :, :cut]), rows(x[:, :, cut:])


def staged_encoder_decoder(config: EncoderDecoderConfig, z_loss: float) -> StagedModel:
    """The functions of `config`'s encoder-decoder; remat is of a whole repeat of the layers of either side.

    Raises:
        UserError: what StackConfig.remat of the decoder keeps cannot be kept from tick to tick.
    """
    remat, encoder_remat = (
        remat_of(each.remat, each.remat_names, 'StackConfig.remat') for each in (config.decoder, config.encoder)
    )
    module = EncoderDecoder(config)
    graph, abstract = nnx.split(module)
    unused = nnx.to_pure_dict(abstract)
    encoder = StagedStack(module.encoder, axis='remainder')
    decoder = StagedStack(module.decoder, config.encoder.num_layers)
    dtype = jnp.dtype(config.compute_dtype)

    def merged(shared: Any) -> EncoderDecoder:
        return nnx.merge(graph, completed(unused, shared))

    def embed(shared: Any, rows: Batch, key: jax.Array | None) -> jax.Array:
        model, inputs, encoder_inputs = merged(shared), rows['inputs'], rows['encoder_inputs']
        memory = model.embed(encoder_inputs, 0, key, token_index_of(encoder_inputs))
        return _side_by_side(memory, model.embed(inputs, 1, key, token_index_of(inputs)))

    def side(rows: Batch, name: str, stack: StagedStack) -> Context:
        routed = stack.stack.config.routed
        read = Context(
            rows[f'{name}segment_ids'],
            token_index=token_index_of(rows[f'{name}segment_ids']),
            token_ids=rows[f'{name}inputs'] if routed else None,
            token_weights=rows.get(f'{name}routing_weights') if routed else None,
            memory_segment_ids=None if name else rows['encoder_segment_ids'],
        )
        return stack.context(rows[f'{name}positions'], read, dtype)

    def context(rows: Batch, key: jax.Array | None) -> Any:
        return side(rows, 'encoder_', encoder), side(rows, '', decoder), key

    def repeat(parameters: Any, x: jax.Array, index: jax.Array, context: Any) -> Layers:
        encoded, read, key = context
        memory, stream = _apart(x, encoded.segment_ids.shape[1])
        read = dataclasses.replace(read, memory=memory)
        stream, losses, sums = decoder.repeat(parameters, stream, index, read, key)
        return _side_by_side(memory, stream), losses, sums

    def remainder(parameters: Any, x: jax.Array, context: Any) -> Layers:
        encoded, read, key = context
        memory, stream = _apart(x, encoded.segment_ids.shape[1])
        stream, losses, sums = decoder.remainder(parameters, stream, dataclasses.replace(read, memory=memory), key)
        return _side_by_side(memory, stream), losses, sums

    def leading(parameters: Any, x: jax.Array, context: Any, gathered: Gather) -> Layers:
        read, _, key = context
        memory, stream = _apart(x, read.segment_ids.shape[1])
        losses, sums = {}, {}

        def repeat(parameters: Any, x: jax.Array, index: jax.Array) -> Layers:
            return encoder.repeat(gathered(parameters, 'layers', of_one=True), x, index, read, key)

        @gathering_again(encoder_remat)
        def remainder(parameters: Any, x: jax.Array) -> Layers:
            return encoder.remainder(gathered(parameters, 'remainder'), x, read, key)

        if layers := parameters['layers']:
            memory, losses['layers'], sums['layers'] = run_repeats(repeat, layers, memory, 0, encoder_remat)
        if layers := parameters['remainder']:
            memory, losses['remainder'], sums['remainder'] = remainder(layers, memory)
        memory = encoder.normalize(gathered(parameters['rest'], 'rest'), memory)
        return _side_by_side(memory, stream), losses, {f'encoder/{group}': each for group, each in sums.items() if each}

    def loss(shared: Any, x: jax.Array, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, Sums]:
        del key
        model = merged(shared)
        hidden = model.decoder.normalize(_apart(x, rows['encoder_inputs'].shape[1])[1])
        return summed_loss(model.projection(), hidden, rows['targets'], rows['loss_weights'], z_loss)

    def parts(tree: Any) -> dict[str, Any]:
        before = dict(zip(('layers', 'remainder', 'rest'), encoder.parts(tree['encoder']), strict=True))
        layers, remainder, rest = decoder.parts(tree['decoder'])
        ends = {name: value for name, value in tree.items() if name != 'encoder'}
        return {'layers': layers, 'leading': before, 'remainder': remainder, 'ends': {**ends, 'decoder': rest}}

    def routing(sums: dict[str, Any]) -> dict[str, Any]:
        own = {f'decoder/{group}': sums[group] for group in ('layers', 'remainder') if group in sums}
        return {**sums.get('leading', {}), **own}

    return StagedModel(
        Stages(embed, context, repeat, leading, remainder, loss, remat), config.decoder.repeats, parts, routing
    )
