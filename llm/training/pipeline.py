"""The decoder as stages of a pipeline, and the gradient of a training step that runs through them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from llm.errors import UserError
from llm.models.context import Context
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.layer_stack import run_layers
from llm.models.multi_token import run_head
from llm.models.parameters import ParameterSpec, Role
from llm.models.remat import RematKind, rematerialized
from llm.parallel.pipeline.costs import repeat_costs
from llm.parallel.pipeline.executor import run
from llm.parallel.pipeline.granularity import Costs
from llm.parallel.pipeline.memory import rows_first, without_memory
from llm.parallel.pipeline.placement import Placement
from llm.parallel.pipeline.planning import plan, plan_evaluation
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.pipeline.simulation import Problem
from llm.parallel.pipeline.stages import MEMORY, Batch, Gathering, Layers, Stages, Sums
from llm.parallel.pipeline.table import Table, make_table
from llm.parallel.pipeline.validation import validate
from llm.parallel.sharding import AxisRules, names
from llm.training.layout import token_order
from llm.training.losses import summed_loss
from llm.training.multi_token import depths_of, summed_losses

_REMATS: tuple[RematKind, ...] = ('none', 'full', 'dots', 'dots_no_batch', 'names')


def make_stages(config: DecoderConfig, z_loss: float) -> Stages:
    """The functions of `config`'s decoder; `config.remat` is of a whole repeat of the layers.

    Raises:
        UserError: what `config.remat` keeps cannot be kept from tick to tick.
    """
    if config.remat not in _REMATS:
        raise UserError(
            f"remat {config.remat!r} is not possible in a pipeline, which keeps everything in its stages' own memory",
            where='DecoderConfig.remat',
            fix=f'Use one of {", ".join(_REMATS)}, or MeshConfig.pipeline = 1.',
        )
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
        order = token_order(rows['inputs'].shape[1])
        index = None if order is None else jnp.asarray(order)
        return merged(shared).embed(rows['inputs'], rows['positions'], key, index)

    def context(rows: Batch, key: jax.Array | None) -> Any:
        routed = (rows['inputs'], rows.get('routing_weights')) if config.routed else (None, None)
        before = rows['positions'][:, 0] if config.memory_length else None
        return rows['segment_ids'], decoder.rotary(rows['positions']), key, routed, before

    def read_of(context: Any) -> Context:
        segment_ids, rotary, _, (ids, weights), before = context
        order = token_order(segment_ids.shape[1])
        index = None if order is None else jnp.asarray(order)
        return Context(segment_ids, rotary, token_index=index, token_ids=ids, token_weights=weights, before=before)

    def run_once(layers: Any, x: jax.Array, first: jax.Array | int, context: Any, memory: Any) -> Layers:
        read, key = read_of(context), context[2]
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
            read_of(context),
            embed=lambda embedded: embedded,
            normalize=model.normalize,
            dropout_keys=model.further_keys(context[2]),
            run=run,
        )
        losses = {depth: each.pop('loss').sum() for depth, each in sums.items()}
        return states, losses, sums

    def loss(shared: Any, x: jax.Array, rows: Batch) -> tuple[jax.Array, Sums]:
        model = merged(shared)
        if further is not None:
            return summed_losses(model.projection(), x, *depths_of(rows), z_loss)
        return summed_loss(model.projection(), model.normalize(x), rows['targets'], rows['loss_weights'], z_loss)

    remat = functools.partial(rematerialized, kind=config.remat, names=config.remat_names, in_scan=False)
    leading, remainder = (functools.partial(outside, group) for group in ('leading', 'remainder'))

    def states(shared: Any, x: jax.Array) -> jax.Array:
        return merged(shared).normalize(x)

    found = Stages(embed, context, repeat, leading, remainder, loss, None if config.remat == 'none' else remat, states)
    if further is None:
        return found
    return dataclasses.replace(found, multi_token=multi_token, ahead=None if trunk else ahead, trunk=trunk)


def _placement(spec: ParameterSpec, mesh: Mesh, rules: AxisRules, dtype: Any) -> Placement:
    # Layers cast their matrices to the type of the products themselves; norms are taken in fp32.
    own = spec.role == Role.VECTOR or spec.full_precision
    place = rules.place(spec.axes, spec.shape, mesh)
    # Tokens go to their experts, which are only gathered along axes that cut no tokens.
    batch = names(rules.partition(('batch',), mesh, parameters=False)[0])
    kept = (a for axis, entry in zip(spec.axes, place, strict=True) if axis == 'experts' for a in names(entry))
    return Placement(place, None if own else dtype, tuple(a for a in kept if a in batch))


def _cut_stack(spec: ParameterSpec, size: int, axis: str) -> ParameterSpec:
    """The spec of `size` entries of a stacked parameter, along an axis of this name."""
    return dataclasses.replace(spec, shape=(size, *spec.shape[1:]), axes=(axis, *spec.axes[1:]))


def make_pipeline(
    config: DecoderConfig,
    specs: Any,
    table: Table,
    mesh: Mesh,
    rules: AxisRules,
    z_loss: float,
    loss_of_states: Callable[[jax.Array, Batch], tuple[jax.Array, Sums]] | None = None,
) -> Callable[[Any, Batch, jax.Array | None], tuple[Any, Sums]]:
    """(parameters, batch, key of the step) -> (gradients of the summed loss, sums), as `table` says.

    The same as accumulating over `table.problem.microbatches` microbatches on one device. Without a key there is no
    dropout, and if the table is for evaluation no gradients.

    Args:
        loss_of_states: (states [B, S, D], rows) -> (loss, sums), in place of the loss of tokens.
    """
    stages = make_stages(config, z_loss)
    if loss_of_states is not None:
        stages = stages.with_loss(loss_of_states)
    staged = table.problem.staged_repeats
    left = config.repeats - staged
    place = functools.partial(_placement, mesh=mesh, rules=rules, dtype=jnp.dtype(config.compute_dtype))
    outside = ('leading', 'remainder')

    def divided(tree: Any, first: Callable[[Any], Any], rest: Callable[[Any], Any]) -> tuple[Any, Any]:
        """(what the stages have, the others) of a tree like the parameters; the functions cut the layers up."""
        return jax.tree.map(first, tree['layers']), {
            'ends': {name: value for name, value in tree.items() if name not in ('layers', 'multi_token', *outside)},
            'repeats': jax.tree.map(rest, tree['layers']) if left else {},
            **{name: tree.get(name, {}) for name in outside},
            'multi_token': tree.get('multi_token', {}).get('heads', {}),
        }

    # Only stages have a leading axis that is cut up.
    cut = divided(
        specs,
        functools.partial(_cut_stack, size=staged, axis='layers'),
        functools.partial(_cut_stack, size=left, axis='remainder'),
    )
    placements = jax.tree.map(place, cut)

    def joined(first: jax.Array, rest: jax.Array, spec: ParameterSpec) -> jax.Array:
        sharding = NamedSharding(mesh, rules.place(spec.axes, spec.shape, mesh))
        return jax.lax.with_sharding_constraint(jnp.concatenate([first, rest]), sharding)

    def by_group(routing: Any) -> Any:
        """Sums of routers as one device has them."""
        parts = [routing.pop(name) for name in ('staged', 'repeats') if name in routing]
        layers = {'layers': jax.tree.map(lambda *each: jnp.concatenate(each), *parts)} if parts else {}
        return {**routing, **layers}

    def memories(batch: Batch) -> tuple[Any, Batch]:
        """What the stages' layers remember, and the batch with what others do."""
        memory: Any = batch.get(MEMORY)
        if memory is None:
            return {}, batch
        rest: Any = {MEMORY: rows_first({name: memory[name] for name in outside if name in memory})}
        if left:
            rest[MEMORY]['repeats'] = rows_first(jax.tree.map(lambda x: x[staged:], memory['layers']))
        batch = {name: x for name, x in batch.items() if name != MEMORY} | (rest if rest[MEMORY] else {})
        return jax.tree.map(lambda x: x[:staged], memory['layers']), batch

    def new_memory(of_stages: Any, others: Any) -> Any:
        """By group, as it was given."""
        if left:
            of_stages = jax.tree.map(lambda *each: jnp.concatenate(each), of_stages, others.pop('repeats'))
        return {'layers': of_stages, **others}

    def compute(parameters: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Sums]:
        layers, shared = divided(parameters, lambda x: x[:staged], lambda x: x[staged:])
        memory, batch = memories(batch)
        found, sums = run(table, stages, mesh, rules, placements, layers, shared, batch, key, memory)
        routing, others = without_memory(sums.pop('layers', {}))
        if memory:
            sums[MEMORY] = new_memory(sums[MEMORY], others)
        if routing:
            sums = {**sums, 'routing': by_group(routing)}
        if found is None:
            return None, sums
        layers, shared = found
        if left:
            layers = jax.tree.map(joined, layers, shared['repeats'], specs['layers'])
        others = {name: shared[name] for name in outside if shared[name]}
        if heads := shared['multi_token']:
            others['multi_token'] = {'heads': heads}
        return {**shared['ends'], **others, 'layers': layers}, sums

    return compute


