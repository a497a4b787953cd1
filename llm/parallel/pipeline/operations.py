"""The operations of one stage: passes over repeats of its layers, each a loop that updates buffers in place."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm.parallel.pipeline.buffers import add, following, in_order, read, write, write_if
from llm.parallel.pipeline.joint import Joint
from llm.parallel.pipeline.placement import cast, gathered, without_leading_axis
from llm.parallel.pipeline.schedules import Operation
from llm.parallel.pipeline.split import split_backward
from llm.parallel.pipeline.stages import MEMORY, Layers, Stages, Sums
from llm.parallel.pipeline.table import Table


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a device carries from tick to tick.

    Attributes:
        inputs: what the forward passes of repeats keep, [slots, repeats, ...] each. The first is their inputs, [slots,
            repeats, B, S, D]; in evaluation it is alone, and of the first repeat only. sums: of the losses.
        staged: sums of the stage's layers, one entry a repeat. gradients: of what a repeat gives, [slots, B, S, D].
            residuals, operands: see Table. layers, shared: sums of gradients. All of these but the first are None in
            evaluation.
        memory: of the stage's layers, what the next step goes on from; [repeats, microbatches, rows, ...] each.
    """

    inputs: list[jax.Array]
    sums: Sums
    staged: Any = None
    gradients: Any = None
    residuals: Any = None
    operands: Any = None
    layers: Any = None
    shared: Any = None
    memory: Any = dataclasses.field(default_factory=dict)


def _replace(state: State, name: str, value: Any) -> State:
    changes: dict[str, Any] = {name: value}
    return dataclasses.replace(state, **changes)


def with_input(state: State, condition: jax.Array, x: jax.Array, slot: jax.Array, repeat: jax.Array | int) -> State:
    """With x as the input of a repeat, where `condition`."""
    first, *others = state.inputs
    return dataclasses.replace(state, inputs=[write_if(condition, first, x, slot, repeat), *others])


@dataclasses.dataclass(frozen=True)
class _At:
    """Where a backward operation is: repeat of the chunk, the piece and the stage; its weight cell; what it reads."""

    repeat: jax.Array
    offset: jax.Array
    local: jax.Array
    cell: jax.Array
    parameters: Any
    context: Any


