"""Decoders small enough to run many of, and what the tests of this folder do with them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.parameters import ParameterSpec, parameter_specs
from tests.compiling import QUICKLY

# jax.jit that compiles in half the time: it runs once on a few numbers, which take no optimizing.
compiled = functools.partial(jax.jit, compiler_options=QUICKLY)

LAYER = LayerConfig(
    mixer=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), feed_forward=FeedForwardConfig(d_ff=24)
)
DECODER = DecoderConfig(vocab_size=31, d_model=16, num_layers=2, pattern=(LAYER,))


def layer(
    mixer: dict[str, Any] | None = None, feed_forward: dict[str, Any] | None = None, **changes: Any
) -> LayerConfig:
    """LAYER with these fields of the layer, its mixer and its feed-forward layer changed."""
    return dataclasses.replace(
        LAYER,
        mixer=dataclasses.replace(LAYER.mixer, **(mixer or {})),
        feed_forward=dataclasses.replace(LAYER.feed_forward, **(feed_forward or {})),
        **changes,
    )


def decoder_config(*pattern: LayerConfig, **changes: Any) -> DecoderConfig:
    """DECODER with these layers, if any are given, and fields changed."""
    return dataclasses.replace(DECODER, pattern=pattern or DECODER.pattern, **changes)


def parameters(config: DecoderConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters of the compute dtype, away from where training starts them (biases are not 0, scales not 1)."""
    generator = np.random.default_rng(seed)

    def draw(spec: ParameterSpec) -> jax.Array:
        values = 0.3 * generator.standard_normal(spec.shape) + (spec.constant or 0.0)
        return jnp.asarray(values, config.compute_dtype)

    return jax.tree.map(draw, parameter_specs(Decoder(config)))


def build(config: DecoderConfig, params: dict[str, Any] | None = None) -> Decoder:
    """A callable decoder, with `parameters(config)` unless others are given."""
    graph, _ = nnx.split(Decoder(config))
    return nnx.merge(graph, parameters(config) if params is None else params)


def run(config: DecoderConfig, params: dict[str, Any], inputs: np.ndarray, **arguments: Any) -> jax.Array:
    """Logits [B, S, V] of `inputs` [B, S], compiled: several times faster than one operation after the other."""
    graph, _ = nnx.split(Decoder(config))
    return compiled(lambda params, inputs, arguments: nnx.merge(graph, params)(inputs, **arguments))(
        params, inputs, arguments
    )


def tokens(batch: int, length: int, vocab_size: int = 31, seed: int = 0) -> np.ndarray:
    """Random token ids [batch, length]."""
    return np.random.default_rng(seed).integers(0, vocab_size, (batch, length)).astype(np.int32)
