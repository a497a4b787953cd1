"""What the stages of a pipeline do together, between their operations.

Embedding and loss belong to no stage: their parameters are sharded over all stages, which compute them together
("vocabulary parallelism", Yeung et al. 2024, "Balancing Pipeline Parallelism with Vocabulary Parallelism", section 4).
The same goes for layers before the stages' and for those that are left over when stages have equally many: of those
each stage does some of the rows, with weights that are gathered as they are needed. Further layers for multi-token
prediction are run like these.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm.parallel.pipeline.memory import in_rows_of, rows_first, with_memory, without_memory
from llm.parallel.pipeline.outside import gathering_again, run_repeats
from llm.parallel.pipeline.placement import AXIS, gathered, without_leading_axis
from llm.parallel.pipeline.simulation import Problem
from llm.parallel.pipeline.stages import MEMORY, Batch, Layers, Stages, Sums
from llm.parallel.pipeline.sums import joined
from llm.parallel.sharding import AxisRules, use_rules


class Joint:
    """On one device; everything is that device's part, but for axes that the compiler places."""

    def __init__(
        self,
        problem: Problem,
        stages: Stages,
        rules: AxisRules,
        placements: Any,
        manual: tuple[str, ...],
        batch: Batch,
        key: jax.Array | None,
    ) -> None:
        self.stages, self.rules, self.placements, self.manual = stages, rules, placements, manual
        self.num_stages, self.microbatches = problem.stages, problem.microbatches
        self.staged_repeats = problem.staged_repeats
        self.batch, self.key, self.stage = batch, key, jax.lax.axis_index(AXIS)

    def rows(self, microbatch: jax.Array) -> Batch:
        """The rows of one microbatch."""

        def pick(x: jax.Array) -> jax.Array:
            # A reshape would have the compiler copy the whole batch.
            index = microbatch + self.microbatches * jnp.arange(x.shape[0] // self.microbatches)
            return jnp.take(x, index, axis=0, mode='clip')

        rows: Batch = jax.tree.map(pick, self.batch)
        return rows

    def context(self, rows: Batch, microbatch: jax.Array) -> Any:
        """What layers need of these rows besides x."""
        return self.stages.context(rows, self._key_of(microbatch))

    def _key_of(self, microbatch: jax.Array) -> jax.Array | None:
        return None if self.key is None else jax.random.fold_in(self.key, microbatch)

    def _ends(self, shared: Any) -> Any:
        return gathered(shared['ends'], self.placements['ends'], self.manual)

    def _gathered(self, parameters: Any, placements: Any) -> Any:
        return gathered(parameters, placements, self.manual, from_stages=True)

    def embed(self, shared: Any, rows: Batch, microbatch: jax.Array) -> Layers:
        """What the first stage reads, after the layers before the stages'."""
        x = self.stages.embed(self._ends(shared), rows, self._key_of(microbatch))
        if not shared['leading']:
            return x, {}, {}
        x, losses, sums = self._shared_out(self._leading, shared, x, rows, microbatch, everywhere=True)
        return x, losses, self._placed(sums, microbatch)

    def loss(self, shared: Any, y: Any, rows: Batch, microbatch: jax.Array) -> tuple[jax.Array, Sums]:
        """Of what the last stage gives, after the layers that no stage has; all stages have parts of the vocabulary."""
        y = jax.tree.map(lambda y: jnp.where(self.stage == self.num_stages - 1, y, 0), y)
        losses: Any = {}
        layers: Any = {}
        if not shared['repeats'] and not shared['remainder'] and not shared['multi_token']:
            y = jax.lax.psum(y, AXIS)
        else:
            more = {} if self.stages.ahead is None else self.stages.ahead(self._ends(shared), rows)
            y, losses, layers = self._shared_out(
                self._after_stages, shared, y, rows | more, microbatch, everywhere=False
            )
        loss, sums = self.stages.loss(self._ends(shared), y, rows, self._key_of(microbatch))
        return sum(jax.tree.leaves(losses), loss), joined(sums, self._placed(layers, microbatch))

    def _placed(self, sums: Any, microbatch: jax.Array) -> Any:
        """With the memory among the sums of layers in the rows of the batch that it is of."""
        sums, memory = without_memory(sums)
        return with_memory(sums, in_rows_of(memory, microbatch, self.microbatches))

    def _shared_out(
        self,
        layers: Callable[[Any, Any, Batch, jax.Array], Layers],
        shared: Any,
        x: Any,
        rows: Batch,
        microbatch: jax.Array,
        *,
        everywhere: bool,
    ) -> Layers:
        """Layers that no stage has: each stage does some of the rows, and all get the result.

        Args:
            x: array or tree of arrays [B, ...].
            everywhere: whether every stage has x; else x is the sum over stages.
        """
        count = jax.tree.leaves(x)[0].shape[0]
        if count % self.num_stages:  # all do the same
            return layers(shared, x if everywhere else jax.lax.psum(x, AXIS), rows, microbatch)
        size = count // self.num_stages

        def own(r: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(r, self.stage * size, size)

        x = jax.tree.map(own, x) if everywhere else jax.lax.psum_scatter(x, AXIS, scatter_dimension=0, tiled=True)
        with use_rules(jax.sharding.get_abstract_mesh(), self.rules.splitting('batch', AXIS)):
            x, losses, sums = layers(shared, x, jax.tree.map(own, rows), microbatch)
        sums, memory = without_memory(sums)
        x = jax.lax.all_gather(x, AXIS, axis=0, tiled=True)
        memory = jax.lax.all_gather(memory, AXIS, axis=1, tiled=True)
        losses, sums = jax.lax.psum((losses, sums), AXIS)
        return x, losses, with_memory(sums, memory)

    def _leading(self, shared: Any, x: jax.Array, rows: Batch, microbatch: jax.Array) -> Layers:
        """The layers before the stages', of these rows."""
        assert self.stages.leading is not None

        def gathered(parameters: Any, name: str, *, of_one: bool = False) -> Any:
            placements = self.placements['leading'][name]
            return self._gathered(parameters, without_leading_axis(placements) if of_one else placements)

        context, memory = self.context(rows, microbatch), _remembered(rows, 'leading')
        x, losses, sums = self.stages.leading(shared['leading'], x, context, gathered, *memory)
        return x, losses, {'leading': sums} if sums else {}

    def _after_stages(self, shared: Any, y: Any, rows: Batch, microbatch: jax.Array) -> Layers:
        """Layers after the stages', and those of multi-token prediction, of these rows."""
        context = self.context(rows, microbatch)
        y, losses, sums = self._left_over(shared, y, rows, context)
        if self.stages.multi_token is not None:
            of_one = without_leading_axis(self.placements['multi_token'])

            def gathering(function: Callable[..., Any]) -> Callable[..., Any]:
                again = gathering_again(self.stages.remat)
                return again(lambda parts, *more: function(self._gathered(parts, of_one), *more))

            y, found, more = self.stages.multi_token(
                self._ends(shared), shared['multi_token'], y, rows, context, gathering
            )
            losses, sums = [*losses, found], {**sums, 'multi_token': more}
        return y, losses, {name: each for name, each in sums.items() if each}

    def _left_over(self, shared: Any, y: Any, rows: Batch, context: Any) -> tuple[Any, list[Any], Sums]:
        """The layers after the stages', if there are any."""
        stages, placements = self.stages, self.placements
        repeats = shared['repeats']
        losses, sums = [], {}

        def repeat(parameters: Any, y: Any, index: jax.Array, *memory: Any) -> Layers:
            whole = self._gathered(parameters, without_leading_axis(placements['repeats']))
            return stages.repeat(whole, stages.stream(y), index, context, *memory)

        @gathering_again(stages.remat)
        def remainder(parameters: Any, x: jax.Array) -> Layers:
            whole = self._gathered(parameters, placements['remainder'])
            return stages.remainder(whole, x, context, *_remembered(rows, 'remainder'))

        if repeats or shared['remainder']:  # then stages give x alone
            y = stages.output(y)
        if repeats:
            memory = _remembered(rows, 'repeats')
            y, found, sums['repeats'] = run_repeats(repeat, repeats, y, self.staged_repeats, stages.remat, *memory)
            losses.append(found)
        if shared['remainder']:
            y, found, sums['remainder'] = remainder(shared['remainder'], stages.stream(y))
            losses.append(found)
        return y, losses, sums

    def on(self, stage: int, x: jax.Array) -> jax.Array:
        """x on one stage, 0 on the others: of what all stages have, the derivative is taken on one."""
        return jnp.where(self.stage == stage, x, jnp.zeros_like(x))


def _remembered(rows: Batch, group: str) -> tuple[Any, ...]:
    """The memory of a group of layers, [repeats, B, ...]; () for a model without."""
    memory: Any = rows.get(MEMORY)
    return () if memory is None else (rows_first(memory[group]),)
