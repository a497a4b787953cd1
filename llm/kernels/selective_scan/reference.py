"""The selective scan as it is defined, token by token: what every implementation must equal."""

import jax
import jax.numpy as jnp


def selective_scan(
    x: jax.Array, dt: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, starts: jax.Array, initial: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """h = exp(dt a) h + dt x b, y = c . h, at each token in turn (Gu and Dao 2023, eq. 2 and section 3.3).

    Shapes: x, dt [B, S, F], a [N, F], b, c [B, S, N], starts [B, S] bool (h is zero before these), initial [B, N, F]
    -> y [B, S, F] and the last h [B, N, F], in the dtype of `initial`.
    """
    dtype = initial.dtype

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        x, dt, b, c, start = token
        decay = jnp.exp(dt[:, None] * a)
        state = decay * jnp.where(start[:, None, None], 0, state) + (dt * x)[:, None] * b[:, :, None]
        return state, jnp.sum(state * c[:, :, None], axis=1)

    tokens = [jnp.moveaxis(each, 1, 0) for each in (*(t.astype(dtype) for t in (x, dt, b, c)), starts)]
    final, y = jax.lax.scan(step, initial, tuple(tokens))
    return jnp.moveaxis(y, 0, 1), final