def repeat_costs_of(
    config: DecoderConfig, specs: Any, rows: int, length: int, count: Callable[..., Costs] = repeat_costs
) -> Costs:
    """What the parts of a repeat of the layers cost for a microbatch [rows, length], on one device.

    Args:
        count: repeat_costs or compiled_costs of llm.parallel.pipeline.costs.
    """
    stages, dtype = make_stages(config, 0.0), jnp.dtype(config.compute_dtype)
    parameters = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[1:], dtype), specs['layers'])
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    context = [jax.eval_shape(stages.context, dict.fromkeys(('inputs', 'segment_ids', 'positions'), tokens), key)]
    if config.memory_length:
        memory = jax.eval_shape(lambda: config.init_memory(rows))['layers']
        context.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), memory))

    def repeat(parameters: Any, x: jax.Array, context: Any) -> Layers:
        return stages.without_trunk().repeat(parameters, x, jnp.int32(0), *context)

    x = jax.ShapeDtypeStruct((rows, length, config.d_model), dtype)
    return count(repeat, parameters, x, context, stages.remat)


def make_pipeline_table(
    pipeline: PipelineConfig,
    config: DecoderConfig,
    specs: Any,
    num_stages: int,
    microbatches: int,
    shape: tuple[int, int],
) -> Table:
    """The schedule of a training step whose microbatches have `shape` (rows, length).

    Raises:
        UserError: there are fewer repeats of the layers than blocks, or too few microbatches.
    """
    problem = Problem(pipeline, num_stages, microbatches, config.repeats)
    table = make_table(problem, plan(problem, repeat_costs_of(config, specs, *shape)))
    validate(table)
    return table


def evaluation_table(table: Table) -> Table:
    """Forward passes of the same microbatches. Layers are where they are stored: each stage has one chunk."""
    problem = dataclasses.replace(table.problem, config=PipelineConfig('gpipe'), evaluation=True)
    return make_table(problem, plan_evaluation(problem))
