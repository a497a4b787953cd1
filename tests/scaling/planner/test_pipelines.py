"""What the planner says that stages keep, against the buffers of the executor."""

import math

import jax
import jax.numpy as jnp
import pytest

from llm.models.decoder import Decoder
from llm.models.parameters import parameter_specs
from llm.parallel.pipeline.split import split_backward
from llm.scaling.planner.abstract import Placement
from llm.scaling.planner.layer_costs import layer_costs
from llm.scaling.planner.pipelines import idle_share, kept_bytes, schedule_of
from llm.scaling.planner.stacks import stacks_of
from llm.training.stages import staged
from tests.scaling.planner.small_runs import LENGTH, D, sizes_of, small_run

ROWS = 4  # of a microbatch


def _pipeline_run(remat, implementation, stages=2, layers=16):
    step = {'batch_size': 8 * ROWS, 'gradient_accumulation': 8}
    return small_run(
        mesh={'pipeline': stages}, step=step, remat=remat, num_layers=layers, implementation=implementation
    )


@pytest.mark.parametrize(
    ('remat', 'implementation'),
    [(remat, kernel) for remat in ('full', 'dots_no_batch', 'none') for kernel in ('reference', 'chunked')]
    + [('dots', 'reference')],
)
def test_what_is_kept_is_what_the_executor_keeps(remat, implementation):
    run = _pipeline_run(remat, implementation)
    stages = staged(run.model, 0.0).stages
    specs = parameter_specs(Decoder(run.model))['layers']
    parameters = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[1:], jnp.bfloat16), specs)
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    context = jax.eval_shape(stages.context, {'segment_ids': tokens, 'positions': tokens}, None)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, D), jnp.bfloat16)
    split = split_backward(lambda p, x, c: stages.repeat(p, x, jnp.int32(0), c), parameters, x, context, stages.remat)

    def size(structs):
        return sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in structs) / (ROWS * LENGTH)

    table = schedule_of(run, 2)
    actual = (
        table.input_slots * table.problem.chunk_repeats * size(split.kept)
        + table.gradient_slots * size([x])
        + table.residual_cells * size(split.residuals)
        + table.weight_cells * size(split.operands)
    )
    placement = Placement.of(sizes_of(run), run.rules)
    (stack,) = stacks_of(run.model, run.row)
    costs = [layer_costs(layer, run.model, placement, stack, 'cpu') for layer in run.model.pattern]
    assert kept_bytes(run, costs, 2) == pytest.approx(actual, rel=0.12)


def test_layers_that_are_left_over_do_not_wait():
    """17 layers on 4 stages: 16 in the pipeline and one shared, of rows that they can share, 4, or cannot, 1."""
    even, uneven = (_pipeline_run('full', 'chunked', 4, layers) for layers in (16, 17))
    few = small_run(
        mesh={'pipeline': 4},
        step={'batch_size': 8, 'gradient_accumulation': 8},
        remat='full',
        num_layers=17,
        implementation='chunked',
    )
    shares = [idle_share(run, Placement.of(sizes_of(run), run.rules)) for run in (even, uneven, few)]
    # In units of the work of a layer, of all microbatches: a stage's work, over that and the bubble.
    steps = [4 / (1 - shares[0]), (17 / 4) / (1 - shares[1]), (17 / 4) / (1 - shares[2])]
    assert steps[1] == pytest.approx(steps[0] + 1 / 4)
    assert steps[2] == pytest.approx(steps[0] + 1)
