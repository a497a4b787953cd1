"""A bias on the scores that follows from the distance alone, as T5's does: [H, 2 M + 1], from distance -M to M.

Distance is key index minus query index, and what lies farther than M has the bias of M. All pairs of a block are made
of its few distances by copying, which is also what turns the gradient of a block into that of the distances: sums along
diagonals. No array of S T entries is needed.
"""

import jax
import jax.numpy as jnp


def largest_distance(bias: jax.Array) -> int:
    """M."""
    return bias.shape[-1] // 2


def of_pairs(bias: jax.Array, query_index: jax.Array, key_index: jax.Array) -> jax.Array:
    """The bias of each pair: [H, 2 M + 1], [B or 1, S] and [T] -> [B or 1, H, S, T]."""
    most = largest_distance(bias)
    distance = jnp.clip(key_index - query_index[:, :, None], -most, most)
    return jnp.moveaxis(bias[:, distance + most], 0, 1)


def of_block(bias: jax.Array, first: jax.Array | int, rows: int, columns: int) -> jax.Array:
    """The bias of pairs whose distance is first + column - row: [..., 2 M + 1] -> [..., rows, columns]."""
    most = largest_distance(bias)
    period = rows + columns - 1
    # Distances from -(rows - 1) to columns - 1, those below zero at the end, as remainders of the period are.
    steps = jnp.arange(period)
    steps = jnp.where(steps < columns, steps, steps - period)
    distinct = bias[..., jnp.clip(first + steps, -most, most) + most]
    # A row that is one entry shorter than the period shifts by one each time.
    repeated = jnp.broadcast_to(distinct[..., None, :], (*bias.shape[:-1], rows, period))
    flat = repeated.reshape(*bias.shape[:-1], rows * period)[..., : rows * (period - 1)]
    if period == 1:
        return repeated
    return flat.reshape(*bias.shape[:-1], rows, period - 1)[..., :columns] if rows > 1 else repeated
