"""Tables: every one is valid, buffers are as small as they should be, and damage is noticed."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llm.parallel.pipeline.granularity import Costs, candidates
from llm.parallel.pipeline.planning import in_flight_limits, plan, plan_evaluation, zero_bubble_granularities
from llm.parallel.pipeline.schedules import Operation, PipelineConfig
from llm.parallel.pipeline.simulation import Problem, run_orders
from llm.parallel.pipeline.table import make_table
from llm.parallel.pipeline.validation import validate
from llm.parallel.pipeline.zero_bubble import run_zero_bubble
from tests.parallel.pipeline.problems import CONFIGS, problem

costs = st.builds(Costs, *(st.floats(0.3, 3.0) for _ in range(4)))


@st.composite
def problems(draw):
    config = draw(
        st.sampled_from(
            [*CONFIGS.values(), PipelineConfig('interleaved', 3), PipelineConfig('zero_bubble', deferred=1)]
        )
    )
    stages, repeats = draw(st.integers(2, 5)), draw(st.integers(1, 5))
    microbatches = draw(st.integers(stages, 3 * stages))
    if config.chunks > 1:
        microbatches -= microbatches % stages
    return Problem(config, stages, microbatches, stages * config.chunks * repeats)


@hypothesis.settings(max_examples=60)
@hypothesis.given(problems(), costs, st.data())
def test_every_table_is_valid(case, costs, data):
    if case.config.schedule == 'zero_bubble':
        cut = data.draw(st.sampled_from(zero_bubble_granularities(case, costs)))
        timeline = run_zero_bubble(case, cut, data.draw(st.sampled_from(in_flight_limits(case.stages))))
    else:
        timeline = run_orders(case, data.draw(st.sampled_from(candidates(costs, case.chunk_repeats, split=False))))
    validate(make_table(case, timeline))


@hypothesis.settings(max_examples=10)
@hypothesis.given(problems())
def test_evaluation_runs_every_forward_pass_once(case):
    case = dataclasses.replace(case, config=PipelineConfig('gpipe'), evaluation=True)
    table = make_table(case, plan_evaluation(case))
    validate(table)
    assert table.operations == (Operation.IDLE, Operation.FORWARD)
    assert len(table.timeline) == case.microbatches + case.stages - 1


@pytest.mark.parametrize('repeats', [1, 2, 5])
@pytest.mark.parametrize('schedule', CONFIGS)
def test_buffers_do_not_grow_with_microbatches(schedule, repeats):
    def sizes(microbatches):
        case = problem(schedule, microbatches=microbatches, repeats=repeats * CONFIGS[schedule].chunks)
        table = make_table(case, plan(case, Costs()))
        return table.input_slots, table.gradient_slots, table.residual_cells, table.weight_cells

    if schedule == 'gpipe':
        assert [sizes(m)[0] for m in (8, 16, 32)] == [8, 16, 32]
        return
    assert sizes(8) == sizes(16) == sizes(32)
    # One microbatch for each stage; of chunks 2 (p - 1) + (v - 1) p + 1 (Narayanan et al. 2021b, section 2.2), and the
    # one that comes in while the stage is busy.
    assert sizes(32)[0] <= {'1f1b': 4, 'zero_bubble': 4, 'interleaved': 12}[schedule]


@pytest.mark.parametrize('deferred', [1, 2])
def test_zero_bubble_keeps_no_more_than_it_may_put_off(deferred):
    case = Problem(PipelineConfig('zero_bubble', deferred=deferred), 4, 16, 20)
    assert make_table(case, plan(case, Costs())).weight_cells <= deferred * 5


@pytest.mark.parametrize('name', ['operation', 'microbatch', 'first', 'count', 'input_slot', 'receive_inputs'])
def test_a_changed_cell_is_noticed(name):
    case = problem('zero_bubble', microbatches=8, repeats=2)
    table = make_table(case, plan(case, Costs(1.0, 1.0, 1.2, 0.8)))
    validate(table)
    noticed = 0
    busy = np.argwhere(table.columns['operation'] == Operation.FORWARD)
    for tick, stage in busy[1::7]:
        columns = {key: column.copy() for key, column in table.columns.items()}
        columns[name][tick, stage] += 1
        try:
            validate(dataclasses.replace(table, columns=columns))
        except ValueError:
            noticed += 1
    assert noticed == len(busy[1::7])


@pytest.mark.parametrize('name', ['embed', 'loss', 'embed_gradient', 'send_inputs'])
def test_a_joint_operation_left_out_is_noticed(name):
    case = problem('1f1b', microbatches=8, repeats=1)
    table = make_table(case, plan(case, Costs()))
    joint = {key: column.copy() for key, column in table.joint.items()}
    empty = 0 if name == 'send_inputs' else -1
    joint[name][np.flatnonzero(joint[name] != empty)[2]] = empty
    with pytest.raises(ValueError, match='tick'):
        validate(dataclasses.replace(table, joint=joint))


def test_a_buffer_that_is_too_small_is_noticed():
    case = problem('1f1b', microbatches=8, repeats=1)
    table = make_table(case, plan(case, Costs()))
    with pytest.raises(ValueError, match='slot'):
        validate(dataclasses.replace(table, input_slots=table.input_slots - 1))