class Operations:
    """On one device; everything is that device's part, but for axes that the compiler places."""

    def __init__(
        self,
        table: Table,
        stages: Stages,
        placements: Any,
        manual: tuple[str, ...],
        joint: Joint,
        layers: Any,
        message: jax.Array,
        memory: Any,
    ) -> None:
        """`layers` are what this stage runs, in that order; `message` is like what stages send each other.

        `memory` is as in State, of the step before.
        """
        problem = table.problem
        self.table, self.stages, self.placements, self.manual = table, stages, placements, manual
        self.layers, self.joint, self.evaluation = layers, joint, problem.evaluation
        self.memory = memory
        self.repeats = problem.chunk_repeats
        if not self.evaluation:
            context = self.first_context()
            self.split = split_backward(self.repeat, self.parameters(jnp.int32(0)), message, context, stages.remat)

    def parameters(self, repeat: jax.Array) -> Any:
        """Those of one repeat of this stage, in the type of the products, sharded as they are."""
        return jax.tree.map(cast, read(self.layers, repeat), self.placements)

    def context_of(self, microbatch: jax.Array, local: jax.Array, index: jax.Array, context: Any) -> tuple[Any, ...]:
        """What `repeat` needs besides x; also, computed again, the memory as it was before the step."""
        memory = () if not self.memory else (read(self.memory, local, microbatch),)
        return index, context, *memory

    def first_context(self) -> tuple[Any, ...]:
        """`context_of` some repeat of some microbatch."""
        zero = jnp.int32(0)
        return self.context_of(zero, zero, zero, self.joint.context(self.joint.rows(zero), zero))

    def repeat(self, parameters: Any, x: jax.Array, index_and_context: tuple[Any, ...]) -> Layers:
        index, *context = index_and_context
        whole = gathered(parameters, without_leading_axis(self.placements), self.manual)
        return self.stages.repeat(whole, x, index, *context)

    def forward(self, state: State, row: dict[str, jax.Array]) -> tuple[State, Any]:
        """FORWARD, if that is this tick's operation: the state, and what the last repeat gives."""
        context, slot, last = self._context(row), row['input_slot'], row['first'] + row['count']
        due = row['operation'] == Operation.FORWARD

        def step(repeat: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs, staged, memory, y = carry
            x = self.stages.stream(y)
            local, index = self._indices(row, repeat)
            parameters = self.parameters(local)
            read_by_repeat = self.context_of(row['microbatch'], local, index, context)
            if self.evaluation:
                y, _, sums = self.repeat(parameters, x, read_by_repeat)
            else:
                y, sums, kept = self.split.forward(parameters, in_order(x), read_by_repeat)
                inputs, y = write(inputs, in_order(kept), slot, repeat), in_order(y)
            memory = write(memory, sums.pop(MEMORY, {}), local, row['microbatch'])
            return inputs, add(staged, sums, local), memory, y

        y = self.stages.output(read(state.inputs[0], slot, row['first']))
        carry = state.inputs, state.staged, state.memory, y
        inputs, staged, memory, y = jax.lax.fori_loop(row['first'], jnp.where(due, last, row['first']), step, carry)
        state = dataclasses.replace(state, inputs=inputs, staged=staged, memory=memory)
        if self.evaluation:
            return state, y
        at = slot, jnp.minimum(last, self.repeats - 1)
        return with_input(state, due & (last < self.repeats), self.stages.stream(y), *at), y

    def backward(self, state: State, y: Any, row: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        """The other operations, if one is this tick's: the state, and the gradient of x before the first repeat.

        It comes after the forward pass, which gave `y`.

        Each is a loop from the last repeat to the first, over the one buffer that it writes to and the gradient.
        """
        split, context, slot, output = self.split, self._context(row), row['input_slot'], self.stages.output

        def whole(layers: Any, dy: Any, at: _At) -> tuple[Any, Any]:
            gradient, dx = split.whole(at.parameters, in_order(read(state.inputs, slot, at.repeat)), at.context, dy)
            return add(layers, gradient, at.local), output(dx)

        def recompute(residuals: Any, dy: Any, at: _At) -> tuple[Any, Any]:
            found = split.recompute(at.parameters, in_order(read(state.inputs, slot, at.repeat)), at.context)
            return write(residuals, in_order(found), at.offset), dy

        def from_residuals(operands: Any, dy: Any, at: _At) -> tuple[Any, Any]:
            residuals = in_order(read(state.residuals, at.offset))
            dx, found = split.input_gradient(at.parameters, residuals, at.context, dy)
            return write(operands, in_order(found), at.cell), output(dx)

        def from_input(operands: Any, dy: Any, at: _At) -> tuple[Any, Any]:
            kept = in_order(read(state.inputs, slot, at.repeat))
            dx, found = split.recompute_input_gradient(at.parameters, kept, at.context, dy)
            return write(operands, in_order(found), at.cell), output(dx)

        def weights(layers: Any, dy: Any, at: _At) -> tuple[Any, Any]:
            operands = in_order(read(state.operands, at.cell))
            return add(layers, split.weight_gradient(at.parameters, operands, at.context), at.local), dy

        steps: dict[Operation, tuple[str, Callable[[Any, Any, _At], tuple[Any, Any]]]] = {
            Operation.BACKWARD: ('layers', whole),
            Operation.RECOMPUTE: ('residuals', recompute),
            Operation.INPUT_GRADIENT: ('operands', from_residuals),
            Operation.RECOMPUTE_INPUT_GRADIENT: ('operands', from_input),
            Operation.WEIGHT_GRADIENT: ('layers', weights),
        }
        dy = read(state.gradients, row['gradient_slot'])
        for operation, (name, step) in steps.items():
            if operation not in self.table.operations:
                continue

            def one(i: jax.Array, carry: tuple[Any, Any], step: Any = step) -> tuple[Any, Any]:
                offset = row['count'] - 1 - i
                repeat = row['first'] + offset
                local, index = self._indices(row, repeat)
                cell = (row['weight_cell'] + i) % max(self.table.weight_cells, 1)
                read_by_repeat = self.context_of(row['microbatch'], local, index, context)
                return step(*carry, _At(repeat, offset, local, cell, self.parameters(local), read_by_repeat))

            count = jnp.where(following(row['operation'] == operation, y), row['count'], 0)
            buffer, dy = jax.lax.fori_loop(0, count, one, (getattr(state, name), dy))
            state = _replace(state, name, buffer)
        # Without an operation that changes it, it is written back as it was.
        return dataclasses.replace(
            state, gradients=write(state.gradients, dy, row['gradient_slot'])
        ), self.stages.stream(dy)

    def _context(self, row: dict[str, jax.Array]) -> Any:
        return self.joint.context(self.joint.rows(row['microbatch']), row['microbatch'])

    def _indices(self, row: dict[str, jax.Array], repeat: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Index of a chunk's repeat among this stage's, and in the model."""
        block = row['chunk'] * self.joint.num_stages + self.joint.stage
        return row['chunk'] * self.repeats + repeat, block * self.repeats + repeat
