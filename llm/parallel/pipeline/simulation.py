"""When every stage does what: schedules run tick by tick, each stage doing at most one piece of work in a tick.

What a stage has finished in a tick is at the next stage in the tick after.
"""

import dataclasses
from collections.abc import Iterator

from llm.parallel.pipeline.granularity import Costs, Granularity, Piece, candidates
from llm.parallel.pipeline.schedules import Operation, Pass, PipelineConfig, orders, paper_cost

GRADIENT_USERS = (Operation.BACKWARD, Operation.INPUT_GRADIENT, Operation.RECOMPUTE_INPUT_GRADIENT)

Timeline = list[list[Piece | None]]  # [ticks][stages]

# What keeping less in memory may cost: of the paper's cost, or if nothing comes near that, of the cheapest.
_PAPER_SLACK, _SLACK = 1.04, 1.01


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be scheduled.

    Attributes:
        repeats: of the layer pattern, in all stages together.
        evaluation: whether there are forward passes only.
    """

    config: PipelineConfig
    stages: int
    microbatches: int
    repeats: int
    evaluation: bool = False

    def __post_init__(self) -> None:
        self.config.check(self.stages, self.microbatches, self.repeats)

    @property
    def chunk_repeats(self) -> int:
        """Repeats in one chunk of one stage."""
        return self.repeats // (self.stages * self.config.chunks)

    def after(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """Stage and chunk that take the output of this one; None after the last."""
        if stage + 1 < self.stages:
            return stage + 1, chunk
        return (0, chunk + 1) if chunk + 1 < self.config.chunks else None

    def before(self, stage: int, chunk: int) -> tuple[int, int] | None:
        """Stage and chunk that this one takes its input from; None before the first."""
        if stage > 0:
            return stage - 1, chunk
        return (self.stages - 1, chunk - 1) if chunk > 0 else None


class _Arrivals:
    """The first tick in which an input or an output gradient can be used, by (stage, microbatch, chunk)."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.inputs = {(0, m, 0): 0 for m in range(problem.microbatches)}
        self.gradients: dict[tuple[int, int, int], int] = {}

    def ready(self, stage: int, piece: Piece, tick: int) -> bool:
        """Whether what `piece` needs from other stages is there; what it needs from its own is up to the order."""
        key = (stage, piece.microbatch, piece.chunk)
        if piece.operation == Operation.FORWARD:
            return self.inputs.get(key, tick + 1) <= tick
        if piece.operation in GRADIENT_USERS:
            return self.gradients.get(key, tick + 1) <= tick
        return True

    def finish(self, stage: int, piece: Piece, tick: int) -> None:
        """Record that `piece` ran."""
        problem, m = self.problem, piece.microbatch
        if piece.operation == Operation.FORWARD and piece.first + piece.count == problem.chunk_repeats:
            after = problem.after(stage, piece.chunk)
            if after is None:  # the loss is computed at the end of the tick
                self.gradients[stage, m, piece.chunk] = tick + 1
            else:
                self.inputs[after[0], m, after[1]] = tick + 1
        if piece.operation in GRADIENT_USERS and piece.first == 0:
            before = problem.before(stage, piece.chunk)
            if before is not None:
                self.gradients[before[0], m, before[1]] = tick + 1


def run_orders(problem: Problem, granularity: Granularity) -> Timeline:
    """Every stage does its order's passes one after the other, each as early as it can."""
    repeats = problem.chunk_repeats
    queues: list[Iterator[Piece]] = []
    for order in orders(problem.config, problem.stages, problem.microbatches):
        pieces: list[Piece] = []
        for kind, m, chunk in order:
            if problem.evaluation and kind == Pass.BACKWARD:
                continue
            cut = granularity.forward_pieces if kind == Pass.FORWARD else granularity.backward_pieces
            pieces += cut(m, chunk, repeats)
        queues.append(iter(pieces))
    arrivals = _Arrivals(problem)
    heads = [next(queue, None) for queue in queues]
    timeline: Timeline = []
    while any(heads):
        tick = len(timeline)
        row = [
            piece if piece is not None and arrivals.ready(stage, piece, tick) else None
            for stage, piece in enumerate(heads)
        ]
        if not any(row) and (not timeline or not any(timeline[-1])):
            raise ValueError(f'the orders of {problem} wait for each other at tick {tick}')
        for stage, piece in enumerate(row):
            if piece is not None:
                arrivals.finish(stage, piece, tick)
                heads[stage] = next(queues[stage], None)
        timeline.append(row)
    return timeline


