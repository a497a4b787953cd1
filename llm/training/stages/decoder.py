"""The decoder as stages of a pipeline."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llm.models.context import Context
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.layer_stack import run_layers
from llm.models.multi_token import run_head
from llm.parallel.pipeline.stages import MEMORY, Batch, Gather, Gathering, Layers, Stages, Sums
from llm.training.losses import summed_loss
from llm.training.multi_token import depths_of, summed_losses
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
    further = config.multi_token
    trunk = further is not None and further.kind == 'parallel'
    graph_of_heads = nnx.split(decoder.multi_token)[0]

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
            before=rows['positions'][:, 0] if config.memory_length else None,
        )
        return read, key

    def run_once(layers: Any, x: jax.Array, first: jax.Array | int, context: Any, memory: Any) -> Layers:
        read, key = context
        x, memory, sums, before_last = run_layers(
            dict(layers.items()), x, read, repeats=1, first=first, dropout_key=key, cache=memory, trunk=trunk
        )
        losses = {position: each.pop('loss').sum() for position, each in sums.items()}
        return (x, before_last) if trunk else x, losses, sums if memory is None else {**sums, MEMORY: memory}

    def repeat(parameters: Any, x: jax.Array, index: jax.Array, context: Any, memory: Any = None) -> Layers:
        layers = nnx.merge(graphs['layers'], jax.tree.map(lambda p: p[None], parameters))
        memory = jax.tree.map(lambda m: m[None], memory)
        x, losses, sums = run_once(layers, x, starts['layers'] + index * len(config.pattern), context, memory)
        return x, losses, jax.tree.map(lambda s: s[0], sums)

    def outside(group: str, parameters: Any, x: jax.Array, context: Any, memory: Any = None) -> Layers:
        return run_once(nnx.merge(graphs[group], parameters), x, starts[group], context, memory)

    def leading(parameters: Any, x: jax.Array, context: Any, gathered: Gather, memory: Any = None) -> Layers:
        x, losses, sums = outside('leading', gathered(parameters['layers'], 'layers'), x, context, memory)
        return (x[0] if trunk else x), losses, sums

    def ahead(shared: Any, rows: Batch) -> Batch:
        model, dtype = merged(shared), jnp.dtype(config.compute_dtype)
        return {f'embedded_{depth}': model.embedding(ids, dtype) for depth, ids in enumerate(depths_of(rows)[0][:-1])}

    def multi_token(shared: Any, parameters: Any, x: Any, rows: Batch, context: Any, gathering: Gathering) -> Layers:
        def run(head: Any, source: Any, context: Context, key: jax.Array | None) -> Any:
            kind, parts = nnx.split(head)
            whole = gathering(lambda whole, source, key: run_head(nnx.merge(kind, whole), source, context, key))
            return whole(nnx.to_pure_dict(parts), source, key)

        assert further is not None
        model, heads = merged(shared), nnx.merge(graph_of_heads, {'heads': parameters})
        assert heads is not None
        x, read = x if trunk else (x, x)
        states, sums = heads(
            read,
            model.normalize(x),
            [] if trunk else [rows[f'embedded_{depth}'] for depth in range(further.depths)],
            context[0],
            embed=lambda embedded: embedded,
            normalize=model.normalize,
            dropout_keys=model.further_keys(context[1]),
            run=run,
        )
        losses = {depth: each.pop('loss').sum() for depth, each in sums.items()}
        return states, losses, sums

    def loss(shared: Any, x: jax.Array, rows: Batch, key: jax.Array | None) -> tuple[jax.Array, Sums]:
        del key
        model = merged(shared)
        if further is not None:
            return summed_losses(model.projection(), x, *depths_of(rows), z_loss)
        return summed_loss(model.projection(), model.normalize(x), rows['targets'], rows['loss_weights'], z_loss)

    def states(shared: Any, x: jax.Array) -> jax.Array:
        return merged(shared).normalize(x)

    def parts(tree: Any) -> dict[str, Any]:
        groups = ('layers', 'leading', 'remainder', 'multi_token')
        found = {
            'layers': tree['layers'],
            'leading': {'layers': tree['leading']} if 'leading' in tree else {},
            'remainder': tree.get('remainder', {}),
            'ends': {name: value for name, value in tree.items() if name not in groups},
        }
        return found if further is None else {**found, 'multi_token': tree['multi_token']['heads']}

    functions = Stages(embed, context, repeat, leading, functools.partial(outside, 'remainder'), loss, remat, states)
    if further is not None:
        functions = dataclasses.replace(functions, multi_token=multi_token, ahead=None if trunk else ahead, trunk=trunk)
    return StagedModel(functions, config.repeats, parts, lambda sums: sums)
