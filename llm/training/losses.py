"""Token losses, summed; whoever holds the global count of real tokens divides, once."""

from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_vjp
def token_negative_log_likelihood(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target, and the log-partition function.

    The backward pass is written out (softmax minus one-hot, one fused pass over the logits) because differentiating
    a gather gives a scatter, which is slow, and gathers logits whose vocabulary axis is sharded.

    Args:
        logits: [B, S, V], at least fp32.
        targets: [B, S] int.

    Returns:
        (nll [B, S], log_z [B, S]) in nats.
    """
    return _forward(logits, targets)[0]


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]


def _forward(logits: jax.Array, targets: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1)
    return (log_z - target_logits, log_z), (logits, targets, log_z)


def _backward(residuals: Any, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    logits, targets, log_z = residuals
    nll_gradient, log_z_gradient = gradients
    probabilities = jnp.exp(logits - log_z[..., None])
    total = (nll_gradient + log_z_gradient)[..., None] * probabilities
    return total - jnp.where(_is_target(logits, targets), nll_gradient[..., None], 0), None


token_negative_log_likelihood.defvjp(_forward, _backward)


def summed_loss(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of token losses, to be divided by the global sum of weights.

    Args:
        logits: [B, S, V]; targets: [B, S] int; weights: [B, S], 0 on padding.
        z_loss: coefficient of log_z ** 2 (Chowdhery et al. 2022, "PaLM", section 5), which keeps logits bounded.

    Returns:
        (sum of nll + z_loss * log_z ** 2 over tokens, {'nll': sum of nll, 'z_loss': sum of the second term,
        'tokens': sum of weights}).
    """
    nll, log_z = token_negative_log_likelihood(logits, targets)
    weights = weights.astype(nll.dtype)
    sums = {
        'nll': jnp.sum(nll * weights),
        'z_loss': z_loss * jnp.sum(jnp.square(log_z) * weights),
        'tokens': jnp.sum(weights),
    }
    return sums['nll'] + sums['z_loss'], sums
