"""A run on a mesh that needs no devices: where its train state would live, and how much of a batch a device has."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from llm.models.decoder import DecoderConfig
from llm.models.model import ModelConfig
from llm.models.parameters import parameter_specs
from llm.parallel.mesh import MESH_AXES
from llm.parallel.sharding import AxisRules, names, parameter_sharding
from llm.scaling.accounting import TrainingMemory, bytes_per_device
from llm.scaling.planner.run_config import ANY_STEPS
from llm.training.optimizers import OptimizerConfig, make_optimizer, place_optimizer_state
from llm.training.parametrization import trained


@dataclasses.dataclass(frozen=True)
class Placement:
    """Sizes of the mesh axes, and the rules that place arrays on them."""

    sizes: tuple[tuple[str, int], ...]
    rules: AxisRules

    @staticmethod
    def of(sizes: dict[str, int], rules: AxisRules) -> 'Placement':
        """From a dict in the order of MESH_AXES."""
        return Placement(tuple(sizes.items()), rules)

    @functools.cached_property
    def mesh(self) -> AbstractMesh:
        """The mesh without devices."""
        return AbstractMesh(tuple(size for _, size in self.sizes), MESH_AXES)

    def ways(self, axis: str, *, parameters: bool = False) -> int:
        """By how many devices a logical axis is divided."""
        return math.prod(self.mesh.shape[name] for name in self.over(axis, parameters=parameters))

    def over(self, axis: str, *, parameters: bool = False) -> tuple[str, ...]:
        """The mesh axes that a logical axis is divided over."""
        return names(self.rules.partition((axis,), self.mesh, parameters=parameters)[0])


@functools.lru_cache(maxsize=8)
def model_specs(model: ModelConfig) -> dict[str, Any]:
    """The table of parameters of a model; remat and the like do not change it."""
    return parameter_specs(model.build())


@functools.lru_cache(maxsize=8)
def _abstract_optimizer(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[Any, Any]:
    """The transformation, and its state as ShapeDtypeStructs without shardings."""
    specs = model_specs(model)
    transformation = make_optimizer(optimizer, specs, specs, ANY_STEPS)
    parameters = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, 'float32'), specs)
    return transformation, jax.eval_shape(transformation.init, trained(parameters, specs))


def tiled_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of an array in a TPU's HBM, where two dimensions are filled up to tiles.

    A tile has 128 elements along one dimension and up to 8 along another, fewer where that is shorter
    (https://openxla.org/xla/tiled_layout); the compiler takes those two that waste least.
    """
    if not shape:
        return itemsize

    def padded(rows: int, columns: int) -> float:
        tile = min(8, 1 << (rows - 1).bit_length())
        filled = math.ceil(rows / tile) * tile * math.ceil(columns / 128) * 128
        return math.prod(shape) / rows / columns * filled

    return (
        round(min(padded(*pair) for pair in itertools.permutations(shape if len(shape) > 1 else (1, *shape), 2)))
        * itemsize
    )


def _bytes_on(platform: str, arrays: Any) -> int:
    if platform != 'tpu':
        return bytes_per_device(arrays)
    return sum(
        tiled_bytes(array.sharding.shard_shape(array.shape), array.dtype.itemsize) for array in jax.tree.leaves(arrays)
    )


def remembered_bytes(model: ModelConfig, batch_size: int, placement: Placement, platform: str) -> int:
    """Bytes on one device of what the layers remember of the rows before, which is in the train state too."""
    if not isinstance(model, DecoderConfig) or not model.memory_length:
        return 0
    over = placement.rules.partition((None, 'batch', None, None), placement.mesh, parameters=False)
    sharding = NamedSharding(placement.mesh, over)
    memory = jax.eval_shape(lambda: model.init_memory(batch_size))
    return _bytes_on(
        platform, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), memory)
    )


@functools.lru_cache(maxsize=1024)
def state_bytes(model: ModelConfig, optimizer: OptimizerConfig, placement: Placement, platform: str) -> TrainingMemory:
    """Bytes of parameters, optimizer and gradients on one device of a platform, a TPU's padding included.

    Raises:
        UserError: the mesh cannot divide a parameter.
    """
    mesh = placement.mesh
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, spec: parameter_sharding(
            spec.axes, spec.shape, mesh, placement.rules, '/'.join(str(key.key) for key in path)
        ),
        model_specs(model),
    )
    parameters = jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, 'float32', sharding=sharding),
        model_specs(model),
        shardings,
    )
    transformation, state = _abstract_optimizer(model, optimizer)
    placed = place_optimizer_state(
        transformation, state, trained(shardings, model_specs(model)), NamedSharding(mesh, PartitionSpec())
    )
    return TrainingMemory(
        parameters=_bytes_on(platform, parameters),
        optimizer=_bytes_on(platform, placed),
        gradients=_bytes_on(platform, trained(parameters, model_specs(model))),
    )
