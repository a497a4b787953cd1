"""Coordinate check: how far activations move in a few steps, by width. Flat under muP; growing otherwise.

Yang et al. 2022, "Tensor Programs V", appendix D.1: if a parametrization is right, the typical size of the change of
every activation after t steps depends on t but not on width, as width grows.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm.models.decoder import Decoder, DecoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.model import ModelConfig
from llm.training.optimizers import OptimizerConfig
from llm.training.step import Batch, StepConfig
from llm.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Coordinate:
    """Root mean square of the change of one activation since initialisation.

    Attributes:
        width: d_model. step: updates done.
        activation: 'embedding', 'layer 1', ... (of an encoder-decoder 'encoder layer 1', ..., 'decoder layer 1', ...),
            '2 ahead' and '2 ahead, target logits' of multi-token prediction, 'logits' or 'target logits', those of the
            tokens that come or are to be found. With tied embeddings the change of other logits is mostly chance
            overlap of random vectors, which fades with width.
    """

    width: int
    step: int
    activation: str
    change: float


def check_coordinates(
    model: ModelConfig, optimizer: OptimizerConfig, step: StepConfig, widths: Sequence[int], steps: int
) -> list[Coordinate]:
    """Train `model` at each width for `steps` steps on one random batch and measure every activation's change.

    Args:
        model: with a pattern of one layer; its own width is of no matter, except that mup_base_width is kept.
        step: batch size, sequence length and seed.
    """
    tokens = np.random.default_rng(step.seed).integers(
        0, model.vocab_size, (step.batch_size, step.sequence_length + 1), dtype=np.int32
    )
    ones = jnp.ones((step.batch_size, step.sequence_length), jnp.int32)
    positions = jnp.tile(jnp.arange(step.sequence_length, dtype=jnp.int32), (step.batch_size, 1))
    batch: Batch = {
        'inputs': jnp.asarray(tokens[:, :-1]),
        'targets': jnp.asarray(tokens[:, 1:]),
        'loss_weights': jnp.ones_like(ones, jnp.float32),
        'segment_ids': ones,
        'positions': positions,
    }
    if isinstance(model, EncoderDecoderConfig):
        batch |= {
            'encoder_inputs': batch['targets'][:, ::-1],
            'encoder_segment_ids': ones,
            'encoder_positions': positions,
        }
    coordinates = []
    for width in widths:
        trainer = Trainer(model.at_width(width), optimizer, step, steps, devices=jax.devices()[:1])
        state = trainer.fresh_state()
        activations = jax.jit(lambda parameters, config=trainer.model_config: _activations(config, parameters, batch))
        before = activations(state['parameters'])
        for number in range(1, steps + 1):
            state, _ = trainer.train_step(state, batch)
            for name, value in activations(state['parameters']).items():
                change = float(jnp.sqrt(jnp.mean(jnp.square(value - before[name]))))
                coordinates.append(Coordinate(width, number, name, change))
    return coordinates


def _activations(config: ModelConfig, parameters: Any, batch: Batch) -> dict[str, jax.Array]:
    """The residual stream after the embedding and after each layer, from models cut off there, and the logits."""
    activations = {'embedding': parameters['embedding']['table'][batch['inputs']]}
    if isinstance(config, DecoderConfig):
        activations |= _decoder_layers(config, parameters, batch)
    elif isinstance(config, EncoderDecoderConfig):
        for side in ('encoder', 'decoder'):
            for depth in range(1, getattr(config, side).num_layers + 1):
                model = _cut(config, parameters, side, side, depth)
                arrays = _arrays(batch)
                if side == 'encoder':
                    x = model.encode(arrays['encoder_inputs'], positions=arrays['encoder_positions'])
                else:
                    x = model.hidden(**arrays)
                activations[f'{side} layer {depth}'] = x
    else:
        for depth in range(1, config.layers.num_layers + 1):
            model = _cut(config, parameters, 'layers', 'encoder', depth)
            activations[f'layer {depth}'] = model.encode(batch['inputs'], positions=batch['positions'])
    logits = nnx.merge(nnx.split(config.build())[0], parameters)(**_arrays(batch))
    targets = jnp.take_along_axis(logits, batch['targets'][..., None], axis=-1)
    return activations | {'logits': logits, 'target logits': targets}


def _arrays(batch: Batch) -> Batch:
    """What a model reads; rows are whole segments."""
    return {name: x for name, x in batch.items() if name.endswith(('inputs', 'positions'))}


def _cut(config: Any, parameters: Any, field: str, side: str, depth: int) -> Any:
    """The model with so many layers in one stack, `field` of its config and `side` of its parameters."""
    stack = dataclasses.replace(getattr(config, field), num_layers=depth, final_norm=None)
    own = {name: x for name, x in parameters[side].items() if name != 'final_norm'}
    own['layers'] = jax.tree.map(lambda x: x[:depth], own['layers'])
    cut = dataclasses.replace(config, **{field: stack})
    return nnx.merge(nnx.split(cut.build())[0], {**parameters, side: own})


def _decoder_layers(config: DecoderConfig, parameters: Any, batch: Batch) -> dict[str, jax.Array]:
    activations = {}
    for depth in range(1, config.num_layers + 1):
        cut = dataclasses.replace(config, num_layers=depth, final_norm=None, tied_embeddings=True, multi_token=None)
        some = {
            'embedding': parameters['embedding'],
            'layers': jax.tree.map(lambda x, depth=depth: x[:depth], parameters['layers']),
        }
        if 'positions' in parameters:
            some['positions'] = parameters['positions']
        decoder = nnx.merge(nnx.split(Decoder(cut))[0], some)
        activations[f'layer {depth}'] = decoder.hidden(batch['inputs'], positions=batch['positions'])
    if config.multi_token is not None:
        whole = nnx.merge(nnx.split(Decoder(config))[0], parameters)
        depths, length = config.multi_token.depths, batch['inputs'].shape[1]
        ahead = [jnp.roll(batch['targets'], -depth, axis=1) for depth in range(depths + 1)]
        states, _ = whole.hidden_and_sums(batch['inputs'], positions=batch['positions'], tokens_ahead=ahead[:-1])
        for depth in range(1, depths + 1):
            known = states[:, depth, : length - depth]  # of which the token is in the row
            of_targets = jnp.take_along_axis(whole.logits(known), ahead[depth][:, : length - depth, None], axis=-1)
            activations |= {f'{depth + 1} ahead': known, f'{depth + 1} ahead, target logits': of_targets}
    return activations


def slopes(coordinates: Sequence[Coordinate], step: int) -> dict[str, float]:
    """Per activation, the least-squares slope of log2(change) over log2(width) after `step` steps.

    0 is a size of change that does not depend on width; 1 doubles it with the width. NaN where fewer than two widths
    have changed: under an output projection that starts at zero, only the logits do in the first step.
    """
    found = {}
    for name in dict.fromkeys(coordinate.activation for coordinate in coordinates):
        points = [(c.width, c.change) for c in coordinates if (c.activation, c.step) == (name, step) and c.change > 0]
        x, y = (np.log2([point[i] for point in points]) for i in (0, 1))
        found[name] = float(np.polyfit(x, y, 1)[0]) if len(points) > 1 else math.nan
    return found
