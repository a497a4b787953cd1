"""From the order in which layers are stored to the order in which an interleaved pipeline runs them, and back.

A stage stores contiguous repeats, whatever runs them: stage s of p has the blocks s * v .. s * v + v - 1 of p * v. With
v chunks a stage it runs the blocks s, s + p, s + 2 p, ... Blocks are sent where they are run, and gradients back, once
a step: less than the layers' own size over the links, or everybody else would have to reorder the train state.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def _rounds(stages: int, chunks: int) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """`chunks` rounds in which every stage sends one block and gets one.

    Returns:
        For each round (receiver of each stage, which of its stored blocks each stage sends, which of its chunks each
        stage gets).
    """
    # A block is an edge from where it is stored to where it is run; every stage has `chunks` of both kinds, so the
    # edges divide into perfect matchings (König 1916).
    edges: dict[tuple[int, int], list[int]] = {
        (block // chunks, block % stages): [] for block in range(stages * chunks)
    }
    for block in range(stages * chunks):
        edges[block // chunks, block % stages].append(block)
    rounds = []
    for _ in range(chunks):
        sender_of: dict[int, int] = {}

        def place(sender: int, tried: set[int], sender_of: dict[int, int] = sender_of) -> bool:
            for receiver in range(stages):
                if receiver not in tried and edges.get((sender, receiver)):
                    tried.add(receiver)
                    if receiver not in sender_of or place(sender_of[receiver], tried):
                        sender_of[receiver] = sender
                        return True
            return False

        for sender in range(stages):
            place(sender, set())
        receivers = {sender: receiver for receiver, sender in sender_of.items()}
        blocks = [edges[sender, receivers[sender]].pop() for sender in range(stages)]
        got = [blocks[sender_of[stage]] // stages for stage in range(stages)]
        rounds.append(
            (tuple(receivers[s] for s in range(stages)), tuple(block % chunks for block in blocks), tuple(got))
        )
    return rounds


def to_chunks(layers: Any, stages: int, chunks: int, axis: str) -> Any:
    """A stage's stored repeats -> the repeats that it runs, chunk after chunk; inside shard_map over `axis`."""
    rounds = [
        ([(s, receivers[s]) for s in range(stages)], sends, gets) for receivers, sends, gets in _rounds(stages, chunks)
    ]
    return _exchange(layers, rounds, chunks, axis)


def from_chunks(layers: Any, stages: int, chunks: int, axis: str) -> Any:
    """The inverse of `to_chunks`."""
    rounds = [
        ([(receivers[s], s) for s in range(stages)], gets, sends) for receivers, sends, gets in _rounds(stages, chunks)
    ]
    return _exchange(layers, rounds, chunks, axis)


def _exchange(layers: Any, rounds: list[Any], chunks: int, axis: str) -> Any:
    stage = jax.lax.axis_index(axis)

    def one(x: jax.Array) -> jax.Array:
        blocks = x.reshape(chunks, x.shape[0] // chunks, *x.shape[1:])
        result = jnp.zeros_like(blocks)
        for permutation, sends, gets in rounds:
            block = jax.lax.dynamic_index_in_dim(blocks, jnp.asarray(np.array(sends))[stage], keepdims=False)
            block = jax.lax.ppermute(block, axis, permutation)
            result = jax.lax.dynamic_update_index_in_dim(result, block, jnp.asarray(np.array(gets))[stage], 0)
        return result.reshape(x.shape)

    return jax.tree.map(one, layers)
