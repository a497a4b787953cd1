"""Which of the timelines that a schedule can become is run."""

import dataclasses

from llm.parallel.pipeline.granularity import Costs, Granularity, candidates
from llm.parallel.pipeline.schedules import PipelineConfig, paper_cost
from llm.parallel.pipeline.simulation import Problem, Timeline, lock_step_cost, run_orders
from llm.parallel.pipeline.zero_bubble import ZeroBubbleGranularity, run_zero_bubble

# What keeping less in memory may cost: of the paper's cost, or if nothing comes near that, of the cheapest.
_PAPER_SLACK, _SLACK = 1.04, 1.01


def plan(problem: Problem, costs: Costs) -> Timeline:
    """The timeline to run.

    Its pieces keep as little in memory as they can at a cost of at most 4% more than the schedule's paper says; if none
    come near that, at a cost of at most 1% more than the cheapest.
    """
    if problem.config.schedule == 'zero_bubble':
        return _plan_zero_bubble(problem, costs)
    return run_orders(problem, choose_granularity(problem, costs))


def plan_evaluation(problem: Problem) -> Timeline:
    """Forward passes only, a whole chunk in each tick: they all cost the same."""
    whole = problem.chunk_repeats
    return run_orders(problem, Granularity(whole, 'whole', whole, whole))


def choose_granularity(problem: Problem, costs: Costs) -> Granularity:
    """That of `plan` for a schedule with an order."""
    problem = _shortened(problem)
    tried = candidates(costs, problem.chunk_repeats, split=False)
    if problem.config.schedule != 'gpipe':  # there, forward and backward passes hardly meet in a tick
        tried = _promising(tried, costs, problem.chunk_repeats)
    scored = [lock_step_cost(run_orders(problem, cut), costs) for cut in tried]
    limit = max(_paper(problem, costs) * _PAPER_SLACK, min(scored) * _SLACK)
    return next(cut for cost, cut in zip(scored, tried, strict=True) if cost <= limit)


def _shortened(problem: Problem) -> Problem:
    """Three microbatches a stage, on which everything is tried: more is more of the same."""
    return dataclasses.replace(problem, microbatches=min(problem.microbatches, 3 * problem.stages))


def zero_bubble_granularities(problem: Problem, costs: Costs) -> list[ZeroBubbleGranularity]:
    """What `plan` tries: all weight gradients split off, or those of as many microbatches as there are stages."""
    steady = choose_granularity(dataclasses.replace(problem, config=PipelineConfig('1f1b')), costs)
    split = _promising(candidates(costs, problem.chunk_repeats, split=True), costs, problem.chunk_repeats)
    return [ZeroBubbleGranularity(steady, cut, problem.microbatches - problem.stages) for cut in split] + [
        ZeroBubbleGranularity(cut, cut, 0) for cut in split
    ]


def in_flight_limits(stages: int) -> list[tuple[int, ...]]:
    """How many activations a zero-bubble stage may keep: as 1F1B does on that stage, up to as on the first."""
    return sorted({tuple(min(stages, stages - stage + extra) for stage in range(stages)) for extra in range(stages)})


def _plan_zero_bubble(problem: Problem, costs: Costs) -> Timeline:
    tried = _shortened(problem)

    def cheapest(cut: ZeroBubbleGranularity) -> tuple[float, tuple[int, ...]]:
        limits = in_flight_limits(problem.stages)
        return min((lock_step_cost(run_zero_bubble(tried, cut, limit), costs), limit) for limit in limits)

    found = [cheapest(cut) for cut in zero_bubble_granularities(tried, costs)]
    lowest = min(cost for cost, _ in found)
    other = lock_step_cost(plan(dataclasses.replace(tried, config=PipelineConfig('1f1b')), costs), costs)
    limit = max(_paper(tried, costs) * _PAPER_SLACK, lowest * _SLACK)
    # There is no point in keeping more than 1F1B for less than 1%.
    limit = min(limit, max(0.99 * other, lowest))
    chosen = next(number for number, (cost, _) in enumerate(found) if cost <= limit)
    return run_zero_bubble(problem, zero_bubble_granularities(problem, costs)[chosen], found[chosen][1])


def _promising(tried: list[Granularity], costs: Costs, repeats: int) -> list[Granularity]:
    """Without those whose pieces differ so much in cost that most ticks would be waited in."""
    mixed = [cut.mixed_cost(costs, repeats) for cut in tried]
    return [cut for cut, cost in zip(tried, mixed, strict=True) if cost <= 1.1 * min(mixed)]


def _paper(problem: Problem, costs: Costs) -> float:
    repeats = problem.chunk_repeats * problem.config.chunks
    return paper_cost(
        problem.config,
        problem.stages,
        problem.microbatches,
        repeats * costs.forward,
        repeats * (costs.recompute + costs.input_gradient),
        repeats * costs.weight_gradient,
    )
