"""Grouped matrix product in plain jnp: the definition that the others are tested against."""

import jax
import jax.numpy as jnp


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    """Rows of group e times matrix e; rows after the last group give zeros.

    Shapes: lhs [R, D], rhs [E, D, F], sizes [E] int: the first sizes[0] rows are group 0, and so on -> [R, F].
    """
    ends = jnp.cumsum(sizes)
    row = jnp.arange(lhs.shape[0])[:, None]
    member = (row >= ends - sizes) & (row < ends)
    return jnp.einsum('RE,RD,EDF->RF', member.astype(lhs.dtype), lhs, rhs)
