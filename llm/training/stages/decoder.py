"""The decoder as stages of a pipeline."""

import functools
from typing import Any

import jax
from flax import nnx

from llm.models.context import Context
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.layer_stack import run_layers
from llm.parallel.pipeline.executor import Batch, Gather, Layers, Stages, Sums
from llm.training.losses import summed_loss
from llm.training.stages.model import StagedModel, remat_of, token_index_of


def staged_decoder(config: DecoderConfig, z_loss: float) -> StagedModel:
    """The functions of `config`'s decoder; `config.remat` is of a whole repeat of the layers.

    Raises:
        UserError: what `config.remat` keeps cannot be kept from tick to tick.
    """
    remat = remat_of(config.remat, config.remat_names, 'DecoderConfig.remat')
    decoder = Decoder(config)
    graph, abstract = nnx.split(decoder)
    graphs = {group: nnx.split(getattr(decoder, group))[0] for group, _, _ in config.groups()}
    starts = {group: first for group, _, first in config.groups()}
    unused = nnx.to_pure_dict(abstract)

    def merged(shared: Any) -> Decoder:
        return nnx.merge(graph, {**unused, **shared})

    def embed(shared: Any, rows: Batch, key: jax.Array | None) -> jax.Array:
        return merged(shared).embed(rows['inputs'], rows['positions'], key, token_index_of(rows['inputs']))

    def context(rows: Batch, key: jax.Array | None) -> Any:
        read = Context(
            rows['segment_ids'],
            decoder.rotary(rows['positions']),
            token_index=token_index_of(rows['segment_ids']),
            token_ids=rows['inputs'] if config.routed else None,
            token_weights=rows.get('routing_weights') if config.routed else None,
            global_keys=rows['prefix'] != 0 if 'prefix' in rows else None,
        )
        return read, key

    def run_once(layers: Any, x: jax.Array, first: jax.Array | int, context: Any) -> Layers:
        read, key = context
        x, _, sums, _ = run_layers(dict(layers.items()), x, read, repeats=1, first=first, dropout_key=key)
        losses = {position: each.pop('loss').sum() for position, each in sums.items()}
        return x, losses, sums

    def repeat(parameters: Any, x: jax.Array, index: jax.Array, context: Any) -> Layers:
        layers = nnx.merge(graphs['layers'], jax.tree.map(lambda p: p[None], parameters))
        x, losses, sums = run_once(layers, x, starts['layers'] + index * len(config.pattern), context)
        return x, losses, jax.tree.map(lambda s: s[0], sums)

    def outside(group: str, parameters: Any, x: jax.Array, context: Any) -> Layers:
        return run_once(nnx.merge(graphs[group], parameters), x, starts[group], context)

    def leading(parameters: Any, x: jax.Array, context: Any, gathered: Gather) -> Layers:
        return outside('leading', gathered(parameters['layers'], 'layers'), x, context)

    def loss(shared: Any, x: jax.Array, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, Sums]:
        del key
        model = merged(shared)
        return summed_loss(model.projection(), model.normalize(x), rows['targets'], rows['loss_weights'], z_loss)

    def parts(tree: Any) -> dict[str, Any]:
        groups = ('layers', 'leading', 'remainder')
        return {
            'layers': tree['layers'],
            'leading': {'layers': tree['leading']} if 'leading' in tree else {},
            'remainder': tree.get('remainder', {}),
            'ends': {name: value for name, value in tree.items() if name not in groups},
        }

    functions = Stages(embed, context, repeat, leading, functools.partial(outside, 'remainder'), loss, remat)
    return StagedModel(functions, config.repeats, parts, lambda sums: sums)
