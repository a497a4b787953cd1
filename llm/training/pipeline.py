"""The gradient of a training step that runs through the stages of a pipeline, and the schedule of it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from llm.models.decoder import DecoderConfig
from llm.models.model import ModelConfig
from llm.models.parameters import ParameterSpec, Role
from llm.parallel.pipeline.costs import repeat_costs
from llm.parallel.pipeline.executor import run
from llm.parallel.pipeline.granularity import Costs
from llm.parallel.pipeline.memory import rows_first, without_memory
from llm.parallel.pipeline.placement import Placement
from llm.parallel.pipeline.planning import plan, plan_evaluation
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.pipeline.simulation import Problem
from llm.parallel.pipeline.stages import MEMORY, Batch, Layers, Sums
from llm.parallel.pipeline.table import Table, make_table
from llm.parallel.pipeline.validation import validate
from llm.parallel.sharding import AxisRules, names
from llm.training.stages import staged


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
    config: ModelConfig,
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
    model = staged(config, z_loss)
    stages = model.stages if loss_of_states is None else model.stages.with_loss(loss_of_states)
    in_stages = table.problem.staged_repeats
    left = model.repeats - in_stages
    place = functools.partial(_placement, mesh=mesh, rules=rules, dtype=jnp.dtype(config.compute_dtype))
    spec_parts = model.parts(specs)

    def divided(parts: Any, first: Callable[[Any], Any], rest: Callable[[Any], Any]) -> tuple[Any, Any]:
        """(what the stages have, the others); the functions cut the repeats up."""
        repeats = jax.tree.map(rest, parts['layers']) if left else {}
        others = {name: parts.get(name, {}) for name in ('ends', 'leading', 'remainder', 'multi_token')}
        return jax.tree.map(first, parts['layers']), {**others, 'repeats': repeats}

    # Only stages have a leading axis that is cut up.
    cut = divided(
        spec_parts,
        functools.partial(_cut_stack, size=in_stages, axis='layers'),
        functools.partial(_cut_stack, size=left, axis='remainder'),
    )
    placements = jax.tree.map(place, cut)

    def joined(first: jax.Array, rest: jax.Array, spec: ParameterSpec) -> jax.Array:
        sharding = NamedSharding(mesh, rules.place(spec.axes, spec.shape, mesh))
        return jax.lax.with_sharding_constraint(jnp.concatenate([first, rest]), sharding)

    def by_group(routing: Any) -> Any:
        """Sums of routers as one device has them."""
        found = [routing.pop(name) for name in ('staged', 'repeats') if name in routing]
        layers = {'layers': jax.tree.map(lambda *each: jnp.concatenate(each), *found)} if found else {}
        return model.routing({**routing, **layers})

    def memories(batch: Batch) -> tuple[Any, Batch]:
        """What the stages' layers remember, and the batch with what others do."""
        memory: Any = batch.get(MEMORY)
        if memory is None:
            return {}, batch
        rest: Any = {MEMORY: rows_first({name: memory[name] for name in ('leading', 'remainder') if name in memory})}
        if left:
            rest[MEMORY]['repeats'] = rows_first(jax.tree.map(lambda x: x[in_stages:], memory['layers']))
        batch = {name: x for name, x in batch.items() if name != MEMORY} | (rest if rest[MEMORY] else {})
        return jax.tree.map(lambda x: x[:in_stages], memory['layers']), batch

    def new_memory(of_stages: Any, others: Any) -> Any:
        """By group, as it was given."""
        if left:
            of_stages = jax.tree.map(lambda *each: jnp.concatenate(each), of_stages, others.pop('repeats'))
        return {'layers': of_stages, **others}

    def compute(parameters: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Sums]:
        parts, back = jax.vjp(model.parts, parameters)
        layers, shared = divided(parts, lambda x: x[:in_stages], lambda x: x[in_stages:])
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
        repeats = shared.pop('repeats')
        if left:
            layers = jax.tree.map(joined, layers, repeats, spec_parts['layers'])
        (gradients,) = back({name: value for name, value in shared.items() if name in parts} | {'layers': layers})
        return gradients, sums

    return compute


def repeat_costs_of(
    config: ModelConfig,
    specs: Any,
    rows: int,
    length: int,
    count: Callable[..., Costs] = repeat_costs,
    encoder_length: int | None = None,
) -> Costs:
    """What the parts of a repeat of the layers cost for a microbatch [rows, length], on one device.

    Args:
        count: repeat_costs or compiled_costs of llm.parallel.pipeline.costs.
        encoder_length: of the rows of the encoder of an encoder-decoder, where they have another.
    """
    model, dtype = staged(config, 0.0), jnp.dtype(config.compute_dtype)
    parts = model.parts(specs)
    parameters = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[1:], dtype), parts['layers'])
    ends = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), parts['ends'])
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    encoder_tokens = jax.ShapeDtypeStruct((rows, encoder_length or length), jnp.int32)
    arrays = ('inputs', 'segment_ids', 'positions')
    batch = dict.fromkeys(arrays, tokens) | {f'encoder_{name}': encoder_tokens for name in arrays}
    key = jax.eval_shape(lambda: jax.random.key(0))
    context = [jax.eval_shape(model.stages.context, batch, key)]
    if isinstance(config, DecoderConfig) and config.memory_length:
        memory = jax.eval_shape(lambda: config.init_memory(rows))['layers']
        context.append(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), memory))
    x = jax.eval_shape(model.stages.embed, ends, batch, None)

    def repeat(parameters: Any, x: jax.Array, context: Any) -> Layers:
        return model.stages.without_trunk().repeat(parameters, x, jnp.int32(0), *context)

    return count(repeat, parameters, x, context, model.stages.remat)


def make_pipeline_table(
    pipeline: PipelineConfig,
    config: ModelConfig,
    specs: Any,
    num_stages: int,
    microbatches: int,
    shape: tuple[int, int],
) -> Table:
    """The schedule of a training step whose microbatches have `shape` (rows, length).

    Raises:
        UserError: there are fewer repeats of the layers than blocks, or too few microbatches.
    """
    problem = Problem(pipeline, num_stages, microbatches, staged(config, 0.0).repeats)
    table = make_table(problem, plan(problem, repeat_costs_of(config, specs, *shape)))
    validate(table)
    return table


def evaluation_table(table: Table) -> Table:
    """Forward passes of the same microbatches. Layers are where they are stored: each stage has one chunk."""
    problem = dataclasses.replace(table.problem, config=PipelineConfig('gpipe'), evaluation=True)
    return make_table(problem, plan_evaluation(problem))
