"""What rows remember from step to step in every layer, on its way through a pipeline.

A stage keeps that of its own layers, reads the part of one repeat and microbatch before each pass, the same one when it
computes the pass again, and writes the new one beside it in the forward pass. That of layers outside of the stages goes
with the rows of the batch; the new one is put together like sums, each microbatch's in its own rows of zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llm.parallel.pipeline.stages import MEMORY, Sums


def by_microbatch(memory: Any, microbatches: int) -> Any:
    """Of every array, [repeats, B, ...] -> [repeats, microbatches, B / microbatches, ...]; row r is in r mod those."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, microbatches, *x.shape[2:]).swapaxes(1, 2), memory)


def of_microbatches(memory: Any) -> Any:
    """The inverse of `by_microbatch`."""
    return jax.tree.map(lambda x: x.swapaxes(1, 2).reshape(x.shape[0], -1, *x.shape[3:]), memory)


def rows_first(memory: Any) -> Any:
    """[repeats, B, ...] -> [B, repeats, ...], as arrays of a batch are, and back."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1), memory)


def in_rows_of(memory: Any, microbatch: jax.Array, microbatches: int) -> Any:
    """That of a microbatch among rows of zeros of the others: [repeats, B / microbatches, ...] -> [repeats, B, ...]."""

    def one(x: jax.Array) -> jax.Array:
        rows = jnp.zeros((*x.shape[:2], microbatches, *x.shape[2:]), x.dtype)
        return rows.at[:, :, microbatch].set(x).reshape(x.shape[0], -1, *x.shape[2:])

    return jax.tree.map(one, memory)


def without_memory(layers: Sums) -> tuple[Sums, Any]:
    """Sums by group of layers without their memory, and that by group; groups that have none are left out of both."""
    others = {group: {name: x for name, x in each.items() if name != MEMORY} for group, each in layers.items()}
    memory = {group: each[MEMORY] for group, each in layers.items() if MEMORY in each}
    return {group: each for group, each in others.items() if each}, memory


def with_memory(layers: Sums, memory: Any) -> Sums:
    """The inverse of `without_memory`."""
    return layers | {group: {**layers.get(group, {}), MEMORY: each} for group, each in memory.items()}
