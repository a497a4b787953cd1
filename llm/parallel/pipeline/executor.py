"""One program that runs any schedule: a loop over the ticks of a table, on every device of every stage.

The loop is not differentiated: a stage computes its gradients itself, by operations of the table. Every operation is a
loop over the repeats that it is for, of no steps where the table says another operation: unlike the branches of a
conditional, loops update the buffers that go through them in place. Messages to the neighbouring stages follow.

Mesh axes over which the batch is split are manual too, so that gradients are summed over them once, after the loop. The
other axes are left to the compiler. Collectives in an operation are those within a stage: all devices of a stage, and
of no other, take part in them.

Embedding and loss belong to no stage: their parameters are sharded over all stages, which compute them together
between the operations ("vocabulary parallelism", Yeung et al. 2024, "Balancing Pipeline Parallelism with Vocabulary
Parallelism", section 4). The same goes for layers before the stages' and for those that are left over when stages have
equally many: of those each stage does some of the rows, with weights that are gathered as they are needed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from llm.parallel.pipeline.buffers import add, following, in_order, read, when, write, write_if
from llm.parallel.pipeline.layout import from_chunks, to_chunks
from llm.parallel.pipeline.outside import Remat, gathering_again, run_repeats
from llm.parallel.pipeline.schedules import Operation
from llm.parallel.pipeline.split import split_backward
from llm.parallel.pipeline.sums import added, joined
from llm.parallel.pipeline.table import Table
from llm.parallel.sharding import AxisRules, names, use_rules

AXIS = 'pipeline'
Batch = dict[str, jax.Array]
Sums = dict[str, Any]
Layers = tuple[jax.Array, Any, Any]  # x, losses, sums
Gather = Callable[..., Any]  # see Stages.leading


@dataclasses.dataclass(frozen=True)
class Stages:
    """The functions that a model is made of, for a pipeline. They see the rows of one device, and whole parameters.

    Attributes:
        embed: (shared, rows, key of the microbatch) -> x [B, ...], what stages send on.
        context: (rows, key of the microbatch) -> what `repeat` needs besides x: a tree of arrays.
        repeat: (parameters of one repeat, x, index of the repeat in the model, context) -> (x, losses, sums). Losses
            add to the loss as they are, and sums add up like those of the loss; trees of arrays, which may be empty.
        leading: (parameters, x, context, gathered) -> (x, losses, sums), of the layers before the first repeat; None
            where there are none. Parameters are by name, and cut up: `gathered(parameters, name)` makes them whole,
            with of_one = True one entry of stacked ones.
        remainder: (parameters, x, context) -> (x, losses, sums), of the layers after the last repeat.
        loss: (shared, x, rows, key of the microbatch) -> (loss, sums), both summed over the tokens of all `rows`.
        remat: of a repeat: jax.checkpoint with a policy, or None to compute nothing again; see split_backward.
    """

    embed: Callable[[Any, Batch, jax.Array | None], jax.Array]
    context: Callable[[Batch, jax.Array | None], Any]
    repeat: Callable[[Any, jax.Array, jax.Array, Any], Layers]
    leading: Callable[[Any, jax.Array, Any, Gather], Layers] | None
    remainder: Callable[[Any, jax.Array, Any], Layers]
    loss: Callable[[Any, jax.Array, Batch, jax.Array | None], tuple[jax.Array, Sums]]
    remat: Remat = None


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one parameter lives, and in which type it is used.

    Attributes:
        spec: over the mesh. dtype: of the products it takes part in; None for its own.
        kept: mesh axes along which devices use their own part, as of experts, rather than gather the whole.
    """

    spec: PartitionSpec
    dtype: Any = None
    kept: tuple[str, ...] = ()


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
) -> tuple[tuple[Any, Any] | None, Sums]:
    """Gradients of the summed loss of all microbatches, and their summed sums.

    Args:
        placements: of `layers` and `shared`, trees of Placement.
        layers: tree of parameters with a leading axis of repeats, sharded over `pipeline`.
        shared: {'ends': of embedding and loss, 'repeats': the same tree as `layers` of the repeats after those, not
            sharded along the leading axis, 'leading', 'remainder': the layers before the first repeat and after the
            last}; the last three may be empty.
        batch: arrays [rows, S]; row r is in microbatch r mod microbatches.
        key: of the step, for dropout; every microbatch folds in its index.

    Returns:
        ((gradients of layers, of shared), placed and typed as the parameters; sums). A table for evaluation gives None
        for the gradients. Where layers have sums, those of the loss have 'layers' beside them: {'leading', 'staged',
        'repeats', 'remainder'}, with a leading axis of repeats for the middle two.
    """
    batch_axes = names(rules.partition(('batch',), mesh, parameters=False)[0])
    manual = (AXIS, *batch_axes)
    specs = jax.tree.map(lambda each: _restrict(each.spec, manual), placements, is_leaf=_is_placement)
    columns = jnp.asarray(np.stack(list(table.columns.values()), axis=-1))
    joint = jnp.asarray(np.stack(list(table.joint.values()), axis=-1))

    def body(
        layers: Any, shared: Any, batch: Batch, key: jax.Array | None, columns: jax.Array, joint: jax.Array
    ) -> tuple[tuple[Any, Any] | None, Sums, Any]:
        with use_rules(jax.sharding.get_abstract_mesh(), rules):
            device = _Device(table, stages, rules, placements, manual, layers, shared, batch, key)
            return device.run(columns[:, 0], joint)

    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(
            *specs,
            PartitionSpec(batch_axes or None),
            PartitionSpec(),
            PartitionSpec(None, AXIS),
            PartitionSpec(),
        ),
        out_specs=(None if table.problem.evaluation else specs, PartitionSpec(), PartitionSpec(AXIS)),
        axis_names=set(manual),
        check_vma=False,
    )
    gradients, sums, staged = mapped(layers, shared, batch, key, columns, joint)
    if staged:
        sums = {**sums, 'layers': {**sums.get('layers', {}), 'staged': staged}}
    return gradients, sums


