"""A timeline as the table of numbers that the executor reads: what every stage does in every tick, and keeps where.

Buffers have as many slots as are in use at once, so that a slot is taken again as soon as it is free. What a stage
keeps between ticks:

- the input of every repeat of a chunk, from the tick in which the chunk's input arrives to the last tick of its
  backward pass that reads it: one slot a microbatch and chunk in flight;
- the gradient that goes back through a chunk, from its arrival to the last of its input gradients: one slot each;
- residuals, from RECOMPUTE to INPUT_GRADIENT: one cell a repeat;
- what weight gradients need, from the input gradient to WEIGHT_GRADIENT: one cell a repeat.
"""

import dataclasses
from collections.abc import Hashable

import numpy as np

from llm.parallel.pipeline.granularity import Costs
from llm.parallel.pipeline.schedules import Operation
from llm.parallel.pipeline.simulation import GRADIENT_USERS, KEEPERS, Problem, Timeline, lock_step_cost

_READ_INPUTS = (Operation.FORWARD, Operation.BACKWARD, Operation.RECOMPUTE, Operation.RECOMPUTE_INPUT_GRADIENT)


@dataclasses.dataclass(frozen=True)
class Table:
    """A schedule as data.

    Attributes:
        columns: int32 [ticks, stages] by name. operation, microbatch, chunk, first, count: as Piece. input_slot,
            gradient_slot: where its inputs and its gradient are kept. weight_cell: where what weight gradients of its
            last repeat need is kept; those of the repeat before are in the next cell, and so on around the ring.
            receive_inputs, receive_gradients: slots for what arrives
            at the end of the tick; -1 for nothing.
        joint: int32 [ticks] by name, for what all stages do together; -1 for nothing. embed: the microbatch that is
            embedded at the start of the tick, into stage 0's slot embed_slot. loss: the one whose loss and gradient are
            computed at the end of it, the gradient into the last stage's slot loss_slot. embed_gradient: the one whose
            input gradient has come out of the first chunk. send_inputs, send_gradients: 1 if any stage sends.
        input_slots, gradient_slots, residual_cells, weight_cells: sizes of the buffers.
    """

    problem: Problem
    timeline: Timeline
    columns: dict[str, np.ndarray]
    joint: dict[str, np.ndarray]
    input_slots: int
    gradient_slots: int
    residual_cells: int
    weight_cells: int

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Those that occur, in order of their numbers."""
        return tuple(Operation(int(value)) for value in np.unique(self.columns['operation']))

    def cost(self, costs: Costs) -> float:
        """Cost of a step without embedding and loss; see lock_step_cost."""
        return lock_step_cost(self.timeline, costs)


class _Slots:
    """Intervals of ticks, each of which needs a slot of its own: the least number of slots, first come first served."""

    def __init__(self) -> None:
        self.spans: dict[Hashable, list[int]] = {}

    def use(self, key: Hashable, tick: int) -> None:
        """`key` is written or read in this tick; it lives from the first such tick to the last."""
        span = self.spans.setdefault(key, [tick, tick])
        span[0], span[1] = min(span[0], tick), max(span[1], tick)

    def assign(self) -> tuple[dict[Hashable, int], int]:
        """Slot of every key, and how many slots there are."""
        free_after: list[int] = []  # last tick of each slot's owner
        slots: dict[Hashable, int] = {}
        for key, (start, end) in sorted(self.spans.items(), key=lambda item: item[1]):
            slot = next((i for i, last in enumerate(free_after) if last < start), len(free_after))
            if slot == len(free_after):
                free_after.append(end)
            free_after[slot] = end
            slots[key] = slot
        return slots, len(free_after)


def make_table(problem: Problem, timeline: Timeline) -> Table:
    """The table of a timeline, with a slot for everything that is kept."""
    ticks, stages, repeats = len(timeline), problem.stages, problem.chunk_repeats
    names = ('operation', 'microbatch', 'chunk', 'first', 'count', 'input_slot', 'gradient_slot')
    columns = {name: np.zeros((ticks, stages), np.int32) for name in (*names, 'weight_cell')}
    columns |= {name: np.full((ticks, stages), -1, np.int32) for name in ('receive_inputs', 'receive_gradients')}
    joint = {name: np.full(ticks, -1, np.int32) for name in ('embed', 'embed_slot', 'loss', 'loss_slot')}
    joint |= {'embed_gradient': np.full(ticks, -1, np.int32)}
    joint |= {name: np.zeros(ticks, np.int32) for name in ('send_inputs', 'send_gradients')}

    inputs, gradients = ([_Slots() for _ in range(stages)] for _ in range(2))
    received: list[tuple[str, int, int, tuple[int, int]]] = []  # (column, tick, stage, (microbatch, chunk))
    for tick, row in enumerate(timeline):
        for stage, piece in enumerate(row):
            if piece is None:
                continue
            key = (piece.microbatch, piece.chunk)
            for name in ('operation', 'microbatch', 'chunk', 'first', 'count'):
                columns[name][tick, stage] = getattr(piece, name)
            if piece.operation in _READ_INPUTS:
                inputs[stage].use(key, tick)
            if piece.operation in GRADIENT_USERS:
                gradients[stage].use(key, tick)
            if piece.operation == Operation.FORWARD and piece.first == 0 and (stage, piece.chunk) == (0, 0):
                joint['embed'][tick] = piece.microbatch
            if piece.operation == Operation.FORWARD and piece.first + piece.count == repeats:
                after = problem.after(stage, piece.chunk)
                if after is None:
                    joint['loss'][tick] = piece.microbatch
                    if not problem.evaluation:
                        gradients[stage].use(key, tick)
                else:
                    inputs[after[0]].use((piece.microbatch, after[1]), tick)
                    received.append(('receive_inputs', tick, after[0], (piece.microbatch, after[1])))
                    joint['send_inputs'][tick] = 1
            if piece.operation in GRADIENT_USERS and piece.first == 0:
                before = problem.before(stage, piece.chunk)
                if before is None:
                    joint['embed_gradient'][tick] = piece.microbatch
                else:
                    gradients[before[0]].use((piece.microbatch, before[1]), tick)
                    received.append(('receive_gradients', tick, before[0], (piece.microbatch, before[1])))
                    joint['send_gradients'][tick] = 1

    input_slots, gradient_slots = [each.assign() for each in inputs], [each.assign() for each in gradients]
    for name, tick, stage, key in received:
        columns[name][tick, stage] = (input_slots if name == 'receive_inputs' else gradient_slots)[stage][0][key]
    residual_cells, weight_cells = _assign_cells(timeline, columns)
    for tick, row in enumerate(timeline):
        for stage, piece in enumerate(row):
            if piece is not None:
                key = (piece.microbatch, piece.chunk)
                columns['input_slot'][tick, stage] = input_slots[stage][0].get(key, 0)
                columns['gradient_slot'][tick, stage] = gradient_slots[stage][0].get(key, 0)
        if joint['embed'][tick] >= 0:
            joint['embed_slot'][tick] = input_slots[0][0][int(joint['embed'][tick]), 0]
        if joint['loss'][tick] >= 0 and not problem.evaluation:
            key = (int(joint['loss'][tick]), problem.config.chunks - 1)
            joint['loss_slot'][tick] = gradient_slots[-1][0][key]
    return Table(
        problem,
        timeline,
        columns,
        joint,
        input_slots=max(count for _, count in input_slots),
        gradient_slots=max(count for _, count in gradient_slots),
        residual_cells=residual_cells,
        weight_cells=weight_cells,
    )


def _assign_cells(timeline: Timeline, columns: dict[str, np.ndarray]) -> tuple[int, int]:
    """Fill in weight_cell; returns how many cells for residuals and for weight gradients there are.

    Residual cells are taken for one piece at a time. Cells for weight gradients form a ring: on every stage weight
    gradients come in the order of input gradients.
    """
    residual_cells = weight_cells = 0
    for stage in range(columns['operation'].shape[1]):
        written = read = 0
        for tick, row in enumerate(timeline):
            piece = row[stage]
            if piece is None:
                continue
            if piece.operation == Operation.RECOMPUTE:
                residual_cells = max(residual_cells, piece.count)
            if piece.operation in KEEPERS:
                columns['weight_cell'][tick, stage] = written
                written += piece.count
                weight_cells = max(weight_cells, written - read)
            if piece.operation == Operation.WEIGHT_GRADIENT:
                columns['weight_cell'][tick, stage] = read
                read += piece.count
    columns['weight_cell'] %= max(weight_cells, 1)
    return residual_cells, weight_cells
