"""The decoder as stages of a pipeline, and the gradient of a training step that runs through them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from llm.errors import UserError
from llm.models.context import Context
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.layer_stack import run_layers
from llm.models.parameters import ParameterSpec, Role
from llm.parallel.pipeline.costs import repeat_costs
from llm.parallel.pipeline.executor import Batch, Placement, Stages, Sums, run
from llm.parallel.pipeline.granularity import Costs
from llm.parallel.pipeline.planning import plan, plan_evaluation
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.pipeline.simulation import Problem
from llm.parallel.pipeline.table import Table, make_table
from llm.parallel.pipeline.validation import validate
from llm.parallel.sharding import AxisRules, manual_axes
from llm.parallel.vocabulary import token_negative_log_likelihood
from llm.training.layout import token_order


def make_stages(config: DecoderConfig, z_loss: float) -> Stages:
    """The functions of `config`'s decoder.

    A stage computes its layers again in the backward pass, from the input of every repeat, whatever `config.remat` is.
    """
    decoder = Decoder(config)
    graph, abstract = nnx.split(decoder)
    layers_graph, _ = nnx.split(decoder.layers)
    unused = nnx.to_pure_dict(abstract)['layers']

    def merged(shared: Any) -> Decoder:
        return nnx.merge(graph, {**shared, 'layers': unused})

    def embed(shared: Any, rows: Batch, key: jax.Array | None) -> jax.Array:
        order = token_order(rows['inputs'].shape[1])
        index = None if order is None else jnp.asarray(order)
        return merged(shared).embed(rows['inputs'], rows['positions'], key, index)

    def context(rows: Batch, key: jax.Array | None) -> Any:
        return rows['segment_ids'], decoder.rotary(rows['positions']), key

    def repeat(parameters: Any, x: jax.Array, index: jax.Array, context: Any) -> jax.Array:
        segment_ids, rotary, key = context
        order = token_order(segment_ids.shape[1])
        layers = nnx.merge(layers_graph, jax.tree.map(lambda p: p[None], parameters))
        x, _ = run_layers(
            dict(layers.items()),
            x,
            Context(segment_ids, rotary, token_index=None if order is None else jnp.asarray(order)),
            repeats=1,
            first=index * len(config.pattern),
            dropout_key=key,
        )
        return x

    def loss(shared: Any, x: jax.Array, rows: Batch) -> tuple[jax.Array, Sums]:
        model = merged(shared)
        logits = model.logits(model.normalize(x))
        axes = manual_axes('vocab', parameters=True)
        nll, log_z = token_negative_log_likelihood(logits, rows['targets'], axes)
        weights = rows['loss_weights'].astype(nll.dtype)
        sums = {
            'nll': jnp.sum(nll * weights),
            'z_loss': z_loss * jnp.sum(jnp.square(log_z) * weights),
            'tokens': jnp.sum(weights),
        }
        return sums['nll'] + sums['z_loss'], sums

    return Stages(embed, context, repeat, loss)


def _placement(spec: ParameterSpec, mesh: Mesh, rules: AxisRules, dtype: Any) -> Placement:
    # Layers cast their matrices to the type of the products themselves; norms are taken in fp32.
    return Placement(
        PartitionSpec(*rules.partition(spec.axes, mesh, parameters=True)), None if spec.role == Role.VECTOR else dtype
    )


def make_pipeline(
    config: DecoderConfig, specs: Any, table: Table, mesh: Mesh, rules: AxisRules, z_loss: float
) -> Callable[[Any, Batch, jax.Array | None], tuple[Any, Sums]]:
    """(parameters, batch, key of the step) -> (gradients of the summed loss, sums), as `table` says.

    The same as accumulating over `table.problem.microbatches` microbatches on one device. Without a key there is no
    dropout, and if the table is for evaluation no gradients.
    """
    stages = make_stages(config, z_loss)
    place = functools.partial(_placement, mesh=mesh, rules=rules, dtype=jnp.dtype(config.compute_dtype))
    placements = jax.tree.map(place, specs)
    layers = placements.pop('layers')

    def compute(parameters: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Sums]:
        shared = {name: value for name, value in parameters.items() if name != 'layers'}
        found, sums = run(table, stages, mesh, rules, (layers, placements), parameters['layers'], shared, batch, key)
        return None if found is None else {**found[1], 'layers': found[0]}, sums

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
    context = jax.eval_shape(stages.context, {'segment_ids': tokens, 'positions': tokens}, key)

    def repeat(parameters: Any, x: jax.Array, context: Any) -> jax.Array:
        return stages.repeat(parameters, x, jnp.int32(0), context)

    return count(repeat, parameters, jax.ShapeDtypeStruct((rows, length, config.d_model), dtype), context)


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
        UserError: the layers cannot be divided over the stages, there are too few microbatches, or remat is 'offload'.
    """
    if config.remat == 'offload':
        raise UserError(
            'a stage of a pipeline keeps the inputs of its layers on the device, and offloads none',
            where='DecoderConfig.remat',
            fix="Use remat = 'full', or MeshConfig.pipeline = 1.",
        )
    if config.remainder:
        raise UserError(
            f'{config.num_layers} layers are no whole number of patterns of {len(config.pattern)}, and a pipeline has '
            'no place for the rest',
            where='DecoderConfig.num_layers',
            fix=f'Use a multiple of {len(config.pattern)}, or MeshConfig.pipeline = 1.',
        )
    problem = Problem(pipeline, num_stages, microbatches, config.repeats)
    table = make_table(problem, plan(problem, repeat_costs_of(config, specs, *shape)))
    validate(table)
    return table


def evaluation_table(table: Table) -> Table:
    """Forward passes of the same microbatches. Layers are where they are stored: each stage has one chunk."""
    problem = dataclasses.replace(table.problem, config=PipelineConfig('gpipe'), evaluation=True)
    return make_table(problem, plan_evaluation(problem))
