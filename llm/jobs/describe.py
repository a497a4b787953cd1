"""What --dry_run shows of a training run: parameters, shardings, memory and FLOPs, without a device or data."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from llm.models.decoder import Decoder, DecoderConfig
from llm.models.parameters import named_specs, parameter_specs
from llm.parallel.mesh import MESH_AXES, MeshConfig
from llm.parallel.sharding import AxisRules, parameter_sharding
from llm.scaling.accounting import count, flops_per_token, training_memory
from llm.training.optimizers import OptimizerConfig, make_optimizer, place_optimizer_state
from llm.training.step import StepConfig


def _show(spec: PartitionSpec) -> str:
    return ', '.join('-' if axes is None else axes if isinstance(axes, str) else '*'.join(axes) for axes in spec)


def _bytes(size: float) -> str:
    for unit in ('B', 'KB', 'MB', 'GB'):
        if size < 1000:
            return f'{size:.3g} {unit}'
        size /= 1000
    return f'{size:.3g} TB'


def describe(
    model: DecoderConfig,
    optimizer: OptimizerConfig,
    step: StepConfig,
    total_steps: int,
    mesh_config: MeshConfig,
    rules: AxisRules,
) -> str:
    """A table of the parameters and the size of the run, on as many devices as the mesh asks for.

    The devices need not exist; a mesh with an axis of -1 is described for those that do.

    Raises:
        UserError: the mesh cannot divide a parameter.
    """
    sizes = [getattr(mesh_config, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    shape = mesh_config.sizes(max(jax.device_count(), fixed) if -1 in sizes else fixed)
    mesh = AbstractMesh(shape, MESH_AXES)
    specs = parameter_specs(Decoder(model))
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
        jax.eval_shape(transformation.init, tree),
        jax.tree.map(lambda x: x.sharding, tree),
        NamedSharding(mesh, PartitionSpec()),
    )
    memory = training_memory(tree, state)
    counts = count(model, specs)
    flops = flops_per_token(model, specs, step.sequence_length)
    tokens = step.batch_size * step.sequence_length
    axes = ' x '.join(f'{axis}={size}' for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1) or 'one device'
    return '\n'.join(
        [
            *(line.rstrip() for line in table),
            '',
            f'parameters      {counts.total:,} ({counts.non_embedding:,} without embeddings)',
            f'mesh            {axes} ({math.prod(shape)} device{"s" if math.prod(shape) > 1 else ""})',
            f'memory/device   {_bytes(memory.parameters)} parameters + {_bytes(memory.optimizer)} optimizer + '
            f'{_bytes(memory.gradients)} gradients = {_bytes(memory.total)}, without activations',
            f'FLOPs/token     {flops.training(causal=False):.4g} forward and backward '
            f'({flops.training(causal=True):.4g} counting causal attention as half)',
            f'run             {total_steps:,} steps of {tokens:,} tokens = {total_steps * tokens:,} tokens, '
            f'{flops.training(causal=False) * total_steps * tokens:.4g} FLOPs',
        ]
    )
