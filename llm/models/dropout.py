"""Dropout whose masks depend on the key, the row and the index of a token in it, so they are equal on every mesh."""

import enum

import jax
import jax.numpy as jnp

from llm.parallel.sharding import global_rows


class Purpose(enum.IntEnum):
    """What a layer's random bits are for; folded into the layer's key. Never renumber: masks would change."""

    EMBEDDING = 0
    MIXER = 1
    FEED_FORWARD = 2
    CROSS_ATTENTION = 3
    OUTPUT = 4


def dropout(
    x: jax.Array, rate: float, key: jax.Array | None, purpose: Purpose, token_index: jax.Array | None = None
) -> jax.Array:
    """Zero each element with probability `rate` and scale the rest by 1 / (1 - rate) (Srivastava et al. 2014).

    Shapes: x [B, S, D] -> the same. Without a key, as in evaluation, x is returned as it is.

    Args:
        token_index: [S], index in the row of each token; default: they lie in order.
    """
    if key is None or rate == 0:
        return x
    key = jax.random.fold_in(key, purpose)
    batch, length, width = x.shape
    rows = global_rows(batch)[1] + jnp.arange(batch)
    index = jnp.arange(length) if token_index is None else token_index
    keys = jax.vmap(lambda token: jax.random.fold_in(key, token))((rows[:, None] * length + index).reshape(-1))
    kept = jax.vmap(lambda token: jax.random.bernoulli(token, 1 - rate, (width,)))(keys).reshape(x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))
