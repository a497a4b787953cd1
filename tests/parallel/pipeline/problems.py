"""Problems that tests of this folder share."""

from llm.parallel.pipeline.granularity import Costs
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.pipeline.simulation import Problem

CONFIGS = {
    'gpipe': PipelineConfig('gpipe'),
    '1f1b': PipelineConfig('1f1b'),
    'interleaved': PipelineConfig('interleaved', chunks=2),
    'zero_bubble': PipelineConfig('zero_bubble'),
}
# Relative to the forward pass of a repeat. Compiled FLOPs of a repeat of Llama 3 8B at 2,048 and 8,192 tokens.
COSTS = {
    'equal': Costs(1.0, 1.0, 1.0, 1.0),
    'short rows': Costs(1.0, 0.75, 1.07, 0.93),
    'long rows': Costs(1.0, 0.79, 1.24, 0.76),
}


def problem(schedule: str, stages: int = 4, microbatches: int = 16, repeats: int = 8) -> Problem:
    """`schedule` with so many repeats in every stage."""
    return Problem(CONFIGS[schedule], stages, microbatches, stages * repeats)
