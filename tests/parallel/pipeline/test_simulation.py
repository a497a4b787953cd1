"""Lock-step costs: what is known about naive ticks, and how near the papers' formulas the chosen pieces come."""

import pytest

from llm.parallel.pipeline.granularity import Costs, Granularity
from llm.parallel.pipeline.planning import plan
from llm.parallel.pipeline.schedules import paper_cost
from llm.parallel.pipeline.simulation import lock_step_cost, run_orders
from tests.parallel.pipeline.problems import CONFIGS, COSTS, problem


@pytest.mark.parametrize(('schedule', 'expected'), [('gpipe', 76), ('1f1b', 106)])
def test_whole_passes_as_ticks(schedule, expected):
    """A backward pass of 3 beside a forward pass of 1, counted beforehand and by hand: 1F1B loses to GPipe."""
    timeline = run_orders(problem(schedule, repeats=1), Granularity(1, 'whole', 1, 1))
    assert len(timeline) == 38
    assert lock_step_cost(timeline, Costs()) == expected


@pytest.mark.parametrize('costs', COSTS.values(), ids=COSTS)
@pytest.mark.parametrize('schedule', CONFIGS)
def test_costs_are_within_five_percent_of_the_paper(schedule, costs):
    case = problem(schedule)
    parts = 8 * costs.forward, 8 * (costs.recompute + costs.input_gradient), 8 * costs.weight_gradient
    paper = paper_cost(case.config, 4, 16, *parts)
    assert lock_step_cost(plan(case, costs), costs) <= 1.05 * paper
    # Less than all the work of one stage is impossible.
    assert lock_step_cost(plan(case, costs), costs) >= 16 * sum(parts)


@pytest.mark.parametrize('costs', COSTS.values(), ids=COSTS)
@pytest.mark.parametrize('repeats', [1, 2, 3, 8])
def test_zero_bubble_costs_less_than_1f1b(repeats, costs):
    zero, one = (plan(problem(name, repeats=repeats), costs) for name in ('zero_bubble', '1f1b'))
    assert lock_step_cost(zero, costs) < lock_step_cost(one, costs)


def test_interleaving_costs_less_than_1f1b():
    costs = COSTS['equal']
    interleaved, one = (lock_step_cost(plan(problem(name), costs), costs) for name in ('interleaved', '1f1b'))
    assert interleaved < one


def test_zero_bubble_idles_less():
    """Stage 0 waits for less than ZB-H1's bubble of 3 (1 + 2 - 1) ticks, where 1F1B's is of 3 (1 + 2 + 1)."""
    timeline = plan(problem('zero_bubble', repeats=1), Costs())
    assert sum(row[0] is not None for row in timeline) == 16 * 4
    assert len(timeline) - 16 * 4 <= 6
