"""What --dry_run shows of a training run: parameters, shardings, memory and FLOPs, without a device or data."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.model import ModelConfig
from llm.models.parameters import count_parameters, named_specs, parameter_specs
from llm.parallel.mesh import MESH_AXES, MeshConfig
from llm.parallel.pipeline.placement import AXIS as PIPELINE_AXIS
from llm.parallel.pipeline.schedules import PipelineConfig, paper_cost
from llm.parallel.sharding import AxisRules, parameter_sharding
from llm.scaling.accounting import RowTokens, count, flops_per_token, row_tokens, training_memory
from llm.training.optimizers import OptimizerConfig, make_optimizer, place_optimizer_state
from llm.training.parametrization import trained
from llm.training.pipeline import make_pipeline_table, repeat_costs_of
from llm.training.step import StepConfig


def _show(spec: PartitionSpec) -> str:
    return ', '.join('-' if axes is None else axes if isinstance(axes, str) else '*'.join(axes) for axes in spec)


def _schedule(pipeline: PipelineConfig, model: ModelConfig, specs: Any, stages: int, step: StepConfig) -> list[str]:
    """What a pipeline costs, if there is one: how many times the work of one stage a step takes."""
    if stages == 1:
        return []
    microbatches = step.gradient_accumulation
    shape = (step.batch_size // microbatches, step.sequence_length)
    table = make_pipeline_table(pipeline, model, specs, stages, microbatches, shape)
    costs = repeat_costs_of(model, specs, *shape)
    work = table.problem.chunk_repeats * table.problem.config.chunks
    parts = (work * costs.forward, work * (costs.recompute + costs.input_gradient), work * costs.weight_gradient)
    ideal = microbatches * sum(parts)
    shared = 'embedding, encoder and loss' if isinstance(model, EncoderDecoderConfig) else 'embedding and loss'
    return [
        f'pipeline        {pipeline.schedule}, {stages} stages, {microbatches} microbatches: '
        f'{table.cost(costs) / ideal:.2f} times the work of a stage '
        f'({paper_cost(pipeline, stages, microbatches, *parts) / ideal:.2f} by the formula of its paper), '
        f'without {shared}'
    ]


def _further(specs: Any) -> list[str]:
    """What multi-token prediction adds, if it is there."""
    if 'multi_token' not in specs:
        return []
    return [f'of these        {count_parameters(specs["multi_token"]):,} for multi-token prediction, in training alone']


def _bytes(size: float) -> str:
    for unit in ('B', 'KB', 'MB', 'GB'):
        if size < 1000:
            return f'{size:.3g} {unit}'
        size /= 1000
    return f'{size:.3g} TB'


def describe(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    step: StepConfig,
    total_steps: int,
    mesh_config: MeshConfig,
    rules: AxisRules,
    pipeline: PipelineConfig = PipelineConfig(),
    row: RowTokens | None = None,
) -> str:
    """A table of the parameters and the size of the run, on as many devices as the mesh asks for.

    The devices need not exist; a mesh with an axis of -1 is described for those that do.

    Args:
        row: the tokens of a row; default: of what is usual for such a model.

    Raises:
        UserError: the mesh cannot divide a parameter, or the schedule cannot run the layers or microbatches.
    """
    sizes = [getattr(mesh_config, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    shape = mesh_config.sizes(max(jax.device_count(), fixed) if -1 in sizes else fixed)
    mesh = AbstractMesh(shape, MESH_AXES)
    specs = parameter_specs(model.build())
    schedule = _schedule(pipeline, model, specs, mesh.shape[PIPELINE_AXIS], step)
    rows, parameters = [('parameter', 'axes', 'shape', 'count', 'sharding over the mesh')], {}
    for name, spec in named_specs(specs):
        sharding = parameter_sharding(spec.axes, spec.shape, mesh, rules, name)
        parameters[name] = jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=sharding)
        size = math.prod(spec.shape)
        rows.append((name, ', '.join(spec.axes), ' x '.join(map(str, spec.shape)), f'{size:,}', _show(sharding.spec)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        '  '.join(
            cell.rjust(w) if i == 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]

    tree = jax.tree.unflatten(jax.tree.structure(specs), list(parameters.values()))
    transformation = make_optimizer(optimizer, specs, specs, total_steps)
    state = place_optimizer_state(
        transformation,
        jax.eval_shape(transformation.init, trained(tree, specs)),
        jax.tree.map(lambda x: x.sharding, trained(tree, specs)),
        NamedSharding(mesh, PartitionSpec()),
    )
    memory = training_memory(tree, state, trained(tree, specs))
    counts = count(model, specs)
    flops = flops_per_token(model, specs, row or row_tokens(model, step.sequence_length))
    tokens = step.batch_size * step.sequence_length
    axes = ' x '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1) or 'one device'
    return '\n'.join(
        [
            *(line.rstrip() for line in table),
            '',
            f'parameters      {counts.total:,} ({counts.non_embedding:,} without embeddings'
            + (f', {counts.active:,} active for a token)' if counts.active < counts.total else ')'),
            *_further(specs),
            f'mesh            {axes} ({math.prod(shape)} device{"s" if math.prod(shape) > 1 else ""})',
            *schedule,
            f'memory/device   {_bytes(memory.parameters)} parameters + {_bytes(memory.optimizer)} optimizer + '
            f'{_bytes(memory.gradients)} gradients = {_bytes(memory.total)}, without activations',
            f'FLOPs/token     {flops.training(causal=False):.4g} forward and backward '
            f'({flops.training(causal=True):.4g} counting causal attention as half)',
            f'run             {total_steps:,} steps of {tokens:,} tokens = {total_steps * tokens:,} tokens, '
            f'{flops.training(causal=False) * total_steps * tokens:.4g} FLOPs',
        ]
    )
