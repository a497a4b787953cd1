"""A job that holds a mesh, so that a piece of gin_configs/meshes can be loaded as a run loads it."""

import dataclasses

from llm.configuration import Invocation
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.sharding import AxisRules


@dataclasses.dataclass(frozen=True)
class Hold:
    """Does nothing with what it holds."""

    mesh: MeshConfig
    more: AxisRules | PipelineConfig | None = None

    def __call__(self, invocation: Invocation) -> None:
        """Do nothing."""
