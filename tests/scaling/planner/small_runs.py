"""Runs small enough to plan by hand."""

import dataclasses
from typing import Any

from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.parallel.mesh import MESH_AXES, MeshConfig
from llm.scaling.planner.run_config import RunConfig
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig

V, D, H, K, F, L = 512, 256, 4, 64, 768, 3
ROWS, LENGTH = 16, 128


def layer(implementation: str = 'reference') -> LayerConfig:
    """One layer of the small model."""
    return LayerConfig(
        mixer=AttentionConfig(num_heads=H, num_kv_heads=H, head_dim=K, implementation=implementation),
        feed_forward=FeedForwardConfig(d_ff=F),
    )


def small_run(
    *,
    mesh: dict[str, int] | None = None,
    step: dict[str, Any] | None = None,
    implementation: str = 'reference',
    optimizer: Any = 'adamw',
    **model: Any,
) -> RunConfig:
    """Three layers, sixteen rows, bf16; with these fields changed."""
    decoder = DecoderConfig(
        vocab_size=V, d_model=D, num_layers=L, pattern=(layer(implementation),), compute_dtype='bfloat16'
    )
    return RunConfig(
        model=dataclasses.replace(decoder, **model),
        optimizer=OptimizerConfig(kind=optimizer),
        step=StepConfig(**{'batch_size': ROWS, 'sequence_length': LENGTH, **(step or {})}),
        mesh=MeshConfig(**{'data': 1, **(mesh or {})}),
    )


def sizes_of(run: RunConfig) -> dict[str, int]:
    """Its mesh axes."""
    return {axis: getattr(run.mesh, axis) for axis in MESH_AXES}
