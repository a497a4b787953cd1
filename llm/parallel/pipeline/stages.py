"""What a pipeline asks of a model: the functions that it is made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Batch = dict[str, jax.Array]
Sums = dict[str, Any]
Layers = tuple[jax.Array, Any, Any]  # x, losses, sums
MEMORY = 'memory'


@dataclasses.dataclass(frozen=True)
class Stages:
    """The functions that a model is made of, for a pipeline. They see the rows of one device, and whole parameters.

    Attributes:
        embed: (shared, rows, key of the microbatch) -> x [B, S, D].
        context: (rows, key of the microbatch) -> what `repeat` needs besides x: a tree of arrays.
        repeat: (parameters of one repeat, x, index of the repeat in the model, context) -> (x, losses, sums). Losses
            add to the loss as they are, and sums add up like those of the loss; trees of arrays, which may be empty.
        leading, remainder: (parameters, x, context) -> (x, losses, sums), of the layers before the first repeat and
            after the last. Where rows remember something of the step before, these three have it as one more argument,
            [B, ...] of one repeat and [1, B, ...] of these layers, and the new one among their sums, as MEMORY.
        loss: (shared, x, rows) -> (loss, sums), both summed over the tokens of all `rows`.
        remat: of a repeat: jax.checkpoint with a policy, or None to compute nothing again; see split_backward.
    """

    embed: Callable[[Any, Batch, jax.Array | None], jax.Array]
    context: Callable[[Batch, jax.Array | None], Any]
    repeat: Callable[..., Layers]
    leading: Callable[..., Layers]
    remainder: Callable[..., Layers]
    loss: Callable[[Any, jax.Array, Batch], tuple[jax.Array, Sums]]
    remat: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
