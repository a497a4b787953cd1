"""The part of a training run that decides its memory and speed, and short ways to say what it is."""

import dataclasses
from typing import Any

from llm.models.decoder import DecoderConfig
from llm.parallel.mesh import MESH_AXES, MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.sharding import AxisRules
from llm.scaling.planner.topology import Topology
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from llm.training.trainer import Trainer

ANY_STEPS = 1_000_000  # the length of the run changes constants of the schedule, and no memory


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a plan is made for."""

    model: DecoderConfig
    optimizer: OptimizerConfig
    step: StepConfig
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()
    pipeline: PipelineConfig = PipelineConfig()

    @property
    def tokens_per_step(self) -> int:
        """On all devices."""
        return self.step.batch_size * self.step.sequence_length

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
        count = self.step.gradient_accumulation
        names = f' ({", ".join(self.model.remat_names)})' if self.model.remat_names else ''
        if self.mesh.pipeline > 1:
            chunks = f', {self.pipeline.chunks} chunks' if self.pipeline.chunks > 1 else ''
            deferred = '' if self.pipeline.deferred is None else f', {self.pipeline.deferred} deferred'
            mesh = f'{mesh} ({self.pipeline.schedule}{chunks}{deferred})'
        return f'{mesh}, {count} microbatch{"es" if count > 1 else ""}, remat {self.model.remat}{names}'