class _ZeroBubbleStage:
    """What a stage of a zero-bubble schedule does next (Qi et al. 2023, section 3.1, decided tick by tick).

    Input gradients come first, since another stage waits for them; then forward passes, as long as no more than
    `in_flight` microbatches have their activations kept; weight gradients fill what is left, or come first when no more
    may be put off.
    """

    def __init__(self, problem: Problem, granularity: Granularity, stage: int, in_flight: int, deferred: int) -> None:
        self.stage, self.in_flight, self.deferred = stage, in_flight, deferred
        self.repeats, self.microbatches, self.granularity = problem.chunk_repeats, problem.microbatches, granularity
        self.forwards: list[Piece] = []
        self.inputs: list[Piece] = []
        self.weights: list[Piece] = []
        self.waiting: list[Piece] = []  # weight gradients of the microbatch whose input gradients are under way
        self.started = self.forwarded = self.opened = self.closed = self.kept = 0

    def done(self) -> bool:
        return self.closed == self.microbatches and not self.kept

    def choose(self, arrivals: _Arrivals, tick: int) -> Piece | None:
        """The next piece, taken off its queue; None if nothing can be done."""
        cut = self.granularity
        if not self.forwards and self.started < self.microbatches and self.started - self.closed < self.in_flight:
            self.forwards = cut.forward_pieces(self.started, 0, self.repeats)
        if not self.inputs and self.opened < self.forwarded:
            self.inputs = cut.input_gradient_pieces(self.opened, 0, self.repeats)
            self.waiting = cut.weight_gradient_pieces(self.opened, 0, self.repeats)
            self.opened += 1
        for queue, early in ((self.inputs, False), (self.forwards, False), (self.weights, False), (self.inputs, True)):
            if not queue:
                continue
            wanted = needed = queue[0]
            if queue is self.inputs and self.kept + wanted.count > self.deferred * self.repeats:
                continue
            if wanted.operation == Operation.RECOMPUTE and not early:  # no hurry before its gradient is there
                needed = dataclasses.replace(wanted, operation=Operation.INPUT_GRADIENT)
            if arrivals.ready(self.stage, needed, tick):
                return self._take(queue)
        return None

    def _take(self, queue: list[Piece]) -> Piece:
        piece = queue.pop(0)
        if piece.operation == Operation.FORWARD:
            self.started += piece.first == 0
            self.forwarded += not queue
        elif piece.operation == Operation.WEIGHT_GRADIENT:
            self.kept -= piece.count
        elif piece.operation != Operation.RECOMPUTE:
            self.kept += piece.count
            self.closed += not queue
            while self.waiting and self.waiting[0].first >= piece.first:
                self.weights.append(self.waiting.pop(0))
        return piece


def run_zero_bubble(problem: Problem, granularity: Granularity, in_flight: list[int]) -> Timeline:
    """Weight gradients fill the bubbles; `in_flight` microbatches' activations may be kept on each stage."""
    deferred = problem.config.deferred or problem.stages
    stages = [
        _ZeroBubbleStage(problem, granularity, stage, in_flight[stage], deferred) for stage in range(problem.stages)
    ]
    arrivals = _Arrivals(problem)
    timeline: Timeline = []
    while not all(stage.done() for stage in stages):
        tick = len(timeline)
        row = [stage.choose(arrivals, tick) for stage in stages]
        for stage, piece in enumerate(row):
            if piece is not None:
                arrivals.finish(stage, piece, tick)
        timeline.append(row)
        if tick > 1 and not any(row) and not any(timeline[-2]):
            raise ValueError(f'zero-bubble stages of {problem} wait for each other at tick {tick}')
    return timeline


def lock_step_cost(timeline: Timeline, costs: Costs) -> float:
    """Cost of a step when every tick takes as long as its slowest stage."""
    return sum(
        max((costs.of(piece.operation) * piece.count for piece in row if piece is not None), default=0.0)
        for row in timeline
    )


def timelines(problem: Problem, granularity: Granularity) -> list[Timeline]:
    """What `problem` can become at this granularity."""
    if problem.config.schedule != 'zero_bubble':
        return [run_orders(problem, granularity)]
    stages = problem.stages
    # As many activations as 1F1B keeps: on each stage, or on the stage that keeps most.
    limits = {tuple(min(stages, stages - stage + extra) for stage in range(stages)) for extra in range(stages)}
    return [run_zero_bubble(problem, granularity, list(limit)) for limit in sorted(limits)]


def _cheapest(problem: Problem, granularity: Granularity, costs: Costs) -> tuple[float, Timeline]:
    return min(
        ((lock_step_cost(timeline, costs), timeline) for timeline in timelines(problem, granularity)),
        key=lambda pair: pair[0],
    )


def choose_granularity(problem: Problem, costs: Costs) -> Granularity:
    """The granularity that keeps least in memory, of those that cost at most 4% more than the schedule's paper says.

    If there is none it is the one that keeps least of those within 1% of the cheapest. Tried on three microbatches a
    stage at most: with more, there is more of the same.
    """
    problem = dataclasses.replace(problem, microbatches=min(problem.microbatches, 3 * problem.stages))
    repeats = problem.chunk_repeats * problem.config.chunks
    paper = paper_cost(
        problem.config,
        problem.stages,
        problem.microbatches,
        repeats * costs.forward,
        repeats * (costs.recompute + costs.input_gradient),
        repeats * costs.weight_gradient,
    )
    found: list[tuple[float, Granularity]] = []
    tried = candidates(costs, problem.chunk_repeats, split=problem.config.schedule == 'zero_bubble')
    if problem.config.schedule != 'gpipe':  # where forward and backward passes meet in a tick, most would cost too much
        mixed = {granularity: granularity.mixed_cost(costs, problem.chunk_repeats) for granularity in tried}
        tried = [granularity for granularity in tried if mixed[granularity] <= 1.1 * min(mixed.values())]
    for granularity in tried:
        cost, _ = _cheapest(problem, granularity, costs)
        if cost <= paper * _PAPER_SLACK:
            return granularity
        found.append((cost, granularity))
    lowest = min(cost for cost, _ in found)
    return next(granularity for cost, granularity in found if cost <= lowest * _SLACK)


def plan_evaluation(problem: Problem) -> Timeline:
    """Forward passes only, a whole chunk in each tick: they all cost the same."""
    whole = problem.chunk_repeats
    return run_orders(problem, Granularity(whole, 'whole', whole, whole))


def plan(problem: Problem, costs: Costs) -> Timeline:
    """The timeline of the lowest lock-step cost at the granularity of `choose_granularity`."""
    return _cheapest(problem, choose_granularity(problem, costs), costs)[1]
