"""What a pipeline's schedule costs a run: the share of a step in which stages wait, and what they keep meanwhile.

Both are read off the very table of ticks that the run would execute.
"""

import dataclasses
import functools

from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.model import ModelConfig
from llm.parallel.pipeline.granularity import Costs
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.pipeline.table import Table
from llm.scaling.planner.abstract import Placement, model_specs
from llm.scaling.planner.layer_costs import LayerCosts
from llm.scaling.planner.run_config import RunConfig
from llm.scaling.planner.stacks import PlannedStack, stacks_of
from llm.training.pipeline import make_pipeline_table, repeat_costs_of


@functools.lru_cache(maxsize=256)
def _costs(model: ModelConfig, length: int, encoder_length: int) -> Costs:
    # Of one row: rows change all costs alike.
    return repeat_costs_of(model, model_specs(model), 1, length, encoder_length=encoder_length)


def _encoder_of(model: EncoderDecoderConfig) -> EncoderConfig:
    """One repeat of its encoder's layers, as a model of its own."""
    layers = dataclasses.replace(model.encoder, num_layers=len(model.encoder.pattern))
    return EncoderConfig(
        1, model.d_model, layers, position=model.position, head=None, compute_dtype=model.compute_dtype
    )


@functools.lru_cache(maxsize=256)
def _table(pipeline: PipelineConfig, model: ModelConfig, stages: int, microbatches: int, length: int) -> Table:
    return make_pipeline_table(pipeline, model, model_specs(model), stages, microbatches, (1, length))


def schedule_of(run: RunConfig, stages: int) -> Table:
    """The table of a run in `stages` stages.

    Raises:
        UserError: the schedule cannot run the layers or the microbatches.
    """
    return _table(run.pipeline, run.model, stages, run.step.gradient_accumulation, run.step.sequence_length)


def ways_of_rows(run: RunConfig, placement: Placement) -> int:
    """Among how many stages the rows of a microbatch are divided in layers that no stage has: all of them, or 1."""
    stages = placement.mesh.shape['pipeline']
    rows = run.step.batch_size // run.step.gradient_accumulation // placement.ways('batch')
    return stages if rows % stages == 0 else 1


def idle_share(run: RunConfig, placement: Placement) -> float:
    """The bubble of the pipeline's own schedule: stages step together, a tick lasts as long as its longest piece.

    Layers that no stage has are run by all of them, each some of the rows where it can: those before the first stage,
    an encoder's say; those left over when stages have equally many; and those of multi-token prediction.

    Raises:
        UserError: the schedule cannot run the layers or the microbatches.
    """
    stages, microbatches = placement.mesh.shape['pipeline'], run.step.gradient_accumulation
    if stages == 1:
        return 0.0
    table, row = schedule_of(run, stages), run.row
    *others, last = stacks_of(run.model, row)
    costs = _costs(run.model, row.read, row.text)
    staged = table.problem.staged_repeats
    together = _cost_together(last, costs, staged)
    if others:
        assert isinstance(run.model, EncoderDecoderConfig)
        together += _cost_together(others[0], _costs(_encoder_of(run.model), row.text, row.text), 0)
    work = staged * _whole(costs) + together
    step = table.cost(costs) + microbatches * together / ways_of_rows(run, placement)
    return 1 - microbatches * work / stages / step


def _whole(costs: Costs) -> float:
    return costs.forward + costs.recompute + costs.input_gradient + costs.weight_gradient


def _cost_together(stack: PlannedStack, costs: Costs, staged: int) -> float:
    """What the layers but those of `staged` repeats cost for a microbatch; any layer counts as one of the pattern."""
    size = len(stack.config.pattern)
    return (len(stack.layers) / size - staged) * _whole(costs) + stack.before / size * costs.forward


def kept_bytes(run: RunConfig, stack: PlannedStack, costs: list[LayerCosts], stages: int) -> float:
    """Bytes per token of a microbatch that a stage keeps from tick to tick, in all of its buffers.

    Args:
        stack: the last one. costs: of the layers of its pattern.

    Raises:
        UserError: the schedule cannot run the layers or the microbatches.
    """
    table = schedule_of(run, stages)
    inputs, memory = len(costs) * costs[0].input_size, costs[0].input_size * stack.memory / stack.tokens
    # What goes from stage to stage: the stream, and the memory that its layers attend to beside it.
    message = costs[0].input_size + memory
    # Remat is of a whole repeat: of its layers' inputs only the first is kept, unless all is. Beside a memory these are
    # parts of what is kept anyway, which are kept as well.
    read = message if stack.config.remat != 'none' else inputs + (message + memory if stack.memory else 0.0)
    kept = read + sum(cost.saved(stack.config) - cost.input_size for cost in costs)
    everything = memory + sum(cost.input_size + cost.all() for cost in costs)
    # Weight gradients need what goes into products with weights and the gradients of what comes out.
    operands = memory + sum(cost.product_operands(bias=_has_bias(stack)) for cost in costs)
    return (
        table.input_slots * table.problem.chunk_repeats * kept
        + table.gradient_slots * message * (2 if _reads_trunk(run.model, table) else 1)
        + table.residual_cells * everything
        + table.weight_cells * operands
    )


def _has_bias(stack: PlannedStack) -> bool:
    return not isinstance(stack.config, DecoderConfig) and stack.config.relative_bias is not None


def _reads_trunk(model: ModelConfig, table: Table) -> bool:
    """Whether gradients go back both to what the last layer of the stages gives and to what it reads.

    So it is for parallel heads of multi-token prediction, if no layer of the model comes after those of the stages.
    """
    if not isinstance(model, DecoderConfig) or model.multi_token is None or model.multi_token.kind != 'parallel':
        return False
    return table.problem.staged_repeats == model.repeats and not model.remainder
