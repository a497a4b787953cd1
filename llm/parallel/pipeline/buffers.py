"""Arrays and trees of arrays with numbered entries, read and updated where they are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from llm.parallel.sharding import target_device


def _start(x: jax.Array, index: tuple[jax.Array | int, ...]) -> list[jax.Array]:
    return [jnp.asarray(i, jnp.int32) for i in (*index, *(0,) * (x.ndim - len(index)))]


def read(buffer: Any, *index: jax.Array | int) -> Any:
    """Entry `index` of the leading axes of every array of a tree."""
    return jax.tree.map(lambda x: _read_one(x, *index), buffer)


def _read_one(x: jax.Array, *index: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_slice(x, _start(x, index), (*(1,) * len(index), *x.shape[len(index) :])).reshape(
        x.shape[len(index) :]
    )


def in_order(tree: Any) -> Any:
    """The arrays with their dimensions in memory in order, on the way from or to a buffer.

    A product may like another order. Without this the compiler gives that order to the whole buffer, and copies all of
    it for every user with another wish. Arrays that would be filled up, their last dimension to a TPU's 128 lanes, are
    left to it.
    """

    def one(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if x.ndim and x.shape[-1] % 128 == 0 else x

    return jax.tree.map(one, tree)


def write(buffer: Any, value: Any, *index: jax.Array | int) -> Any:
    """The tree of arrays with this entry replaced, in the buffer's type."""

    def one(x: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(x, new.astype(x.dtype)[(None,) * len(index)], _start(x, index))

    return jax.tree.map(one, buffer, value)


def add(buffer: Any, value: Any, index: jax.Array) -> Any:
    """Add to entry `index` of the leading axis, in the buffer's type."""
    return write(buffer, jax.tree.map(lambda old, new: old + new.astype(old.dtype), read(buffer, index), value), index)


def when(condition: jax.Array, function: Callable[[Any], Any], value: Any) -> Any:
    """function(value) if `condition`, else value: a loop of one step or none, whose buffers are updated in place."""
    return jax.lax.fori_loop(0, condition.astype(jnp.int32), lambda _, value: function(value), value)


def following(condition: jax.Array, *earlier: Any) -> jax.Array:
    """`condition`, which on a CPU is not known before the trees `earlier` are there.

    XLA:CPU starts loops that need nothing of each other in any order, each device in its own. Where both hold
    collectives, devices then wait for each other for ever. On other platforms loops run in one order.
    """
    if target_device().platform != 'cpu':
        return condition
    for tree in earlier:
        leaf = next(x for x in jax.tree.leaves(tree) if x.size and jnp.issubdtype(x.dtype, jnp.floating))
        one = leaf[(0,) * leaf.ndim]
        # True of every number and of NaN; the compiler does not see that.
        condition = condition & ((one == one) | (one != one))  # noqa: PLR0124
    return condition


def write_if(condition: jax.Array, buffer: jax.Array, value: jax.Array, *index: jax.Array | int) -> jax.Array:
    """Write where `condition`; index entries below 0 count as 0, and must come with a false condition."""
    index = tuple(jnp.maximum(i, 0) for i in index)
    return write(buffer, jnp.where(condition, value, read(buffer, *index)), *index)
