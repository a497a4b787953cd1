"""The definition of a vocabulary projection's cross-entropy in plain jnp: all logits at once, [B, S, V] in memory."""

import jax
import jax.numpy as jnp


def token_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    multiplier: float,
    soft_cap: float | None,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `llm.kernels.cross_entropy.token_cross_entropy`, of which this is the meaning."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum('BSD,DV->BSV', hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype) * multiplier
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    known = (targets >= 0) & (targets < kernel.shape[1])
    target_logits = jnp.take_along_axis(logits, jnp.where(known, targets, 0)[..., None], axis=-1)[..., 0]
    return log_z - jnp.where(known, target_logits, jnp.nan), log_z


def summed_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    multiplier: float,
    soft_cap: float | None,
    z_loss: float,
    bias: jax.Array | None = None,
    groups: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """See `llm.kernels.cross_entropy.summed_cross_entropy`, of which this is the meaning."""
    nll, log_z = token_cross_entropy(hidden, kernel, targets, multiplier=multiplier, soft_cap=soft_cap, bias=bias)
    return weighted_sums(nll, log_z, weights, z_loss, groups)


def weighted_sums(
    nll: jax.Array, log_z: jax.Array, weights: jax.Array, z_loss: float, groups: int | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of tokens and its two terms, by group of rows perhaps, from arrays [B, S]."""
    weights = jax.lax.stop_gradient(weights.astype(nll.dtype))

    def total(losses: jax.Array) -> jax.Array:
        # Not a product alone: what stands on padding may be NaN.
        losses = jnp.where(weights == 0, 0, losses * weights)
        return jnp.sum(losses) if groups is None else jnp.sum(losses.reshape(-1, groups, losses.shape[1]), (0, 2))

    sums = {'nll': total(nll), 'z_loss': z_loss * total(jnp.square(log_z))}
    return jnp.sum(sums['nll'] + sums['z_loss']), jax.lax.stop_gradient(sums)
