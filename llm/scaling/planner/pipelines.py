"""What a pipeline's schedule costs a run: the share of a step in which stages wait, and what they keep meanwhile.

Both are read off the very table of ticks that the run would execute.
"""

import functools

from llm.errors import UserError
from llm.models.decoder import DecoderConfig
from llm.parallel.pipeline.granularity import Costs
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.pipeline.table import Table
from llm.scaling.planner.abstract import Placement, model_specs
from llm.scaling.planner.layer_costs import LayerCosts
from llm.scaling.planner.run_config import RunConfig
from llm.training.pipeline import make_pipeline_table, repeat_costs_of


@functools.lru_cache(maxsize=256)
def _costs(model: DecoderConfig, length: int) -> Costs:
    # Of one row: rows change all costs alike.
    return repeat_costs_of(model, model_specs(model), 1, length)


@functools.lru_cache(maxsize=256)
def _table(pipeline: PipelineConfig, model: DecoderConfig, stages: int, microbatches: int, length: int) -> Table:
    return make_pipeline_table(pipeline, model, model_specs(model), stages, microbatches, (1, length))


def schedule_of(run: RunConfig, stages: int) -> Table:
    """The table of a run in `stages` stages.

    Raises:
        UserError: the schedule cannot run the layers or the microbatches, or the model is no decoder.
    """
    if not isinstance(run.model, DecoderConfig):
        raise UserError(
            f'the planner knows pipelines of decoders, and the model is an {type(run.model).__name__}',
            where='MeshConfig.pipeline',
            fix='Use 1, and other axes of the mesh.',
        )
    return _table(run.pipeline, run.model, stages, run.step.gradient_accumulation, run.step.sequence_length)


def idle_share(run: RunConfig, placement: Placement) -> float:
    """The bubble of the pipeline's own schedule: stages step together, a tick lasts as long as its longest piece.

    Layers left over when stages have equally many are run by all of them, each some of the rows where it can.

    Raises:
        UserError: the schedule cannot run the layers or the microbatches.
    """
    stages, microbatches = placement.mesh.shape['pipeline'], run.step.gradient_accumulation
    if stages == 1:
        return 0.0
    table = schedule_of(run, stages)
    assert isinstance(run.model, DecoderConfig)  # as schedule_of has seen
    costs = _costs(run.model, run.step.sequence_length)
    whole = costs.forward + costs.recompute + costs.input_gradient + costs.weight_gradient
    repeats = run.model.num_layers / len(run.model.pattern)  # leading layers count as the others
    left = repeats - table.problem.staged_repeats
    rows = run.step.batch_size // microbatches // placement.ways('batch')
    shared = stages if rows % stages == 0 else 1
    return 1 - microbatches * repeats / stages * whole / (table.cost(costs) + microbatches * left / shared * whole)


def kept_bytes(run: RunConfig, costs: list[LayerCosts], stages: int) -> float:
    """Bytes per token of a microbatch that a stage keeps from tick to tick, in all of its buffers.

    Args:
        costs: of the layers of the pattern.

    Raises:
        UserError: the schedule cannot run the layers or the microbatches.
    """
    table = schedule_of(run, stages)
    assert isinstance(run.model, DecoderConfig)  # as schedule_of has seen
    # Remat is of a whole repeat: of its layers' inputs only the first is kept, unless all is.
    inputs = len(costs) if run.model.remat == 'none' else 1
    kept = sum(cost.saved(run.model) - cost.input_size for cost in costs) + inputs * costs[0].input_size
    everything = sum(cost.input_size + cost.all() for cost in costs)
    # Weight gradients need what goes into products with weights and the gradients of what comes out.
    operands = sum(cost.product_operands() for cost in costs)
    return (
        table.input_slots * table.problem.chunk_repeats * kept
        + table.gradient_slots * costs[0].input_size
        + table.residual_cells * everything
        + table.weight_cells * operands
    )
