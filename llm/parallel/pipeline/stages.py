"""What a pipeline asks of a model: the functions that it is made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
Sums = dict[str, Any]
Layers = tuple[Any, Any, Any]  # x, losses, sums
# Makes of a function of whole parameters, and more, one of the parameters as devices have them.
Gathering = Callable[[Callable[..., Any]], Callable[..., Any]]
MEMORY = 'memory'
Gather = Callable[..., Any]  # see Stages.leading
Remat = Callable[[Callable[..., Any]], Callable[..., Any]] | None


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
        remainder: (parameters, x, context) -> (x, losses, sums), of the layers after the last repeat. Where rows
            remember something of the step before, these three have it as one more argument, [B, ...] of one repeat and
            [1, B, ...] of the others, and the new one among their sums, as MEMORY.
        loss: (shared, x, rows, key of the microbatch) -> (loss, sums), both summed over the tokens of all `rows`.
        remat: of a repeat: jax.checkpoint with a policy, or None to compute nothing again; see split_backward.
        states: (shared, x) -> what comes out of the last layer, as it is read. [B, S, D]
        multi_token: what else predicts tokens, after the last layer: (shared, parameters, x, rows, context, gathering)
            -> (x of the loss, losses, sums). Only the parameters are as devices have them, stacked by depth;
            `gathering` is for functions of those of one depth.
        ahead: (shared, rows) -> further arrays of these rows that `multi_token` reads, [B, ...] each.
        trunk: whether `multi_token` reads more than x. Then `repeat` and `remainder` give (x, what their last layer
            reads) in place of x, and that is what it gets of the model's last.
    """

    embed: Callable[[Any, Batch, jax.Array | None], jax.Array]
    context: Callable[[Batch, jax.Array | None], Any]
    repeat: Callable[..., Layers]
    leading: Callable[..., Layers] | None
    remainder: Callable[..., Layers]
    loss: Callable[[Any, jax.Array, Batch, jax.Array | None], tuple[jax.Array, Sums]]
    remat: Remat = None
    states: Callable[[Any, jax.Array], jax.Array] = lambda _, x: x
    multi_token: Callable[[Any, Any, Any, Batch, Any, Gathering], Layers] | None = None
    ahead: Callable[[Any, Batch], Batch] | None = None
    trunk: bool = False

    def output(self, x: jax.Array) -> Any:
        """Like what a repeat gives, with this x and nothing of the trunk."""
        return (x, jnp.zeros_like(x)) if self.trunk else x

    def stream(self, y: Any) -> jax.Array:
        """x of what a repeat gives: what the next one reads."""
        x: jax.Array = y[0] if self.trunk else y
        return x

    def with_loss(self, loss: Callable[[jax.Array, Batch], tuple[jax.Array, Sums]]) -> 'Stages':
        """The same, with another loss: (states, rows) -> (loss, sums)."""
        return dataclasses.replace(self, loss=lambda shared, x, rows, _: loss(self.states(shared, x), rows))

    def without_trunk(self) -> 'Stages':
        """The same, where other layers are the model's last."""
        if not self.trunk:
            return self

        def repeat(*arguments: Any) -> Layers:
            y, losses, sums = self.repeat(*arguments)
            return self.stream(y), losses, sums

        return dataclasses.replace(self, repeat=repeat, trunk=False)
