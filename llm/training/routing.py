"""The sums that routers make, as parts of the loss and as metrics; see llm.models.routing.Router.

They are trees by group of stacked layers, position and name, with a leading repeat axis, and add up over microbatches,
devices and stages like the sums of token losses. Dense models have none.
"""

from typing import Any

import jax
import jax.numpy as jnp


def with_routing_weights(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with what each token counts for in the routers' losses, which are means over real tokens.

    All losses are sums that are divided by the number of tokens with a token loss; more tokens than those are routed
    (prompts, say), so each counts for less than one. Padding, segment 0, counts for nothing.
    """
    found: dict[str, jax.Array] = {}
    # Each side of an encoder-decoder has its own tokens; the same layers see all texts that are compared.
    for sides in (('', 'positive_', 'negative_'), ('encoder_',)):
        present = [side for side in sides if f'{side}segment_ids' in batch]
        real = [(batch[f'{side}segment_ids'] > 0).astype(batch['loss_weights'].dtype) for side in present]
        ratio = jnp.sum(batch['loss_weights']) / jnp.maximum(sum(map(jnp.sum, real)), 1)
        found |= {f'{side}routing_weights': each * ratio for side, each in zip(present, real, strict=True)}
    return batch | found


def routing_loss(routing: Any) -> jax.Array | float:
    """What routers add to the summed loss."""
    layers = [layer for group in routing.values() for layer in group.values()]
    return sum(jnp.sum(layer['loss']) for layer in layers)


def routing_metrics(routing: Any, tokens: jax.Array | float) -> dict[str, jax.Array]:
    """Means over layers of experts of their sums over a whole batch; {} without such layers.

    load_balance_loss: 1 if all experts are equally likely (Switch, eq. 4, without its coefficient). router_z_loss.
    routing_entropy: nats of the scores of a token. expert_load: choices of the busiest expert over the mean;
    worst_expert_load: of the layer where that is largest. drop_rate: choices that no expert had room for, of all.
    """
    layers = [layer for group in routing.values() for layer in group.values()]
    if not layers:
        return {}

    def mean(values: Any) -> jax.Array:
        return jnp.mean(jnp.concatenate([values(layer) for layer in layers]))

    busiest = [layer['load'].max(-1) / jnp.maximum(layer['load'].mean(-1), 1e-9) for layer in layers]
    return {
        'load_balance_loss': mean(lambda layer: layer['balance'] / tokens),
        'router_z_loss': mean(lambda layer: layer['z'] / tokens),
        'routing_entropy': mean(lambda layer: layer['entropy'] / jnp.maximum(layer['routed'], 1)),
        'expert_load': jnp.mean(jnp.concatenate(busiest)),
        'worst_expert_load': jnp.max(jnp.concatenate(busiest)),
        'drop_rate': mean(lambda layer: layer['dropped'] / jnp.maximum(layer['assignments'], 1)),
    }