def _is_placement(node: Any) -> bool:
    return isinstance(node, Placement)


def _without_leading_axis(placements: Any) -> Any:
    return jax.tree.map(
        lambda each: dataclasses.replace(each, spec=PartitionSpec(*tuple(each.spec)[1:])),
        placements,
        is_leaf=_is_placement,
    )


def _restrict(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """`spec` without mesh axes other than `axes`."""
    return PartitionSpec(*(tuple(a for a in names(each) if a in axes) or None for each in spec))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What a device carries from tick to tick.

    Attributes:
        inputs: what the forward passes of repeats keep, [slots, repeats, ...] each. The first is their inputs, [slots,
            repeats, B, S, D]; in evaluation it is alone, and of the first repeat only. sums: of the losses.
        staged: sums of the stage's layers, one entry a repeat. gradients: [slots, B, S, D]. residuals, operands: see
            Table. layers, shared: sums of gradients. These are None in evaluation.
    """

    inputs: list[jax.Array]
    sums: Sums
    staged: Any = None
    gradients: Any = None
    residuals: Any = None
    operands: Any = None
    layers: Any = None
    shared: Any = None


def _replace(state: _State, name: str, value: Any) -> _State:
    changes: dict[str, Any] = {name: value}
    return dataclasses.replace(state, **changes)


def _with_input(state: _State, condition: jax.Array, x: jax.Array, slot: jax.Array, repeat: jax.Array | int) -> _State:
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
    ) -> None:
        problem = table.problem
        self.table, self.stages, self.manual, self.evaluation = table, stages, manual, problem.evaluation
        self.rules = rules
        self.layer_placements, self.shared_placements = placements
        self.num_stages, self.chunks, self.repeats = problem.stages, problem.config.chunks, problem.chunk_repeats
        self.layers, self.shared, self.key = layers, shared, key
        self.stage = jax.lax.axis_index(AXIS)
        self.batch, self.microbatches = batch, problem.microbatches

    def rows(self, microbatch: jax.Array) -> Batch:
        """The rows of one microbatch."""

        def pick(x: jax.Array) -> jax.Array:
            # A reshape would have the compiler copy the whole batch.
            index = microbatch + self.microbatches * jnp.arange(x.shape[0] // self.microbatches)
            return jnp.take(x, index, axis=0, mode='clip')

        return {name: pick(x) for name, x in self.batch.items()}

    def run(self, columns: jax.Array, joint: jax.Array) -> tuple[tuple[Any, Any] | None, Sums, Any]:
        """The loop, and what comes before and after it."""
        stored = self.layers
        if self.chunks > 1:
            cast = jax.tree.map(_cast, self.layers, self.layer_placements)
            self.layers = to_chunks(cast, self.num_stages, self.chunks, AXIS)
        state, _ = jax.lax.scan(self._tick, self._initial(stored), (columns, joint))
        rest = tuple(axis for axis in self.manual if axis != AXIS)
        sums, staged = jax.lax.psum((state.sums, state.staged), rest) if rest else (state.sums, state.staged)
        if self.evaluation:
            return None, sums, None
        layers = state.layers
        if self.chunks > 1:
            layers, staged = from_chunks((layers, staged), self.num_stages, self.chunks, AXIS)
        # Where a parameter is whole, each device has the sum over its own rows and its own part of the vocabulary.
        layers = jax.tree.map(self._sum_over_copies, layers, self.layer_placements)
        shared = jax.tree.map(self._sum_over_copies, state.shared, self.shared_placements)
        return (layers, shared), sums, staged

    def _sum_over_copies(self, x: jax.Array, placement: Placement) -> jax.Array:
        used = {axis for each in placement.spec for axis in names(each)}
        axes = tuple(axis for axis in self.manual if axis not in used)
        return jax.lax.psum(x, axes) if axes else x

    def _initial(self, layers: Any) -> _State:
        table, rows = self.table, self.rows(jnp.int32(0))
        x, _, first_sums = jax.eval_shape(self._embed, self.shared, rows, jnp.int32(0))
        self.message = jnp.zeros(x.shape, x.dtype)
        _, sums = jax.eval_shape(self._loss, self.shared, self.message, rows, jnp.int32(0))
        sums = jax.tree.map(_zeros, joined(sums, first_sums))
        if self.evaluation:
            return _State(inputs=[jnp.zeros((table.input_slots, 1, *x.shape), x.dtype)], sums=sums)
        context = (jnp.int32(0), self._context_of(rows, jnp.int32(0)))
        parameters = self._parameters(jnp.int32(0))
        self.split = split_backward(self._repeat, parameters, self.message, context, self.stages.remat)
        _, _, of_repeat = jax.eval_shape(self._repeat, parameters, self.message, context)
        count = self.chunks * self.repeats

        def buffers(structs: list[jax.ShapeDtypeStruct], cells: int) -> list[jax.Array]:
            return [jnp.zeros((cells, *s.shape), s.dtype) for s in structs] if cells else []

        return _State(
            inputs=[jnp.zeros((table.input_slots, self.repeats, *s.shape), s.dtype) for s in self.split.kept],
            sums=sums,
            staged=jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), of_repeat),
            gradients=jnp.zeros((table.gradient_slots, *x.shape), x.dtype),
            residuals=buffers(self.split.residuals, table.residual_cells),
            operands=buffers(self.split.operands, table.weight_cells),
            layers=jax.tree.map(jnp.zeros_like, layers),
            shared=jax.tree.map(jnp.zeros_like, self.shared),
        )

    def _key(self, microbatch: jax.Array) -> jax.Array | None:
        return None if self.key is None else jax.random.fold_in(self.key, microbatch)

    # What the stages do together.

    def _gathered(self, parameters: Any, placements: Any, *, from_stages: bool = False) -> Any:
        """Whole parameters, but for the axes that the compiler places, and but for `pipeline` unless `from_stages`."""

        def one(x: jax.Array, placement: Placement) -> jax.Array:
            for dimension, axes in enumerate(placement.spec):
                over = tuple(
                    a
                    for a in names(axes)
                    if a in self.manual and a not in placement.kept and (from_stages or a != AXIS)
                )
                if over:
                    x = jax.lax.all_gather(x, over, axis=dimension, tiled=True)
            return x

        return jax.tree.map(one, jax.tree.map(_cast, parameters, placements), placements)

    def _ends(self, shared: Any) -> Any:
        return self._gathered(shared['ends'], self.shared_placements['ends'])

    def _embed(self, shared: Any, rows: Batch, microbatch: jax.Array) -> Layers:
        """What the first stage reads, after the layers before the stages'."""
        x = self.stages.embed(self._ends(shared), rows, self._key(microbatch))
        if not shared['leading']:
            return x, {}, {}
        return self._shared_out(self._leading, shared, x, rows, microbatch, everywhere=True)

    def _loss(self, shared: Any, x: jax.Array, rows: Batch, microbatch: jax.Array) -> tuple[jax.Array, Sums]:
        """Of the last stage's x, after the layers that no stage has; every stage has its part of the vocabulary."""
        x = jnp.where(self.stage == self.num_stages - 1, x, 0)
        losses: Any = {}
        layers: Any = {}
        if not shared['repeats'] and not shared['remainder']:
            x = jax.lax.psum(x, AXIS)
        else:
            x, losses, layers = self._shared_out(self._left_over, shared, x, rows, microbatch, everywhere=False)
        loss, sums = self.stages.loss(self._ends(shared), x, rows, self._key(microbatch))
        return sum(jax.tree.leaves(losses), loss), joined(sums, layers)

    def _shared_out(
        self,
        layers: Callable[[Any, jax.Array, Batch, jax.Array], Layers],
        shared: Any,
        x: jax.Array,
        rows: Batch,
        microbatch: jax.Array,
        *,
        everywhere: bool,
    ) -> Layers:
        """Layers that no stage has: each stage does some of the rows, and all get the result.

        Args:
            everywhere: whether every stage has x; else x is the sum over stages.
        """
        if x.shape[0] % self.num_stages:  # all do the same
            return layers(shared, x if everywhere else jax.lax.psum(x, AXIS), rows, microbatch)
        size = x.shape[0] // self.num_stages

        def own(r: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(r, self.stage * size, size)

        x = own(x) if everywhere else jax.lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True)
        with use_rules(jax.sharding.get_abstract_mesh(), self.rules.splitting('batch', AXIS)):
            x, losses, sums = layers(shared, x, {name: own(r) for name, r in rows.items()}, microbatch)
        x = jax.lax.all_gather(x, AXIS, axis=0, tiled=True)
        return x, *jax.lax.psum((losses, sums), AXIS)

    def _leading(self, shared: Any, x: jax.Array, rows: Batch, microbatch: jax.Array) -> Layers:
        """The layers before the stages', of these rows."""
        assert self.stages.leading is not None

        def gathered(parameters: Any, name: str, *, of_one: bool = False) -> Any:
            placements = self.shared_placements['leading'][name]
            return self._gathered(
                parameters, _without_leading_axis(placements) if of_one else placements, from_stages=True
            )

        context = self._context_of(rows, microbatch)
        x, losses, sums = self.stages.leading(shared['leading'], x, context, gathered)
        return x, losses, {'leading': sums} if sums else {}

    def _left_over(self, shared: Any, x: jax.Array, rows: Batch, microbatch: jax.Array) -> Layers:
        """The layers after the stages', of these rows."""
        context, placements = self._context_of(rows, microbatch), self.shared_placements
        of_one = _without_leading_axis(placements['repeats'])

        def repeat(parameters: Any, x: jax.Array, index: jax.Array) -> Layers:
            whole = self._gathered(parameters, of_one, from_stages=True)
            return self.stages.repeat(whole, x, index, context)

        @gathering_again(self.stages.remat)
        def remainder(parameters: Any, x: jax.Array) -> Layers:
            whole = self._gathered(parameters, placements['remainder'], from_stages=True)
            return self.stages.remainder(whole, x, context)

        losses, sums = [], {}
        if repeats := shared['repeats']:
            first = self.table.problem.staged_repeats
            x, found, sums['repeats'] = run_repeats(repeat, repeats, x, first, self.stages.remat)
            losses.append(found)
        if shared['remainder']:
            x, found, sums['remainder'] = remainder(shared['remainder'], x)
            losses.append(found)
        return x, losses, {name: each for name, each in sums.items() if each}

    def _on(self, stage: int, x: jax.Array) -> jax.Array:
        """x on one stage, 0 on the others: of what all stages have, the derivative is taken on one."""
        return jnp.where(self.stage == stage, x, jnp.zeros_like(x))

    # One stage's operations.

    def _parameters(self, repeat: jax.Array) -> Any:
        """Those of one repeat of this stage, in the type of the products, sharded as they are."""
        return jax.tree.map(_cast, read(self.layers, repeat), self.layer_placements)

    def _repeat(self, parameters: Any, x: jax.Array, index_and_context: tuple[jax.Array, Any]) -> Layers:
        index, context = index_and_context
        whole = self._gathered(parameters, _without_leading_axis(self.layer_placements))
        return self.stages.repeat(whole, x, index, context)

    def _run_forward(self, state: _State, row: dict[str, jax.Array]) -> tuple[_State, jax.Array]:
        """FORWARD, if that is this tick's operation: the state, and x after the last repeat."""
        context, slot, last = self._context(row), row['input_slot'], row['first'] + row['count']
        due = row['operation'] == Operation.FORWARD

        def step(repeat: jax.Array, carry: tuple[list[jax.Array], Any, jax.Array]) -> tuple[Any, Any, jax.Array]:
            inputs, staged, x = carry
            local, index = self._indices(row, repeat)
            if self.evaluation:
                return inputs, staged, self._repeat(self._parameters(local), x, (index, context))[0]
            y, sums, kept = self.split.forward(self._parameters(local), in_order(x), (index, context))
            return write(inputs, in_order(kept), slot, repeat), add(staged, sums, local), in_order(y)

        x = read(state.inputs[0], slot, row['first'])
        carry = state.inputs, state.staged, x
        inputs, staged, x = jax.lax.fori_loop(row['first'], jnp.where(due, last, row['first']), step, carry)
        state = dataclasses.replace(state, inputs=inputs, staged=staged)
        if self.evaluation:
            return state, x
        at = slot, jnp.minimum(last, self.repeats - 1)
        return _with_input(state, due & (last < self.repeats), x, *at), x

    def _run_backward(self, state: _State, x: jax.Array, row: dict[str, jax.Array]) -> tuple[_State, jax.Array]:
        """The other operations, if one is this tick's: the state, and the gradient of x before the first repeat.

        It comes after the forward pass, which gave `x`.

        Each is a loop from the last repeat to the first, over the one buffer that it writes to and the gradient.
        """
        split, context, slot = self.split, self._context(row), row['input_slot']

        def whole(layers: Any, dy: jax.Array, at: _At) -> tuple[Any, jax.Array]:
            gradient, dx = split.whole(at.parameters, in_order(read(state.inputs, slot, at.repeat)), at.context, dy)
            return add(layers, gradient, at.local), dx

        def recompute(residuals: Any, dy: jax.Array, at: _At) -> tuple[Any, jax.Array]:
            found = split.recompute(at.parameters, in_order(read(state.inputs, slot, at.repeat)), at.context)
            return write(residuals, in_order(found), at.offset), dy

        def from_residuals(operands: Any, dy: jax.Array, at: _At) -> tuple[Any, jax.Array]:
            residuals = in_order(read(state.residuals, at.offset))
            dx, found = split.input_gradient(at.parameters, residuals, at.context, dy)
            return write(operands, in_order(found), at.cell), dx

        def from_input(operands: Any, dy: jax.Array, at: _At) -> tuple[Any, jax.Array]:
            kept = in_order(read(state.inputs, slot, at.repeat))
            dx, found = split.recompute_input_gradient(at.parameters, kept, at.context, dy)
            return write(operands, in_order(found), at.cell), dx

        def weights(layers: Any, dy: jax.Array, at: _At) -> tuple[Any, jax.Array]:
            operands = in_order(read(state.operands, at.cell))
            return add(layers, split.weight_gradient(at.parameters, operands, at.context), at.local), dy

        steps: dict[Operation, tuple[str, Callable[[Any, jax.Array, _At], tuple[Any, jax.Array]]]] = {
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

            def one(i: jax.Array, carry: tuple[Any, jax.Array], step: Any = step) -> tuple[Any, jax.Array]:
                offset = row['count'] - 1 - i
                repeat = row['first'] + offset
                local, index = self._indices(row, repeat)
                cell = (row['weight_cell'] + i) % max(self.table.weight_cells, 1)
                return step(*carry, _At(repeat, offset, local, cell, self._parameters(local), (index, context)))

            count = jnp.where(following(row['operation'] == operation, x), row['count'], 0)
            buffer, dy = jax.lax.fori_loop(0, count, one, (getattr(state, name), dy))
            state = _replace(state, name, buffer)
        # Without an operation that changes it, it is written back as it was.
        return dataclasses.replace(state, gradients=write(state.gradients, dy, row['gradient_slot'])), dy

    def _context_of(self, rows: Batch, microbatch: jax.Array) -> Any:
        return self.stages.context(rows, self._key(microbatch))

    def _context(self, row: dict[str, jax.Array]) -> Any:
        return self._context_of(self.rows(row['microbatch']), row['microbatch'])

    def _indices(self, row: dict[str, jax.Array], repeat: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Index of a chunk's repeat among this stage's, and in the model."""
        block = row['chunk'] * self.num_stages + self.stage
        return row['chunk'] * self.repeats + repeat, block * self.repeats + repeat

    # One tick.

    def _tick(self, state: _State, columns_and_joint: tuple[jax.Array, jax.Array]) -> tuple[_State, None]:
        columns, joint = columns_and_joint
        row = dict(zip(self.table.columns, columns, strict=True))
        both = dict(zip(self.table.joint, joint, strict=True))

        due = both['embed'] >= 0

        def embed(carry: tuple[jax.Array, Sums]) -> tuple[jax.Array, Sums]:
            x, _, sums = self._embed(self.shared, self.rows(both['embed']), both['embed'])
            return x, added(carry[1], {'layers': sums} if sums else {})

        x, sums = when(due, embed, (self.message, state.sums))
        state = dataclasses.replace(state, sums=sums)
        state = _with_input(state, due & (self.stage == 0), x, both['embed_slot'], 0)

        state, x = self._run_forward(state, row)
        if self.evaluation:
            state = self._loss_only(state, x, both)
            return self._received(state, 'inputs', x, 1, row, both, state.sums), None
        state, dx = self._run_backward(state, x, row)
        state = self._after_last(state, x, dx, both)
        state = self._after_first(state, dx, both)
        state = self._received(state, 'inputs', x, 1, row, both, state.shared)
        return self._received(state, 'gradients', dx, -1, row, both, state.inputs), None

    def _received(
        self,
        state: _State,
        name: str,
        x: jax.Array,
        step: int,
        row: dict[str, jax.Array],
        both: dict[str, jax.Array],
        earlier: Any,
    ) -> _State:
        """Send x `step` stages on, if any stage sends, and keep what arrives where the table says.

        It comes after what made `earlier`.
        """
        to = [(stage, (stage + step) % self.num_stages) for stage in range(self.num_stages)]
        due = following(both[f'send_{name}'] > 0, earlier)
        x = when(due, lambda x: jax.lax.ppermute(x, AXIS, to), x)
        slot = row[f'receive_{name}']
        if name == 'inputs':
            return _with_input(state, slot >= 0, x, slot, 0)
        return dataclasses.replace(state, gradients=write_if(slot >= 0, state.gradients, x, slot))

    def _loss_only(self, state: _State, x: jax.Array, both: dict[str, jax.Array]) -> _State:
        def compute(sums: Sums) -> Sums:
            return added(sums, self._loss(self.shared, x, self.rows(both['loss']), both['loss'])[1])

        return dataclasses.replace(state, sums=when(both['loss'] >= 0, compute, state.sums))

    def _after_last(self, state: _State, x: jax.Array, dx: jax.Array, both: dict[str, jax.Array]) -> _State:
        """Loss and its gradient for the microbatch that left the last chunk, after the backward pass, which gave dx."""
        due = both['loss'] >= 0

        def compute(carry: tuple[Any, Sums, jax.Array]) -> tuple[Any, Sums, jax.Array]:
            shared, sums, _ = carry
            rows = self.rows(both['loss'])
            loss, vjp, found = jax.vjp(
                lambda shared, x: self._loss(shared, x, rows, both['loss']), self.shared, x, has_aux=True
            )
            d_shared, dx = vjp(self._on(0, jnp.ones_like(loss)))
            return jax.tree.map(jnp.add, shared, d_shared), added(sums, found), dx

        carry = state.shared, state.sums, self.message
        shared, sums, dx = when(following(due, dx), compute, carry)
        gradients = write_if(due & (self.stage == self.num_stages - 1), state.gradients, dx, both['loss_slot'])
        return dataclasses.replace(state, shared=shared, sums=sums, gradients=gradients)

    def _after_first(self, state: _State, dx: jax.Array, both: dict[str, jax.Array]) -> _State:
        """Gradient of the embedding of the microbatch that came out of the first chunk."""

        def compute(shared: Any) -> Any:
            microbatch = both['embed_gradient']
            rows = self.rows(microbatch)
            (_, losses), vjp = jax.vjp(lambda shared: self._embed(shared, rows, microbatch)[:2], self.shared)
            (d_shared,) = vjp((self._on(0, dx), jax.tree.map(lambda x: self._on(0, jnp.ones_like(x)), losses)))
            return jax.tree.map(jnp.add, shared, d_shared)

        return dataclasses.replace(state, shared=when(both['embed_gradient'] >= 0, compute, state.shared))


def _zeros(struct: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(struct.shape, struct.dtype)


def _cast(x: jax.Array, placement: Placement) -> jax.Array:
    return x if placement.dtype is None else x.astype(placement.dtype)
