"""Zero-bubble schedules, decided tick by tick: weight gradients fill the time in which a stage would wait."""

import dataclasses

from llm.parallel.pipeline.granularity import Granularity, Piece
from llm.parallel.pipeline.schedules import Operation
from llm.parallel.pipeline.simulation import KEEPERS, Arrivals, Problem, Timeline


@dataclasses.dataclass(frozen=True)
class ZeroBubbleGranularity:
    """Pieces of a zero-bubble schedule.

    Attributes:
        steady: of forward passes, and of the backward passes of microbatches before `first_split`.
        split: of the other backward passes, whose weight gradients may be put off.
    """

    steady: Granularity
    split: Granularity
    first_split: int


class _Stage:
    """What a stage of a zero-bubble schedule does next (Qi et al. 2023, section 3.1, decided tick by tick).

    Input gradients come first, since another stage waits for them; then forward passes, as long as no more than
    `in_flight` microbatches have their activations kept; weight gradients fill what is left, or come first when no more
    may be put off. Microbatches before `first_split` have theirs at once: the bubble that is filled is at the end.
    """

    def __init__(self, problem: Problem, cut: ZeroBubbleGranularity, stage: int, in_flight: int) -> None:
        self.stage, self.in_flight, self.deferred = stage, in_flight, problem.config.deferred or problem.stages
        self.repeats, self.microbatches, self.cut = problem.chunk_repeats, problem.microbatches, cut
        self.forwards: list[Piece] = []
        self.inputs: list[Piece] = []
        self.weights: list[Piece] = []
        self.waiting: list[Piece] = []  # weight gradients of the microbatch whose input gradients are under way
        self.started = self.forwarded = self.opened = self.closed = self.kept = 0

    def done(self) -> bool:
        return self.closed == self.microbatches and not self.kept

    def choose(self, arrivals: Arrivals, tick: int) -> Piece | None:
        """The next piece, taken off its queue; None if nothing can be done."""
        if not self.forwards and self.started < self.microbatches and self.started - self.closed < self.in_flight:
            self.forwards = self.cut.steady.forward_pieces(self.started, 0, self.repeats)
        if not self.inputs and self.opened < self.forwarded:
            if self.opened < self.cut.first_split:
                self.inputs = self.cut.steady.backward_pieces(self.opened, 0, self.repeats)
            else:
                self.inputs = self.cut.split.input_gradient_pieces(self.opened, 0, self.repeats)
                self.waiting = self.cut.split.weight_gradient_pieces(self.opened, 0, self.repeats)
            self.opened += 1
        for queue, early in ((self.inputs, False), (self.forwards, False), (self.weights, False), (self.inputs, True)):
            if not queue:
                continue
            wanted = needed = queue[0]
            if wanted.operation in KEEPERS and self.kept + wanted.count > self.deferred * self.repeats:
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
        if piece.operation in KEEPERS:
            self.kept += piece.count
            while self.waiting and self.waiting[0].first >= piece.first:
                self.weights.append(self.waiting.pop(0))
        self.closed += queue is self.inputs and not queue
        return piece


def run_zero_bubble(problem: Problem, cut: ZeroBubbleGranularity, in_flight: tuple[int, ...]) -> Timeline:
    """Weight gradients fill the bubbles; `in_flight` microbatches' activations may be kept on each stage."""
    stages = [_Stage(problem, cut, stage, in_flight[stage]) for stage in range(problem.stages)]
    arrivals = Arrivals(problem)
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
