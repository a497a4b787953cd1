"""The losses of multi-token prediction: targets further ahead, what they count for, and figures by depth.

Depth k = 2, 3, ... predicts the target k - 1 places after the next token's, where that is of the same document and has
a loss. Every depth's loss is a mean over its own targets of the whole batch, however that is cut up.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm.models.embedding import Projection
from llm.models.multi_token import MultiTokenConfig
from llm.training.losses import summed_loss

_TARGETS, _WEIGHTS = 'targets_ahead_', 'loss_weights_ahead_'


def with_targets_ahead(batch: dict[str, jax.Array], config: MultiTokenConfig | None) -> dict[str, jax.Array]:
    """The batch with targets and weights of every depth, [B, S] each; tokens must lie in order."""
    if config is None:
        return batch
    targets, weights, segments = (batch[name] for name in ('targets', 'loss_weights', 'segment_ids'))
    found = {}
    for further in range(1, config.depths + 1):
        depth = further + 1

        def shifted(x: jax.Array, further: int = further) -> jax.Array:
            return jnp.pad(x, ((0, 0), (0, further)))[:, further:]

        same = (segments > 0) & (shifted(segments) == segments)
        found[f'{_TARGETS}{depth}'] = shifted(targets)
        found[f'{_WEIGHTS}{depth}'] = jnp.where(same, shifted(weights), 0)
    return batch | found


def weighted_depths(batch: dict[str, jax.Array], config: MultiTokenConfig | None) -> dict[str, jax.Array]:
    """The batch with weights that make a mean of every depth's losses, where all sums are divided by the same number.

    That is the number of targets of the next token; see MultiTokenConfig.depth_weight for what the mean counts for.
    """
    if config is None:
        return batch
    tokens = jnp.sum(batch['loss_weights'])
    scaled = {}
    for depth in range(2, config.depths + 2):
        weights = batch[f'{_WEIGHTS}{depth}']
        own = jnp.sum(weights)
        scaled[f'{_WEIGHTS}{depth}'] = weights * jnp.where(own > 0, config.depth_weight * tokens / own, 0)
    return batch | scaled


def depths_of(batch: dict[str, jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """(targets, weights) by depth, the next token's first, and no more than that without `with_targets_ahead`."""
    count = 1 + sum(name.startswith(_TARGETS) for name in batch)
    further = range(2, count + 1)
    targets = [batch['targets'], *(batch[f'{_TARGETS}{depth}'] for depth in further)]
    return targets, [batch['loss_weights'], *(batch[f'{_WEIGHTS}{depth}'] for depth in further)]


def is_of_depths(name: str) -> bool:
    """Whether an array of a batch is one of those that `with_targets_ahead` adds."""
    return name.startswith((_TARGETS, _WEIGHTS))


def summed_losses(
    projection: Projection,
    hidden: jax.Array,
    targets: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    z_loss: float,
) -> tuple[jax.Array, dict[str, Any]]:
    """The weighted sum of the losses of all depths, and sums as of `summed_loss` of the next token alone.

    All depths are one call: their logits never exist together, and the output projection has one gradient.

    Args:
        hidden: [B, n, S, D].

    Returns:
        (sum, sums), with {'nll': [depths], 'tokens': [depths]} of the further depths as 'ahead'.
    """
    depths = len(targets)

    def rows(each: Sequence[jax.Array]) -> jax.Array:
        # Depth by depth within a row of the batch: so every device keeps its own rows.
        x = jnp.stack(list(each), axis=1)
        return x.reshape(-1, *x.shape[2:])

    states = hidden.reshape(-1, *hidden.shape[2:])
    loss, sums = summed_loss(projection, states, rows(targets), rows(weights), z_loss, groups=depths)
    ahead = {name: sums[name][1:] for name in ('nll', 'tokens')}
    return loss, {**{name: x[0] for name, x in sums.items()}, 'ahead': ahead}


def depth_metrics(sums: dict[str, Any]) -> dict[str, Any]:
    """Mean loss in nats of the token 2, 3, ... ahead, `loss_2_ahead` and so on; {} without multi-token prediction."""
    ahead = sums.get('ahead')
    if ahead is None:
        return {}
    means = ahead['nll'] / (ahead['tokens'] + (ahead['tokens'] == 0))
    return {f'loss_{depth}_ahead': mean for depth, mean in enumerate(means, 2)}
