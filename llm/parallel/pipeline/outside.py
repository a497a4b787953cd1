"""Layers that no stage of a pipeline has: all stages run them, with weights that are gathered as they are needed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm.parallel.pipeline.stages import Layers, Remat


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for jax.checkpoint."""
    return str(primitive) != 'all_gather'


def gathering_again(remat: Remat) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`remat`, or if that is None what computes nothing again in the backward pass but what is gathered."""
    return remat or functools.partial(jax.checkpoint, policy=_all_but_gathered)


def run_repeats(
    repeat: Callable[..., Layers],
    parameters: Any,
    x: Any,
    first: int,
    remat: Remat,
    *more: Any,
) -> Layers:
    """`repeat(parameters of one, x, index, *more) -> (x, losses, sums)`, which gathers, for one repeat after the other.

    Args:
        parameters, more: trees with a leading axis of repeats. first: index of the first of them.

    Returns:
        (x, losses added up, sums with a leading axis of repeats).
    """
    count = jax.tree.leaves(parameters)[0].shape[0]

    @gathering_again(remat)
    def body(x: Any, each: tuple[Any, ...]) -> tuple[Any, Any]:
        parameters, index, *more = each
        x, *others = repeat(parameters, x, index, *more)
        return x, others

    x, (losses, sums) = jax.lax.scan(body, x, (parameters, first + jnp.arange(count), *more))
    return x, jax.tree.map(jnp.sum, losses), sums
