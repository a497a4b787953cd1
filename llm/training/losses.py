"""Token losses, summed; whoever holds the global count of real tokens divides, once. Logits never exist all at once."""

import math

import jax
import jax.numpy as jnp

from llm.errors import UserError
from llm.kernels.cross_entropy import Placement, summed_cross_entropy, token_cross_entropy
from llm.models.embedding import Projection
from llm.parallel.sharding import manual_axes, names, rules_in_force, target_device


def _placement(projection: Projection, targets: jax.Array) -> Placement:
    """By the rules in force: tokens and vocabulary as of logits, the width of the kernel as of the parameter.

    Raises:
        UserError: a dimension is not divisible by the mesh axes that split it.
    """
    current = rules_in_force()
    if current is None:
        return Placement()
    mesh, rules = current
    output = projection.output_axis
    batch, sequence, vocab = map(names, rules.partition(('batch', 'sequence', output), mesh, parameters=False))
    parameter = rules.partition(projection.axes, mesh, parameters=True)
    # Where the two tables do not agree on the vocabulary the compiler moves the kernel.
    embed = tuple(axis for axis in names(parameter[projection.axes.index('embed')]) if axis not in vocab)
    sizes = (*targets.shape, projection.kernel.shape[1])
    for name, size, axes in zip(('batch', 'sequence', output), sizes, (batch, sequence, vocab), strict=True):
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            raise UserError(
                f'{name!r} of size {size} cannot be divided over mesh axis {"*".join(axes)!r} of size {ways}',
                where='AxisRules.activations',
                fix=f'Make it a multiple of {ways}, or lower MeshConfig.{" or ".join(axes)}.',
            )
    vocab = (*manual_axes(output, parameters=True), *vocab)
    return Placement(mesh, batch, sequence, vocab, embed, target_device().platform)


def token_negative_log_likelihood(
    projection: Projection, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target, and the log-partition function; see `token_cross_entropy`.

    Args:
        hidden: [B, S, D]; targets: [B, S] int. NaN stands where a target is outside the vocabulary.

    Returns:
        (nll [B, S], log_z [B, S]) in nats.
    """
    return token_cross_entropy(
        hidden,
        projection.kernel,
        targets,
        multiplier=projection.multiplier,
        soft_cap=projection.soft_cap,
        bias=projection.bias,
        placement=_placement(projection, targets),
    )


def summed_loss(
    projection: Projection,
    hidden: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: float = 0.0,
    groups: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of token losses, to be divided by the global sum of weights; see `summed_cross_entropy`.

    Where targets are numbers and not classes, the loss is the squared error of the first output.

    Args:
        hidden: [B, S, D]; targets: [B, S] int or float; weights: [B, S], 0 on padding.
        z_loss: coefficient of log_z ** 2 (Chowdhery et al. 2022, "PaLM", section 5), which keeps logits bounded.
        groups: give the sums of row r mod groups apart, [groups] each.

    Returns:
        (sum of nll + z_loss * log_z ** 2 over tokens, {'nll': sum of nll, 'z_loss': sum of the second term,
        'tokens': sum of weights}). Only the first has a gradient.
    """
    if jnp.issubdtype(targets.dtype, jnp.floating):
        predicted = projection(hidden)[..., 0]
        squares = jnp.square(predicted - targets.astype(predicted.dtype))
        weights = weights.astype(predicted.dtype)
        error = jnp.sum(squares * weights)
        return error, {'nll': error, 'z_loss': jnp.zeros_like(error), 'tokens': jnp.sum(weights)}
    loss, sums = summed_cross_entropy(
        hidden,
        projection.kernel,
        targets,
        weights,
        multiplier=projection.multiplier,
        soft_cap=projection.soft_cap,
        bias=projection.bias,
        z_loss=z_loss,
        placement=_placement(projection, targets),
        groups=groups,
    )
    weights = weights.astype(loss.dtype)
    tokens = jnp.sum(weights) if groups is None else jnp.sum(weights.reshape(-1, groups, weights.shape[1]), (0, 2))
    return loss, sums | {'tokens': tokens}
