"""Rows times the matrix of their group, for experts that have different numbers of tokens."""

import jax
import jax.numpy as jnp

from llm.kernels.grouped_matmul import blocked, pallas_tpu


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, device: jax.Device) -> jax.Array:
    """Rows of group e times matrix e; rows after the last group give zeros. See reference.grouped_matmul.

    Shapes: lhs [R, D], rhs [E, D, F], sizes [E] int -> [R, F], in the type of lhs.

    Args:
        device: one of those that it will run on.
    """
    if device.platform == 'cpu':
        return blocked.grouped_matmul(lhs, rhs, sizes)
    if device.platform == 'tpu':
        return pallas_tpu.grouped_matmul(lhs, rhs, sizes)
    return jax.lax.ragged_dot(lhs, rhs, sizes.astype(jnp.int32))


__all__ = ['grouped_matmul']
