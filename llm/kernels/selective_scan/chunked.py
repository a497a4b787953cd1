"""The selective scan in plain XLA: token by token, in memory that grows with the length and not with length x state.

Gu and Dao 2023, section 3.3.2: states are kept at the borders of chunks only, and the backward pass computes those
within a chunk again. Channels are the last axis, so that the sum over the state and every product vectorise.
"""

from typing import Any

import jax
import jax.numpy as jnp

_CHUNK = 64


def _by_chunk(x: jax.Array) -> jax.Array:
    """[B, S, ...] -> [chunks, chunk, B, ...]; the tail is filled with zeros, which leave a state as it is."""
    length = x.shape[1]
    chunk = min(_CHUNK, length)
    x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(-1, chunk, *x.shape[1:])


def _by_row(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_by_chunk`."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:length], 0, 1)


def _step(state: jax.Array, a: jax.Array, dt: jax.Array, x: jax.Array, b: jax.Array, start: jax.Array) -> jax.Array:
    """The next state, [B, N, F]."""
    decay = jnp.exp(dt[:, None] * a)
    return decay * jnp.where(start[:, None, None], 0, state) + (dt * x)[:, None] * b[:, :, None]


@jax.custom_vjp
def selective_scan(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, starts: jax.Array, initial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `reference.selective_scan`."""
    return _forward(x, dt, a, b, c, starts, initial)[0]


def _forward(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, starts: jax.Array, initial: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    dtype = initial.dtype

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, dt, b, c, start = token
        state = _step(state, a, dt.astype(dtype), x.astype(dtype), b.astype(dtype), start)
        return state, jnp.sum(state * c.astype(dtype)[:, :, None], axis=1)

    def chunk(state: jax.Array, tokens: Any) -> tuple[jax.Array, Any]:
        after, y = jax.lax.scan(step, state, tokens)
        return after, (y, state)

    final, (y, borders) = jax.lax.scan(chunk, initial, tuple(map(_by_chunk, (x, dt, b, c, starts))))
    return (_by_row(y, x.shape[1]), final), (x, dt, a, b, c, starts, borders)


def _backward(residuals: Any, gradients: tuple[jax.Array, jax.Array]) -> Any:
    x, dt, a, b, c, starts, borders = residuals
    d_y, d_final = gradients
    dtype = borders.dtype

    def forward_step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, dt, b, start = token
        return _step(state, a, dt.astype(dtype), x.astype(dtype), b.astype(dtype), start), state

    def step(carry: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        d_state, d_a = carry  # of the state after this token, and of a so far
        x, dt, b, c, start, before, d_y = (t if t.dtype == bool else t.astype(dtype) for t in token)
        decay = jnp.exp(dt[:, None] * a)
        before = jnp.where(start[:, None, None], 0, before)
        inputs = dt * x
        state = decay * before + inputs[:, None] * b[:, :, None]
        d_state = d_state + c[:, :, None] * d_y[:, None]
        d_c = jnp.sum(state * d_y[:, None], axis=2)
        d_inputs = jnp.sum(d_state * b[:, :, None], axis=1)
        d_b = jnp.sum(d_state * inputs[:, None], axis=2)
        d_before = d_state * decay
        d_exponent = d_before * before
        d_dt = jnp.sum(d_exponent * a, axis=1) + d_inputs * x
        d_a = d_a + d_exponent * dt[:, None]
        return (jnp.where(start[:, None, None], 0, d_before), d_a), (d_inputs * dt, d_dt, d_b, d_c)

    def chunk(carry: Any, tokens: Any) -> tuple[Any, Any]:
        x, dt, b, c, start, border, d_y = tokens
        _, before = jax.lax.scan(forward_step, border, (x, dt, b, start))
        return jax.lax.scan(step, carry, (x, dt, b, c, start, before, d_y), reverse=True)

    tokens = (*map(_by_chunk, (x, dt, b, c, starts)), borders, _by_chunk(d_y))
    # A term of d_a for each row, added up at the end.
    carry = d_final.astype(dtype), jnp.zeros_like(borders[0])
    (d_initial, d_a), found = jax.lax.scan(chunk, carry, tokens, reverse=True)
    rows = [_by_row(each, x.shape[1]).astype(of.dtype) for each, of in zip(found, (x, dt, b, c), strict=True)]
    return *rows[:2], jnp.sum(d_a, axis=0), *rows[2:], None, d_initial


selective_scan.defvjp(_forward, _backward)
