"""The part of a training run that decides its memory and speed, and short ways to say what it is."""

import dataclasses
from typing import Any

from llm.data.objectives import Objective
from llm.models.model import ModelConfig
from llm.parallel.mesh import MESH_AXES, MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.sharding import AxisRules
from llm.scaling.accounting import RowTokens, row_tokens
from llm.scaling.planner.quantities import microbatches
from llm.scaling.planner.stacks import remat_of
from llm.scaling.planner.topology import Topology
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer

ANY_STEPS = 1_000_000  # the length of the run changes constants of the schedule, and no memory


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a plan is made for.

    Attributes:
        objective: what the model is trained on; None for what is usual for a model of its kind, see `row_tokens`.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    step: StepConfig
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()
    pipeline: PipelineConfig = PipelineConfig()
    objective: Objective | None = None

    @property
    def tokens_per_step(self) -> int:
        """Of text, on all devices."""
        return self.step.batch_size * self.step.sequence_length

    @property
    def row(self) -> RowTokens:
        """The tokens of a row of its batches."""
        return row_tokens(self.model, self.step.sequence_length, self.objective)

    @property
    def row_arrays(self) -> dict[str, int]:
        """The arrays of a batch, four bytes an element, and how many of these there are in a row."""
        row = self.row
        scored = row.read if row.predicted is None else row.predicted
        arrays = {'inputs': row.read, 'segment_ids': row.read, 'positions': row.read}
        arrays |= {'targets': scored, 'loss_weights': scored}
        if row.predicted is not None:
            arrays['predicted'] = scored
        if row.decoder is not None:
            arrays |= dict.fromkeys(('encoder_inputs', 'encoder_segment_ids', 'encoder_positions'), row.text)
        if row.pair:
            arrays |= dict.fromkeys(('token_types', 'next_sentence'), row.text)
        return arrays | ({'prefix': row.text} if row.prefix else {})

    def trainer(self, topology: Topology) -> Trainer:
        """Everything about the run that is fixed before its first step, on the devices of `topology`.

        Raises:
            UserError: mesh, model and batch do not go together.
        """
        topology.sizes(self.mesh)
        return Trainer(
            self.model,
            self.optimizer,
            self.step,
            ANY_STEPS,
            self.mesh,
            self.rules,
            devices=list(topology.devices),
            pipeline=self.pipeline,
        )

    def fixed(self, sizes: dict[str, int]) -> 'RunConfig':
        """The same run with every size of its mesh written out."""
        changes: dict[str, Any] = dict(sizes)
        return dataclasses.replace(self, mesh=dataclasses.replace(self.mesh, **changes))

    def describe(self) -> str:
        """'fsdp=16 tensor=2, 4 microbatches, remat full'."""
        sizes = {axis: getattr(self.mesh, axis) for axis in MESH_AXES}
        mesh = ' '.join(f'{axis}={size}' for axis, size in sizes.items() if size != 1) or 'one device'
        remat = ' and '.join(
            dict.fromkeys(f'{kind} ({", ".join(names)})' if names else kind for kind, names in remat_of(self.model))
        )
        if self.mesh.pipeline > 1:
            chunks = f', {self.pipeline.chunks} chunks' if self.pipeline.chunks > 1 else ''
            deferred = '' if self.pipeline.deferred is None else f', {self.pipeline.deferred} deferred'
            mesh = f'{mesh} ({self.pipeline.schedule}{chunks}{deferred})'
        return f'{mesh}, {microbatches(self.step.gradient_accumulation)}, remat {remat}'
