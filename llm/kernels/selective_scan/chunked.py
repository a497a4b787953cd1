"""The selective scan in plain XLA: token by token, in memory that grows with the length and not with length x state.

Gu and Dao 2023, section 3.3.2: states are kept at the borders of chunks only, and the backward pass computes those
within a chunk again. Channels are the last axis, so that the sum over the state and every product vectorise.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llm.kernels.scan_dispatch import filled_up

_CHUNK = 16


def _by_chunk(x: jax.Array) -> jax.Array:
    """[B, S, ...] -> [chunks, chunk, B, ...]; the tail is filled with zeros, which leave a state as it is."""
    chunk = min(_CHUNK, x.shape[1])
    (x,) = filled_up(chunk, x)
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(-1, chunk, *x.shape[1:])


def _by_row(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_by_chunk`."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[2:])[:length], 0, 1)


def _decay(a: jax.Array, dt: jax.Array, reset: jax.Array) -> jax.Array:
    """exp(dt a), or 0 where a segment begins: a [N, F], dt [B, F], reset [B] -> [B, N, F]."""
    return jnp.exp(dt[:, None] * a + reset[:, None, None])


def _after(state: jax.Array, a: jax.Array, x: jax.Array, dt: jax.Array, b: jax.Array, reset: jax.Array) -> jax.Array:
    """The next state, [B, N, F]."""
    return _decay(a, dt, reset) * state + (dt * x)[:, None] * b[:, :, None]


def _resets(starts: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What is added to the exponent of a decay: -inf where a segment begins."""
    return jnp.where(starts, -jnp.inf, 0).astype(dtype)


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

    def step(state: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        x, dt, b, c, reset = (each.astype(dtype) for each in token)
        state = _after(state, a, x, dt, b, reset)
        return state, jnp.sum(state * c[:, :, None], axis=1)

    def chunk(state: jax.Array, tokens: Any) -> tuple[jax.Array, Any]:
        after, y = jax.lax.scan(step, state, tokens)
        return after, (y, state)

    tokens = tuple(map(_by_chunk, (x, dt, b, c, _resets(starts, dtype))))
    final, (y, borders) = jax.lax.scan(chunk, initial, tokens)
    return (_by_row(y, x.shape[1]), final), (x, dt, a, b, c, starts, borders)


def _backward(residuals: Any, gradients: tuple[jax.Array, jax.Array]) -> Any:
    x, dt, a, b, c, starts, borders = residuals
    d_y, d_final = gradients
    dtype = borders.dtype

    def forward_step(state: jax.Array, token: Any) -> tuple[jax.Array, jax.Array]:
        state = _after(state, a, *(each.astype(dtype) for each in token))
        return state, state

    def step(carry: tuple[jax.Array, jax.Array], token: Any) -> tuple[Any, Any]:
        d_state, d_a = carry  # of the state after this token, and of a so far
        x, dt, b, c, reset, before, d_y = (each.astype(dtype) for each in token)
        d_state = d_state + c[:, :, None] * d_y[:, None]
        # Else every sum below computes both again.
        d_state, d_before = jax.lax.optimization_barrier((d_state, d_state * _decay(a, dt, reset)))
        d_inputs = jnp.sum(d_state * b[:, :, None], axis=1)
        # A product of matrices: XLA:CPU does not vectorise a sum over the last axis.
        d_b = jnp.einsum('BNF,BF->BN', d_state, dt * x)
        d_exponent = d_before * before
        d_dt = jnp.sum(d_exponent * a, axis=1) + d_inputs * x
        return (d_before, d_a + d_exponent * dt[:, None]), (d_inputs * dt, d_dt, d_b)

    def chunk(carry: Any, tokens: Any) -> tuple[Any, Any]:
        x, dt, b, c, reset, border, d_y = tokens
        _, after = jax.lax.scan(forward_step, border, (x, dt, b, reset))
        before = jnp.concatenate([border[None], after[:-1]])
        carry, (d_x, d_dt, d_b) = jax.lax.scan(step, carry, (x, dt, b, c, reset, before, d_y), reverse=True)
        return carry, (d_x, d_dt, d_b, jnp.einsum('SBNF,SBF->SBN', after, d_y))

    tokens = (*map(_by_chunk, (x, dt, b, c, _resets(starts, dtype))), borders, _by_chunk(d_y))
    # A term of d_a for each row, added up at the end.
    carry = d_final.astype(dtype), jnp.zeros_like(borders[0])
    (d_initial, d_a), found = jax.lax.scan(chunk, carry, tokens, reverse=True)
    d_x, d_dt, d_b, d_c = (
        _by_row(each, x.shape[1]).astype(of.dtype) for each, of in zip(found, (x, dt, b, c), strict=True)
    )
    return d_x, d_dt, jnp.sum(d_a, axis=0), d_b, d_c, None, d_initial


selective_scan.defvjp(_forward, _backward)
