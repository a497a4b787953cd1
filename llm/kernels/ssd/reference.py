"""State space duality as it is defined, token by token: what every implementation must equal."""

import jax
import jax.numpy as jnp


def ssd(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, starts: jax.Array, initial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """h = exp(dt a) h + dt x b^T, y = h c, at each token in turn (Dao and Gu 2024, eq. 1 with a scalar A, section 3).

    Shapes: x [B, S, H, K], dt [B, S, H], a [H], b, c [B, S, G, N], starts [B, S] bool (h is zero before these),
    initial [B, H, K, N] -> y [B, S, H, K] and the last h [B, H, K, N], in the dtype of `initial`.
    """
    dtype = initial.dtype
    heads_per_group = x.shape[2] // b.shape[2]

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, dt, b, c, start = token
        b, c = (jnp.repeat(each, heads_per_group, axis=1)[:, :, None] for each in (b, c))
        decay = jnp.where(start[:, None], 0, jnp.exp(dt * a))
        state = decay[..., None, None] * state + (dt[..., None] * x)[..., None] * b
        return state, jnp.sum(state * c, axis=-1)

    tokens = [jnp.moveaxis(each, 1, 0) for each in (*(t.astype(dtype) for t in (x, dt, b, c)), starts)]
    final, y = jax.lax.scan(step, initial, tuple(tokens))
    return jnp.moveaxis(y, 0, 1), final
