"""What a dry run says of a pipeline."""

import dataclasses

import pytest

from llm.errors import UserError
from llm.jobs.describe import describe
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.multi_token import MultiTokenConfig
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.sharding import AxisRules
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig

LAYER = LayerConfig(mixer=AttentionConfig(2, 2, 8), feed_forward=FeedForwardConfig(d_ff=32))
MODEL = DecoderConfig(vocab_size=64, d_model=16, num_layers=8, pattern=(LAYER,))


def _describe(microbatches: int, pipeline: PipelineConfig) -> str:
    step = StepConfig(batch_size=16, sequence_length=8, gradient_accumulation=microbatches)
    mesh = MeshConfig(data=1, pipeline=4)
    return describe(MODEL, OptimizerConfig(), step, 10, mesh, AxisRules(), pipeline)


def test_cost_of_a_schedule():
    (line,) = (line for line in _describe(8, PipelineConfig('gpipe')).splitlines() if line.startswith('pipeline'))
    # By the formula (8 + 4 - 1) / 8 times the work; ticks of whole passes come to the same.
    assert line.startswith('pipeline        gpipe, 4 stages, 8 microbatches: 1.38 times the work of a stage (1.38 by')


def test_what_multi_token_prediction_adds():
    model = dataclasses.replace(MODEL, multi_token=MultiTokenConfig(2, 'parallel'))
    text = describe(model, OptimizerConfig(), StepConfig(16, 8), 10, MeshConfig(data=1), AxisRules())
    (line,) = (line for line in text.splitlines() if line.startswith('of these'))
    # Of each head four projections and three matrices, and two norms.
    assert (
        line
        == f'of these        {2 * (4 * 16 * 16 + 3 * 16 * 32 + 2 * 16):,} for multi-token prediction, in training alone'
    )


def test_a_schedule_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match='2 microbatches are fewer than 4 pipeline stages'):
        _describe(2, PipelineConfig('1f1b'))
