"""Dropout whose masks depend on the key and the global shape only, so they are equal on every mesh."""

import enum

import jax
import jax.numpy as jnp

from llm.parallel.sharding import global_rows


class Purpose(enum.IntEnum):
    """What a layer's random bits are for; folded into the layer's key. Never renumber: masks would change."""

    EMBEDDING = 0
    MIXER = 1
    FEED_FORWARD = 2


def dropout(x: jax.Array, rate: float, key: jax.Array | None, purpose: Purpose) -> jax.Array:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    Shapes: x [B, ...] -> the same. Without a key, as in evaluation, x is returned as it is.
    """
    if key is None or rate == 0:
        return x
    rows, first = global_rows(x.shape[0])
    kept = jax.random.bernoulli(jax.random.fold_in(key, purpose), 1 - rate, (rows, *x.shape[1:]))
    if rows > x.shape[0]:
        kept = jax.lax.dynamic_slice_in_dim(kept, first, x.shape[0])
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))
