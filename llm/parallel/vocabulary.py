"""Lookup and loss where every device of a manual mesh axis has its own part of the vocabulary.

Outside of manual code the compiler does the same by itself, from shardings.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llm.parallel.sharding import map_shards, split_over


def lookup_in_parts(table: jax.Array, ids: jax.Array, axis: str, dtype: Any) -> jax.Array:
    """`llm.parallel.lookup.lookup` in manual code, which sees some of the rows of the table.

    Args:
        axis: logical axis of the table's rows.
    """
    axes = split_over(axis, parameters=True)

    def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
        size = table.shape[0]
        ids = jnp.clip(ids, 0, size * jax.lax.axis_size(axes) - 1) - size * jax.lax.axis_index(axes)
        found = jnp.take(table, ids, axis=0, mode='clip').astype(dtype)
        here = (ids >= 0) & (ids < size)
        # One device has the row and the others zeros, so the sum is exact in any type.
        return jax.lax.psum(jnp.where(here[..., None], found, jnp.zeros((), dtype)), axes)

    # XLA cannot partition a gather over two more axes in manual code.
    ids_axes = ('batch', 'sequence')
    return map_shards(
        look_up, {'table': table, 'ids': ids}, {'table': (axis, None), 'ids': ids_axes}, (*ids_axes, None)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def token_negative_log_likelihood(
    logits: jax.Array, targets: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target, and the log-partition function, of logits cut up over manual axes.

    Every device gets the same result; the gradient counts what each of them does with it.

    Args:
        logits: [B, S, V / devices], at least fp32: a device's part of the vocabulary, in the order of the devices.
        targets: [B, S] int, the same on all devices.
        axes: the mesh axes.

    Returns:
        (nll [B, S], log_z [B, S]) in nats.
    """
    return _forward(logits, targets, axes)[0]


def _is_target(logits: jax.Array, targets: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    first = logits.shape[-1] * jax.lax.axis_index(axes)
    ids = first + jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return ids == targets[..., None]


def _forward(logits: jax.Array, targets: jax.Array, axes: tuple[str, ...]) -> tuple[tuple[jax.Array, jax.Array], Any]:
    highest = jax.lax.pmax(jnp.max(logits, axis=-1), axes)
    total = jax.lax.psum(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1), axes)
    log_z = highest + jnp.log(total)
    target_logits = jax.lax.psum(jnp.sum(jnp.where(_is_target(logits, targets, axes), logits, 0), axis=-1), axes)
    return (log_z - target_logits, log_z), (logits, targets, log_z)


def _backward(axes: tuple[str, ...], residuals: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    logits, targets, log_z = residuals
    nll_gradient, log_z_gradient = jax.lax.psum(gradients, axes)
    total = (nll_gradient + log_z_gradient)[..., None] * jnp.exp(logits - log_z[..., None])
    return total - jnp.where(_is_target(logits, targets, axes), nll_gradient[..., None], 0), None


token_negative_log_likelihood.defvjp(_forward, _backward)
