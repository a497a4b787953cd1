"""State space duality in plain XLA: chunk by chunk, each in products of matrices (Dao and Gu 2024, section 6).

A loop hands the state from chunk to chunk. The backward pass keeps the state before each chunk and computes the chunk
again, so memory grows with length x state / chunk, and a chunk's scores stay in the cache of a CPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llm.kernels.scan_dispatch import filled_up

CHUNK = 32  # with 64 layers took longer on a CPU, with 16 about as long; those keep twice the states


def _by_chunk(x: jax.Array, chunk: int) -> jax.Array:
    """[B, S, ...] -> [chunks, B, chunk, ...]; the tail is filled with zeros, which leave a state as it is."""
    (x,) = filled_up(chunk, x)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def ssd(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    starts: jax.Array,
    initial: jax.Array,
    *,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """See `reference.ssd`."""
    batch, length, heads, size = x.shape
    chunk = min(chunk, length)
    tokens = [_by_chunk(each, chunk) for each in (x, dt, b, c, starts)]
    run = jax.checkpoint(functools.partial(_run_chunk, a), prevent_cse=False)
    final, y = jax.lax.scan(run, initial, tuple(tokens))
    y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, heads, size)
    return y[:, :length], final


def _run_chunk(a: jax.Array, state: jax.Array, tokens: Any) -> tuple[jax.Array, jax.Array]:
    """The state after Q tokens, and their y [B, Q, H, K].

    Within the chunk y = (L * C B^T) (dt x), where L[i, j] is what is left at token i of what j wrote; to that comes
    what is left of the state before the chunk.
    """
    x, dt, b, c, starts = tokens
    dtype, exact = state.dtype, jax.lax.Precision.HIGHEST
    batch, length, heads, size = x.shape
    groups = b.shape[2]
    lower = jnp.tril(jnp.ones((length, length), bool))
    # Sums of the rates up to each token, by a product: a cumulative sum is slow on CPUs.
    sums = jnp.einsum('ij,bjh->bhi', lower.astype(dtype), dt.astype(dtype) * a, precision=exact)
    segments = jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    readable = lower & (segments[:, :, None] == segments[:, None])
    # Masked before the exponential: what is hidden could overflow.
    left = jnp.exp(jnp.where(readable[:, None], sums[..., None] - sums[:, :, None], -jnp.inf))
    weights = left * jnp.moveaxis(dt, 2, 1)[:, :, None]
    scores = jnp.einsum('bign,bjgn->bgij', c, b, preferred_element_type=dtype)
    mixing = (weights.reshape(batch, groups, -1, length, length) * scores[:, :, None]).astype(x.dtype)
    mixing = mixing.reshape(batch, heads, length, length)
    y = jnp.einsum('bhij,bjhk->bihk', mixing, x, preferred_element_type=dtype)
    # The state before the chunk, grouped like b and c.
    grouped = state.reshape(batch, groups, -1, size, state.shape[-1]).astype(c.dtype)
    read = jnp.einsum('bign,bgrkn->bigrk', c, grouped, preferred_element_type=dtype).reshape(y.shape)
    kept = jnp.exp(jnp.where(segments[:, None] == 0, sums, -jnp.inf))
    y = y + read * jnp.moveaxis(kept, 1, 2)[..., None]
    written = jnp.moveaxis(weights[:, :, -1], 1, 2)[..., None] * x.astype(dtype)
    written = written.reshape(batch, length, groups, -1, size).astype(x.dtype)
    new = jnp.einsum('bjgrk,bjgn->bgrkn', written, b, preferred_element_type=dtype).reshape(state.shape)
    return kept[:, :, -1, None, None] * state + new, y
