"""One program that runs any schedule: a loop over the ticks of a table, on every device of every stage.

The loop is not differentiated: a stage computes its gradients itself, by operations of the table. Every operation is a
loop over the repeats that it is for, of no steps where the table says another operation: unlike the branches of a
conditional, loops update the buffers that go through them in place. Messages to the neighbouring stages follow.

Mesh axes over which the batch is split are manual too, so that gradients are summed over them once, after the loop. The
other axes are left to the compiler. Collectives in an operation are those within a stage: all devices of a stage, and
of no other, take part in them. What belongs to no stage, all compute together between the operations; see `joint`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from llm.parallel.pipeline.buffers import following, when, write_if
from llm.parallel.pipeline.joint import Joint
from llm.parallel.pipeline.layout import from_chunks, to_chunks
from llm.parallel.pipeline.memory import by_microbatch, of_microbatches, with_memory, without_memory
from llm.parallel.pipeline.operations import Operations, State, with_input
from llm.parallel.pipeline.placement import AXIS, cast, is_placement, summed_over_copies
from llm.parallel.pipeline.stages import MEMORY, Batch, Stages, Sums
from llm.parallel.pipeline.sums import added, joined
from llm.parallel.pipeline.table import Table
from llm.parallel.sharding import AxisRules, names, use_rules


def run(
    table: Table,
    stages: Stages,
    mesh: Mesh,
    rules: AxisRules,
    placements: tuple[Any, Any],
    layers: Any,
    shared: Any,
    batch: Batch,
    key: jax.Array | None,
    memory: Any,
) -> tuple[tuple[Any, Any] | None, Sums]:
    """Gradients of the summed loss of all microbatches, and their summed sums.

    Args:
        placements: of `layers` and `shared`, trees of Placement.
        layers: tree of parameters with a leading axis of repeats, sharded over `pipeline`.
        shared: {'ends': of embedding and loss, 'repeats': the same tree as `layers` of the repeats after those, not
            sharded along the leading axis, 'leading', 'remainder': the layers before the first repeat and after the
            last, 'multi_token': those after all, stacked by depth}; all but the first may be empty.
        batch: arrays [rows, S]; row r is in microbatch r mod microbatches. With MEMORY among them, a tree of arrays
            [rows, repeats, ...]: what rows remember of the step before in 'leading', 'repeats' and 'remainder'.
        key: of the step, for dropout; every microbatch folds in its index.
        memory: the same of `layers`, [repeats, rows, ...], sharded over `pipeline` and as the batch; {} for none.

    Returns:
        ((gradients of layers, of shared), placed and typed as the parameters; sums). A table for evaluation gives None
        for the gradients. Where layers have sums, those of the loss have 'layers' beside them: {'leading', 'staged',
        'repeats', 'remainder', 'multi_token'}, with a leading axis of repeats for 'staged' and 'repeats'. Where there
        is a memory, the new one of `memory` is MEMORY, and that of other layers is MEMORY of theirs.
    """
    batch_axes = names(rules.partition(('batch',), mesh, parameters=False)[0])
    manual = (AXIS, *batch_axes)
    specs = jax.tree.map(lambda each: each.restricted(manual), placements, is_leaf=is_placement)
    columns = jnp.asarray(np.stack(list(table.columns.values()), axis=-1))
    joint = jnp.asarray(np.stack(list(table.joint.values()), axis=-1))

    def body(
        layers: Any, shared: Any, batch: Batch, key: jax.Array | None, columns: jax.Array, joint: jax.Array, memory: Any
    ) -> tuple[tuple[Any, Any] | None, Sums, Any, Any, Any]:
        with use_rules(jax.sharding.get_abstract_mesh(), rules):
            device = _Device(table, stages, rules, placements, manual, layers, shared, batch, key, memory)
            return device.run(columns[:, 0], joint)

    by_row, by_repeat_and_row = PartitionSpec(batch_axes or None), PartitionSpec(AXIS, batch_axes or None)
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(*specs, by_row, PartitionSpec(), PartitionSpec(None, AXIS), PartitionSpec(), by_repeat_and_row),
        out_specs=(
            None if table.problem.evaluation else specs,
            PartitionSpec(),
            PartitionSpec(AXIS),
            PartitionSpec(None, *by_row),
            by_repeat_and_row,
        ),
        axis_names=set(manual),
        check_vma=False,
    )
    gradients, sums, staged, outside, memory = mapped(layers, shared, batch, key, columns, joint, memory)
    of_layers = with_memory({**sums.get('layers', {}), **({'staged': staged} if staged else {})}, outside)
    sums = {**sums, **({'layers': of_layers} if of_layers else {}), **({MEMORY: memory} if memory else {})}
    return gradients, sums


class _Device:
    """The program of one device; everything is that device's part, but for axes that the compiler places."""

    def __init__(
        self,
        table: Table,
        stages: Stages,
        rules: AxisRules,
        placements: tuple[Any, Any],
        manual: tuple[str, ...],
        layers: Any,
        shared: Any,
        batch: Batch,
        key: jax.Array | None,
        memory: Any,
    ) -> None:
        problem = table.problem
        self.table, self.manual, self.placements, self.evaluation = table, manual, placements, problem.evaluation
        self.num_stages, self.chunks = problem.stages, problem.config.chunks
        self.shared, self.stage = shared, jax.lax.axis_index(AXIS)
        # Where others come after them, the last layer of the stages is not the model's.
        self.stages = stages.without_trunk() if shared['repeats'] or shared['remainder'] else stages
        self.joint = Joint(problem, stages, rules, placements[1], manual, batch, key)
        stored = layers
        memory = by_microbatch(memory, problem.microbatches)
        if self.chunks > 1:
            used = jax.tree.map(cast, layers, placements[0]), memory
            layers, memory = to_chunks(used, self.num_stages, self.chunks, AXIS)
        rows, first = self.joint.rows(jnp.int32(0)), jnp.int32(0)
        x, _, sums = jax.eval_shape(self.joint.embed, shared, rows, first)
        self.message = _zeros(x)
        _, of_loss = jax.eval_shape(self.joint.loss, shared, self.stages.output(self.message), rows, first)
        self.operations = Operations(
            table, self.stages, placements[0], manual, self.joint, layers, self.message, memory
        )
        self.initial = self._initial(jax.tree.map(_zeros, joined(of_loss, sums)), stored)

    def run(self, columns: jax.Array, joint: jax.Array) -> tuple[tuple[Any, Any] | None, Sums, Any, Any, Any]:
        """The loop, and what comes before and after it."""
        state, _ = jax.lax.scan(self._tick, self.initial, (columns, joint))
        rest = tuple(axis for axis in self.manual if axis != AXIS)
        layers, outside = without_memory(state.sums.get('layers', {}))
        sums = {name: each for name, each in state.sums.items() if name != 'layers'}
        sums |= {'layers': layers} if layers else {}
        sums, staged = jax.lax.psum((sums, state.staged), rest) if rest else (sums, state.staged)
        layers, memory = state.layers, state.memory
        if self.chunks > 1:
            layers, staged, memory = from_chunks((layers, staged, memory), self.num_stages, self.chunks, AXIS)
        memory = of_microbatches(memory)
        if self.evaluation:
            return None, sums, staged, outside, memory
        # Where a parameter is whole, each device has the sum over its own rows and its own part of the vocabulary.
        summed = functools.partial(summed_over_copies, manual=self.manual)
        found = jax.tree.map(summed, (layers, state.shared), self.placements)
        return found, sums, staged, outside, memory

    def _initial(self, sums: Sums, layers: Any) -> State:
        """What is there before the first tick; `layers` as they are stored."""
        table, operations, message = self.table, self.operations, self.message
        context = operations.first_context()
        _, _, of_repeat = jax.eval_shape(operations.repeat, operations.parameters(jnp.int32(0)), message, context)
        of_repeat.pop(MEMORY, None)
        count = table.problem.config.chunks * table.problem.chunk_repeats
        staged = jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), of_repeat)
        if self.evaluation:
            inputs = [jnp.zeros((table.input_slots, 1, *message.shape), message.dtype)]
            return State(inputs=inputs, sums=sums, staged=staged, memory=operations.memory)
        split = operations.split

        def buffers(structs: list[jax.ShapeDtypeStruct], cells: int) -> list[jax.Array]:
            return [jnp.zeros((cells, *s.shape), s.dtype) for s in structs] if cells else []

        return State(
            inputs=[jnp.zeros((table.input_slots, table.problem.chunk_repeats, *s.shape), s.dtype) for s in split.kept],
            sums=sums,
            staged=staged,
            gradients=self.stages.output(jnp.zeros((table.gradient_slots, *message.shape), message.dtype)),
            residuals=buffers(split.residuals, table.residual_cells),
            operands=buffers(split.operands, table.weight_cells),
            layers=jax.tree.map(jnp.zeros_like, layers),
            shared=jax.tree.map(jnp.zeros_like, self.shared),
            memory=operations.memory,
        )

    def _tick(self, state: State, columns_and_joint: tuple[jax.Array, jax.Array]) -> tuple[State, None]:
        columns, joint = columns_and_joint
        row = dict(zip(self.table.columns, columns, strict=True))
        both = dict(zip(self.table.joint, joint, strict=True))

        due = both['embed'] >= 0

        def embed(carry: tuple[jax.Array, Sums]) -> tuple[jax.Array, Sums]:
            x, _, sums = self.joint.embed(self.shared, self.joint.rows(both['embed']), both['embed'])
            return x, added(carry[1], {'layers': sums} if sums else {})

        x, sums = when(due, embed, (self.message, state.sums))
        state = dataclasses.replace(state, sums=sums)
        state = with_input(state, due & (self.stage == 0), x, both['embed_slot'], 0)

        state, y = self.operations.forward(state, row)
        x = self.stages.stream(y)
        if self.evaluation:
            state = self._loss_only(state, y, both)
            return self._received(state, 'inputs', x, 1, row, both, state.sums), None
        state, dx = self.operations.backward(state, y, row)
        state = self._after_last(state, y, dx, both)
        state = self._after_first(state, dx, both)
        state = self._received(state, 'inputs', x, 1, row, both, state.shared)
        return self._received(state, 'gradients', dx, -1, row, both, state.inputs), None

    def _received(
        self,
        state: State,
        name: str,
        x: jax.Array,
        step: int,
        row: dict[str, jax.Array],
        both: dict[str, jax.Array],
        earlier: Any,
    ) -> State:
        """Send x `step` stages on, if any stage sends, and keep what arrives where the table says.

        It comes after what made `earlier`.
        """
        to = [(stage, (stage + step) % self.num_stages) for stage in range(self.num_stages)]
        due = following(both[f'send_{name}'] > 0, earlier)
        x = when(due, lambda x: jax.lax.ppermute(x, AXIS, to), x)
        slot = row[f'receive_{name}']
        if name == 'inputs':
            return with_input(state, slot >= 0, x, slot, 0)
        return self._with_gradient(state, slot >= 0, self.stages.output(x), slot)

    @staticmethod
    def _with_gradient(state: State, condition: jax.Array, dy: Any, slot: jax.Array) -> State:
        written = jax.tree.map(lambda buffer, one: write_if(condition, buffer, one, slot), state.gradients, dy)
        return dataclasses.replace(state, gradients=written)

    def _loss_only(self, state: State, y: Any, both: dict[str, jax.Array]) -> State:
        def compute(sums: Sums) -> Sums:
            return added(sums, self.joint.loss(self.shared, y, self.joint.rows(both['loss']), both['loss'])[1])

        return dataclasses.replace(state, sums=when(both['loss'] >= 0, compute, state.sums))

    def _after_last(self, state: State, y: Any, dx: jax.Array, both: dict[str, jax.Array]) -> State:
        """Loss and its gradient for the microbatch that left the last chunk, after the backward pass, which gave dx."""
        due = both['loss'] >= 0

        def compute(carry: tuple[Any, Sums, Any]) -> tuple[Any, Sums, Any]:
            shared, sums, _ = carry
            rows = self.joint.rows(both['loss'])
            loss, vjp, found = jax.vjp(
                lambda shared, y: self.joint.loss(shared, y, rows, both['loss']), self.shared, y, has_aux=True
            )
            d_shared, dy = vjp(self.joint.on(0, jnp.ones_like(loss)))
            return jax.tree.map(jnp.add, shared, d_shared), added(sums, found), dy

        carry = state.shared, state.sums, self.stages.output(self.message)
        shared, sums, dy = when(following(due, dx), compute, carry)
        state = dataclasses.replace(state, shared=shared, sums=sums)
        return self._with_gradient(state, due & (self.stage == self.num_stages - 1), dy, both['loss_slot'])

    def _after_first(self, state: State, dx: jax.Array, both: dict[str, jax.Array]) -> State:
        """Gradient of the embedding of the microbatch that came out of the first chunk."""

        def compute(shared: Any) -> Any:
            microbatch = both['embed_gradient']
            rows = self.joint.rows(microbatch)
            (_, losses), vjp = jax.vjp(lambda shared: self.joint.embed(shared, rows, microbatch)[:2], self.shared)
            (d_shared,) = vjp(
                (self.joint.on(0, dx), jax.tree.map(lambda x: self.joint.on(0, jnp.ones_like(x)), losses))
            )
            return jax.tree.map(jnp.add, shared, d_shared)

        return dataclasses.replace(state, shared=when(both['embed_gradient'] >= 0, compute, state.shared))


def _zeros(struct: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(struct.shape, struct.dtype)
