"""Decoders with experts, small enough to run many of, and what every expert makes of every token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.moe import MixtureOfExperts, MoeConfig
from llm.models.routing import RouterConfig
from tests.models.small_decoders import LAYER, decoder_config

MOE = MoeConfig(num_experts=4, experts_per_token=2, expert=FeedForwardConfig(24))


def moe(router: dict[str, Any] | None = None, **changes: Any) -> MoeConfig:
    """MOE with fields of the layer and its router changed."""
    return dataclasses.replace(MOE, router=RouterConfig(**(router or {})), **changes)


def moe_decoder(config: MoeConfig = MOE, **changes: Any) -> DecoderConfig:
    """A decoder whose layers are of experts."""
    return decoder_config(dataclasses.replace(LAYER, feed_forward=config), **changes)


def dense(layer: MixtureOfExperts, x: jax.Array, weights: jax.Array) -> jax.Array:
    """Every expert on every token, times weights [B, S, E]."""
    total = jnp.zeros_like(x)
    for e in range(layer.config.num_experts):
        up = x @ layer.experts.up[...][e]
        hidden = up if layer.experts.gate is None else jax.nn.silu(x @ layer.experts.gate[...][e]) * up
        total = total + weights[..., e : e + 1] * (hidden @ layer.experts.down[...][e])
    return total
