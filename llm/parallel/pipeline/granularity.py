"""Cutting passes into pieces that cost about the same.

All stages step together: a tick takes as long as the slowest stage's operation. A backward pass with recomputation
costs three times a forward pass, so stages that do one or the other in a tick would wait for most of the time. Here a
pass takes several ticks, a few repeats of the layers at a time, as many as make its pieces cost what the other pass's
pieces cost.
"""

import dataclasses
import itertools
import math
from typing import Literal

from llm.parallel.pipeline.schedules import Operation


@dataclasses.dataclass(frozen=True)
class Costs:
    """Cost of the parts of one repeat of the layers, for one microbatch; any unit, FLOPs say."""

    forward: float = 1.0
    recompute: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0

    def of(self, operation: Operation) -> float:
        """Cost of an operation on one repeat."""
        return {
            Operation.IDLE: 0.0,
            Operation.FORWARD: self.forward,
            Operation.BACKWARD: self.recompute + self.input_gradient + self.weight_gradient,
            Operation.RECOMPUTE: self.recompute,
            Operation.INPUT_GRADIENT: self.input_gradient,
            Operation.RECOMPUTE_INPUT_GRADIENT: self.recompute + self.input_gradient,
            Operation.WEIGHT_GRADIENT: self.weight_gradient,
        }[operation]


@dataclasses.dataclass(frozen=True, order=True)
class Piece:
    """What one stage does in one tick: `operation` on the repeats first..first+count-1 of a chunk."""

    operation: Operation
    microbatch: int
    chunk: int
    first: int
    count: int


BackwardKind = Literal['whole', 'grouped', 'parts']


@dataclasses.dataclass(frozen=True)
class Granularity:
    """How many repeats a piece has at most.

    Attributes:
        backward: 'whole': every piece does all of the backward pass of its repeats. 'grouped': pieces of input
            gradients (with recomputation), then a piece of weight gradients. 'parts': pieces of recomputation, of input
            gradients and of weight gradients, for when there are few repeats; residuals of a piece are kept between.
        input_gradient: repeats in a piece of BACKWARD, RECOMPUTE or either kind of INPUT_GRADIENT.
    """

    forward: int
    backward: BackwardKind
    input_gradient: int
    weight_gradient: int

    @property
    def kept_repeats(self) -> int:
        """Repeats whose residuals, or what their weight gradients need, are kept from piece to piece."""
        if self.backward == 'whole':
            return 0
        group = max(self.weight_gradient, self.input_gradient)
        return group + (self.input_gradient if self.backward == 'parts' else 0)

    def mixed_cost(self, costs: Costs, repeats: int) -> float:
        """Cost of a chunk's forward and backward pass if every tick costs what the dearest of their pieces costs."""
        pieces = self.forward_pieces(0, 0, repeats) + self.backward_pieces(0, 0, repeats)
        return len(pieces) * max(costs.of(piece.operation) * piece.count for piece in pieces)

    def forward_pieces(self, microbatch: int, chunk: int, repeats: int) -> list[Piece]:
        """The forward pass of a chunk of so many repeats."""
        return [
            Piece(Operation.FORWARD, microbatch, chunk, first, count) for first, count in _cut(repeats, self.forward)
        ]

    def backward_pieces(self, microbatch: int, chunk: int, repeats: int) -> list[Piece]:
        """The backward pass with its weight gradients as soon as they can be, from the last repeat to the first."""
        if self.backward == 'whole':
            return self.input_gradient_pieces(microbatch, chunk, repeats)
        pieces = []
        for start, size in reversed(_cut(repeats, max(self.weight_gradient, self.input_gradient))):
            pieces += self._input_gradients(microbatch, chunk, start, size)
            pieces += self._weight_gradients(microbatch, chunk, start, size)
        return pieces

    def input_gradient_pieces(self, microbatch: int, chunk: int, repeats: int) -> list[Piece]:
        """The backward pass without its weight gradients (with them if they are not split off)."""
        return self._input_gradients(microbatch, chunk, 0, repeats)

    def weight_gradient_pieces(self, microbatch: int, chunk: int, repeats: int) -> list[Piece]:
        """The weight gradients that `input_gradient_pieces` left."""
        return self._weight_gradients(microbatch, chunk, 0, repeats)

    def _input_gradients(self, microbatch: int, chunk: int, start: int, size: int) -> list[Piece]:
        operations = {
            'whole': [Operation.BACKWARD],
            'grouped': [Operation.RECOMPUTE_INPUT_GRADIENT],
            'parts': [Operation.RECOMPUTE, Operation.INPUT_GRADIENT],
        }[self.backward]
        return [
            Piece(operation, microbatch, chunk, start + first, count)
            for first, count in reversed(_cut(size, self.input_gradient))
            for operation in operations
        ]

    def _weight_gradients(self, microbatch: int, chunk: int, start: int, size: int) -> list[Piece]:
        return [
            Piece(Operation.WEIGHT_GRADIENT, microbatch, chunk, start + first, count)
            for first, count in reversed(_cut(size, self.weight_gradient))
        ]


def _cut(repeats: int, most: int) -> list[tuple[int, int]]:
    """`repeats` in as few pieces of at most `most` as possible, of sizes as equal as possible: (first, count)."""
    pieces = math.ceil(repeats / most)
    edges = [i * repeats // pieces for i in range(pieces + 1)]
    return [(low, high - low) for low, high in itertools.pairwise(edges)]


def candidates(costs: Costs, repeats: int, *, split: bool) -> list[Granularity]:
    """Granularities worth a simulation for chunks of `repeats` repeats; those that keep least in memory first.

    Args:
        split: whether weight gradients are put off, as zero-bubble does: then 'whole' is none.
    """
    kinds: list[tuple[BackwardKind, float]] = [
        ('whole', costs.of(Operation.BACKWARD)),
        ('grouped', costs.of(Operation.RECOMPUTE_INPUT_GRADIENT)),
        ('parts', max(costs.recompute, costs.input_gradient)),
    ]
    found: set[Granularity] = set()
    for kind, unit in kinds:
        if (kind == 'whole' and split) or (kind == 'parts' and not costs.recompute):
            continue
        # A tick costs a whole number of repeats of some operation.
        units = (unit, costs.forward) if kind == 'whole' else (unit, costs.forward, costs.weight_gradient)
        for tick in {count * cost for cost in units for count in range(1, repeats + 1)}:
            forward, backward, weight = (
                min(repeats, max(1, math.floor(tick / cost + 1e-6)))
                for cost in (costs.forward, unit, costs.weight_gradient)
            )
            found.add(Granularity(forward, kind, backward, backward if kind == 'whole' else weight))
    return sorted(
        found, key=lambda each: (each.kept_repeats, -each.forward, -each.input_gradient, -each.weight_gradient)
    )
