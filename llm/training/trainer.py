"""Model, optimizer and mesh put together: where every array of the train state lives, and the compiled steps."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, serialization
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.initialization import initialize
from llm.models.long_attention import LongAttentionConfig
from llm.models.model import ModelConfig, layers_of
from llm.models.multi_token import MultiTokenConfig
from llm.models.parameters import parameter_specs
from llm.models.recurrent_attention import RecurrentAttentionConfig, memory_axes
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.pipeline.placement import AXIS as PIPELINE_AXIS
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.pipeline.table import Table
from llm.parallel.sharding import AxisRules, names, parameter_sharding, sequence_cut, use_rules
from llm.training.contrastive import (
    ContrastiveConfig,
    LossOfStates,
    make_contrastive_gradients,
    make_contrastive_prediction,
    make_pipelined_contrastive_gradients,
)
from llm.training.optimizers import OptimizerConfig, learning_rate_schedule, make_optimizer, place_optimizer_state
from llm.training.parametrization import trained
from llm.training.pipeline import evaluation_table, make_pipeline, make_pipeline_table
from llm.training.step import (
    Batch,
    Metrics,
    State,
    StepConfig,
    make_evaluation_step,
    make_prediction_step,
    make_train_step,
)


def _path_name(path: tuple[Any, ...]) -> str:
    return '/'.join(str(key.key) for key in path)


class Trainer:
    """Everything about a run that is fixed before its first step.

    Attributes:
        mesh, rules: where things live. specs: nested dict of ParameterSpec. model: the graph definition.
        optimizer: the optax transformation.
        abstract_state, state_shardings: ShapeDtypeStruct and NamedSharding of every array of the train state.
        batch_sharding: NamedSharding of each array of a batch, [B, S].
        pipeline_table: the schedule, where the mesh has more than one pipeline stage; else None.
        contrastive: the loss, of batches of pairs, in place of that of tokens; else None.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimizerConfig,
        step: StepConfig,
        total_steps: int,
        mesh: MeshConfig = MeshConfig(),
        rules: AxisRules = AxisRules(),
        devices: list[jax.Device] | None = None,
        pipeline: PipelineConfig = PipelineConfig(),
        contrastive: ContrastiveConfig | None = None,
    ):
        self.model_config, self.step_config, self.rules = model, step, rules
        self.contrastive = contrastive
        self.mesh: Mesh = make_mesh(mesh, devices)
        self._check_batch()
        self._check_length()
        self._check_sequence()
        module = model.build()
        self.specs = parameter_specs(module)
        self.pipeline_table = self._pipeline_table(pipeline)
        self.model: nnx.GraphDef = nnx.split(module)[0]
        base = model if model.mup_base_width is None else model.at_width(model.mup_base_width)
        base_specs = parameter_specs(base.build())
        self.optimizer = make_optimizer(optimizer, self.specs, base_specs, total_steps)
        self.schedule = learning_rate_schedule(optimizer, total_steps)

        parameter_shardings = jax.tree_util.tree_map_with_path(
            lambda path, spec: parameter_sharding(spec.axes, spec.shape, self.mesh, rules, _path_name(path)),
            self.specs,
        )
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        abstract = jax.eval_shape(self._fresh_state, 0)
        self.abstract_state: State = {
            'parameters': jax.tree.map(self._placed, abstract['parameters'], parameter_shardings),
            'optimizer': place_optimizer_state(
                self.optimizer, abstract['optimizer'], trained(parameter_shardings, self.specs), self.replicated
            ),
            'step': self._placed(abstract['step'], self.replicated),
        }
        if 'memory' in abstract:
            self.abstract_state['memory'] = {
                group: jax.tree.map(lambda x, group=group: self._placed(x, self._memory_sharding(group, x)), arrays)
                for group, arrays in abstract['memory'].items()
            }
        self.state_shardings: State = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        self.batch_sharding = NamedSharding(
            self.mesh, rules.partition(('batch', 'sequence'), self.mesh, parameters=False)
        )

    @staticmethod
    def _placed(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def _check_batch(self) -> None:
        rows = self.step_config.batch_size // self.step_config.gradient_accumulation
        ways = self._ways('batch')
        if rows % ways:
            raise UserError(
                f'{rows} rows (batch_size / gradient_accumulation) cannot be divided over {ways} devices '
                f'(mesh axes {self.rules.partition(("batch",), self.mesh, parameters=False)[0]})',
                where='StepConfig.batch_size',
                fix=f'Make it a multiple of {ways}, or change the mesh.',
            )

    def _pipeline_table(self, pipeline: PipelineConfig) -> Table | None:
        """The schedule, if the mesh has stages."""
        stages, step = self.mesh.shape[PIPELINE_AXIS], self.step_config
        if stages == 1:
            return None
        microbatches = step.gradient_accumulation
        shape = (step.batch_size // microbatches, step.sequence_length)
        return make_pipeline_table(pipeline, self.model_config, self.specs, stages, microbatches, shape)

    def _check_length(self) -> None:
        # The model would say so too, but only when it is first run, after hours of tokenising perhaps.
        longest, length = self.model_config.longest, self.step_config.sequence_length
        if longest is not None and length > longest:
            raise UserError(
                f'sequences of {length} tokens are longer than the {longest} learned positions',
                where='StepConfig.sequence_length',
                fix=f'Use at most {longest}, or raise {type(self.model_config).__name__}.max_positions.',
            )

    def _check_sequence(self) -> None:
        with use_rules(self.mesh, self.rules):
            cut = sequence_cut()
        length = self.step_config.sequence_length
        if cut is not None and length % cut.pieces:
            raise UserError(
                f'rows of {length} tokens cannot be cut into {cut.pieces} pieces (mesh axis {cut.axis!r})',
                where='StepConfig.sequence_length',
                fix=f'Make it a multiple of {cut.pieces}, or of {2 * cut.pieces} to share causal work evenly.',
            )
        if cut is not None and cut.method == 'ulysses':
            for layer in layers_of(self.model_config):
                ways = cut.pieces * self._ways('heads')
                own_way = isinstance(layer.mixer, LongAttentionConfig | RecurrentAttentionConfig)
                if isinstance(layer.mixer, AttentionConfig) and not own_way and layer.mixer.num_heads % ways:
                    raise UserError(
                        f'{layer.mixer.num_heads} heads cannot be divided over {ways} devices',
                        where='AxisRules.sequence_method',
                        fix="Use 'ring' or 'all_gather' instead of 'ulysses', or change the mesh.",
                    )

    def _memory_sharding(self, group: str, x: jax.ShapeDtypeStruct) -> NamedSharding:
        """Of a memory [repeats, B, M, D]: stages have that of their own layers."""
        with use_rules(self.mesh, self.rules):
            axes = memory_axes(x.shape[2])
        _, *over = self.rules.partition(axes, self.mesh, parameters=False)
        (layers,) = self.rules.partition(('layers',), self.mesh, parameters=True)
        even = group == 'layers' and x.shape[0] % math.prod(self.mesh.shape[axis] for axis in names(layers)) == 0
        return NamedSharding(self.mesh, PartitionSpec(layers if even else None, *over))

    def _ways(self, axis: str) -> int:
        """Devices that share an activation along a logical axis."""
        axes = self.rules.partition((axis,), self.mesh, parameters=False)[0]
        return math.prod(self.mesh.shape[name] for name in names(axes))

    def _fresh_state(self, seed: int | jax.Array) -> State:
        parameters = initialize(self.specs, self.model_config.initialization, seed)
        state = {
            'parameters': parameters,
            'optimizer': self.optimizer.init(trained(parameters, self.specs)),
            'step': jnp.zeros((), jnp.int32),
        }
        memory = self._memory()
        return {**state, 'memory': memory} if memory else state

    def _memory(self) -> Any:
        config = self.model_config
        return config.init_memory(self.step_config.batch_size) if isinstance(config, DecoderConfig) else {}

    def fresh_memory(self) -> Any:
        """What the rows of a first batch go on from; None for models without a memory."""
        if 'memory' not in self.state_shardings:
            return None
        return jax.jit(self._memory, out_shardings=self.state_shardings['memory'])()

    def fresh_state(self) -> State:
        """The state before step 0, each array created where it lives."""
        create = jax.jit(self._fresh_state, static_argnums=0, out_shardings=self.state_shardings)
        return create(self.step_config.seed)

    @functools.cached_property
    def train_step(self) -> Any:
        """Compiled (state, batch) -> (state, metrics); the state passed in is donated."""
        gradients = self._gradients_of_sums()
        step = make_train_step(
            self.model, self.optimizer, self.schedule, self.step_config, self.specs, gradients, self._multi_token
        )
        return jax.jit(self._under_rules(step), donate_argnums=0, out_shardings=(self.state_shardings, self.replicated))

    @functools.cached_property
    def evaluation_step(self) -> Any:
        """Compiled (parameters, batch, memory or None) -> summed {'nll', 'tokens'}, and the next 'memory'."""
        pipeline = None if self.pipeline_table is None else self._pipeline(evaluation_table(self.pipeline_table))
        step = make_evaluation_step(self.model, pipeline, self._multi_token)
        out: Any = self.replicated
        if 'memory' in self.state_shardings:
            routing = (
                {'routing': out} if isinstance(self.model_config, DecoderConfig) and self.model_config.routed else {}
            )
            out = {'nll': out, 'tokens': out, 'memory': self.state_shardings['memory'], **routing}
        return jax.jit(self._under_rules(step), out_shardings=out)

    @property
    def _multi_token(self) -> MultiTokenConfig | None:
        return self.model_config.multi_token if isinstance(self.model_config, DecoderConfig) else None

    @functools.cached_property
    def prediction_step(self) -> Any:
        """Compiled (parameters, batch) -> {'nll', 'tokens', 'predicted'}, in one pass; stages take turns.

        Predicted is what the model says of each token, [B, S, outputs], or the vectors of pairs, [B, n, D].
        """
        contrastive = self.contrastive
        step = (
            make_prediction_step(self.model)
            if contrastive is None
            else make_contrastive_prediction(self.model, contrastive)
        )
        return jax.jit(self._under_rules(step), out_shardings=self.replicated)

    def _gradients_of_sums(self) -> Callable[[Any, Batch, jax.Array], tuple[Any, Metrics]] | None:
        """What stands in for the token loss, and microbatches one after the other."""
        if self.contrastive is not None:
            accumulation, table = self.step_config.gradient_accumulation, self.pipeline_table
            if table is None:
                return make_contrastive_gradients(self.model, self.contrastive, self.specs, accumulation)
            forward, backward = (functools.partial(self._pipeline, each) for each in (evaluation_table(table), table))
            return make_pipelined_contrastive_gradients(forward, backward, self.contrastive, self.specs, accumulation)
        if self.pipeline_table is None:
            return None
        pipeline = self._pipeline(self.pipeline_table)

        def gradients(parameters: Any, batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
            found, sums = pipeline(parameters, batch, key)
            return trained(found, self.specs), sums

        return gradients

    def _pipeline(
        self, table: Table, loss: LossOfStates | None = None
    ) -> Callable[[Any, Batch, jax.Array | None], tuple[Any, Metrics]]:
        z_loss = self.step_config.z_loss
        return make_pipeline(self.model_config, self.specs, table, self.mesh, self.rules, z_loss, loss)

    def _under_rules(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any) -> Any:
            with use_rules(self.mesh, self.rules):
                return function(*arguments)

        return wrapped

    def state_dict(self, state: State) -> State:
        """The train state as a plain nested dict of arrays, as checkpoints hold it."""
        return {**state, 'optimizer': serialization.to_state_dict(state['optimizer'])}

    def from_state_dict(self, arrays: State) -> State:
        """The inverse of `state_dict`."""
        optimizer = serialization.from_state_dict(self.abstract_state['optimizer'], arrays['optimizer'])
        return {**arrays, 'optimizer': optimizer}


__all__ = ['Batch', 'Metrics', 'State', 'Trainer']
