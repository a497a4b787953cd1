"""Small encoders and encoder-decoders."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from llm.models.attention import AttentionConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.heads import MaskedLanguageModelHeadConfig
from llm.models.initialization import initialize
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.normalization import NormConfig
from llm.models.parameters import parameter_specs
from llm.models.relative_bias import RelativeBiasConfig
from llm.models.stack import StackConfig

V, D, H, K, F = 61, 32, 4, 8, 48


def bert(
    layers: int = 2,
    *,
    vocab: int = V,
    width: int = D,
    heads: int = H,
    d_ff: int = F,
    epsilon: float = 1e-12,
    mixer: AttentionConfig | None = None,
    **changes: Any,
) -> EncoderConfig:
    """BERT: layers normalised after each branch, biases everywhere."""
    norm = NormConfig('layer', epsilon, bias=True)
    plain = AttentionConfig(heads, heads, width // heads, causal=False, qkv_bias=True, output_bias=True)
    layer = LayerConfig(mixer or plain, FeedForwardConfig(d_ff, 'gelu', bias=True), norm, 'post')
    config = EncoderConfig(
        vocab_size=vocab,
        d_model=width,
        layers=StackConfig(layers, (layer,)),
        max_positions=40,
        token_types=2,
        embedding_norm=norm,
        head=MaskedLanguageModelHeadConfig('gelu', norm),
    )
    return dataclasses.replace(config, **changes)


def t5(layers: int = 2, *, gated: bool = True, **changes: Any) -> EncoderDecoderConfig:
    """T5: version 1.1, or the first where feed-forward layers are not gated and embeddings tied."""
    norm = NormConfig('rms', 1e-6)
    mixer = AttentionConfig(H, H, K, causal=False, scale=1.0)
    layer = LayerConfig(mixer, FeedForwardConfig(F, 'geglu' if gated else 'relu'), norm)
    decoding = dataclasses.replace(layer, mixer=dataclasses.replace(mixer, causal=True), cross=mixer)
    config = EncoderDecoderConfig(
        vocab_size=V,
        d_model=D,
        encoder=StackConfig(layers, (layer,), norm, RelativeBiasConfig(8, 20)),
        decoder=StackConfig(layers, (decoding,), norm, RelativeBiasConfig(8, 20, bidirectional=False)),
        tied_embeddings=not gated,
    )
    return dataclasses.replace(config, **changes)


def hybrid_t5(**changes: Any) -> EncoderDecoderConfig:
    """T5 whose decoder has layers of both kinds of Mamba around one that attends to its own row."""
    base = t5()
    layer = base.decoder.pattern[0]
    mixers = (MambaConfig(64, 2, 4), layer.mixer, Mamba2Config(4, 16, 6))
    pattern = tuple(dataclasses.replace(layer, mixer=mixer) for mixer in mixers)
    return dataclasses.replace(
        base, decoder=dataclasses.replace(base.decoder, num_layers=3, pattern=pattern), **changes
    )


def built(config: EncoderConfig | EncoderDecoderConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The graph and the parameters of seed 0; biases and scales are not all equal, so that none goes unseen."""
    module = config.build()
    params = initialize(parameter_specs(module), config.initialization, 0)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype) for x in leaves]
    return nnx.split(module)[0], jax.tree.unflatten(structure, leaves)
