"""When every stage does what: schedules run tick by tick, each stage doing at most one piece of work in a tick.

What a stage has finished in a tick is at the next stage in the tick after.
"""

import dataclasses
from collections.abc import Iterator

from llm.parallel.pipeline.granularity import Costs, Granularity, Piece
from llm.parallel.pipeline.schedules import Operation, Pass, PipelineConfig, orders

GRADIENT_USERS = (Operation.BACKWARD, Operation.INPUT_GRADIENT, Operation.RECOMPUTE_INPUT_GRADIENT)
# Those that leave something for weight gradients.
KEEPERS = (Operation.INPUT_GRADIENT, Operation.RECOMPUTE_INPUT_GRADIENT)

Timeline = list[list[Piece | None]]  # [ticks][stages]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be scheduled.

    Attributes:
        repeats: of the layer pattern, in the whole model.
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

    @property
    def staged_repeats(self) -> int:
        """Repeats that some stage has: the first of the model. The others, fewer than there are blocks, come after."""
        return self.chunk_repeats * self.stages * self.config.chunks

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


class Arrivals:
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
    arrivals = Arrivals(problem)
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


def lock_step_cost(timeline: Timeline, costs: Costs) -> float:
    """Cost of a step when every tick takes as long as its slowest stage."""
    return sum(
        max((costs.of(piece.operation) * piece.count for piece in row if piece is not None), default=0.0)
        for row in timeline
    )
