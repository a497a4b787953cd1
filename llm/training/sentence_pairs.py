"""The loss of pairs of texts, one a row, beside that of tokens: a mean over pairs, which counts as much as theirs.

`next_sentence` of a batch has the label of a row on all of its tokens; -1 is none.
"""

from typing import Any

import jax
import jax.numpy as jnp


def with_pair_weights(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with what each pair counts for, where all sums are divided by the number of tokens with a loss."""
    if 'next_sentence' not in batch:
        return batch
    real = (batch['next_sentence'] >= 0).astype(batch['loss_weights'].dtype)
    ratio = jnp.sum(batch['loss_weights']) / jnp.maximum(jnp.sum(real[:, 0]), 1)
    return batch | {'pair_weights': real * ratio}


def summed_pairs(logits: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted sum of the losses of pairs, and {'nll', 'correct', 'pairs'}: sums that divide to means.

    Args:
        logits: [B, 2]. batch: without `pair_weights` every pair counts for one.
    """
    labels = batch['next_sentence'][:, 0]
    weights = batch['pair_weights'][:, 0] if 'pair_weights' in batch else labels >= 0
    weights = weights.astype(logits.dtype)
    chosen = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    loss = jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen))
    correct = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == labels))
    return loss, jax.lax.stop_gradient({'nll': loss, 'correct': correct, 'pairs': jnp.sum(weights)})


def pair_metrics(sums: dict[str, Any]) -> dict[str, Any]:
    """next_sentence_loss (mean nats) and next_sentence_accuracy of the sums of a batch or more; {} without pairs."""
    found = sums.get('pairs')
    if found is None:
        return {}
    pairs = found['pairs'] + (found['pairs'] == 0)
    return {'next_sentence_loss': found['nll'] / pairs, 'next_sentence_accuracy': found['correct'] / pairs}
