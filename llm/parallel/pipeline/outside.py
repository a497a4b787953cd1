"""Layers that no stage of a pipeline has: all stages run them, with weights that are gathered as they are needed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Remat = Callable[[Callable[..., Any]], Callable[..., Any]] | None


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for jax.checkpoint."""
    return str(primitive) != 'all_gather'


def gathering_again(remat: Remat) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`remat`, or if that is None what computes nothing again in the backward pass but what is gathered."""
    return remat or functools.partial(jax.checkpoint, policy=_all_but_gathered)


def run_repeats(
    repeat: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any, Any]],
    parameters: Any,
    x: jax.Array,
    first: int,
    remat: Remat,
) -> tuple[jax.Array, Any, Any]:
    """`repeat(parameters of one, x, index) -> (x, losses, sums)`, which gathers, for one repeat after the other.

    Args:
        parameters: with a leading axis of repeats. first: index of the first of them.

    Returns:
        (x, losses added up, sums with a leading axis of repeats).
    """
    count = jax.tree.leaves(parameters)[0].shape[0]

    @gathering_again(remat)
    def body(x: jax.Array, parameters_and_index: tuple[Any, jax.Array]) -> tuple[jax.Array, Any]:
        x, *others = repeat(parameters_and_index[0], x, parameters_and_index[1])
        return x, others

    x, (losses, sums) = jax.lax.scan(body, x, (parameters, first + jnp.arange(count)))
    return x, jax.tree.map(jnp.sum, losses), sums
