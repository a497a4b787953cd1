"""Small encoders and encoder-decoders, and published implementations' weights as their parameters, by hand."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llm.models.attention import AttentionConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.heads import MaskedLanguageModelHeadConfig
from llm.models.initialization import initialize
from llm.models.layer import LayerConfig
from llm.models.normalization import NormConfig
from llm.models.parameters import parameter_specs
from llm.models.relative_bias import RelativeBiasConfig
from llm.models.stack import StackConfig

State = Mapping[str, np.ndarray]
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


def built(config: EncoderConfig | EncoderDecoderConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The graph and the parameters of seed 0; biases and scales are not all equal, so that none goes unseen."""
    module = config.build()
    params = initialize(parameter_specs(module), config.initialization, 0)
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype) for x in leaves]
    return nnx.split(module)[0], jax.tree.unflatten(structure, leaves)


# --- weights of transformers ---------------------------------------------------------------------------------------


def nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{'a/b': x} as {'a': {'b': x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(value)
    return tree


def linear(
    state: State, name: str, path: str, heads: tuple[str, int] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """A torch Linear as a kernel, and its bias if there is one; `heads` says which side of it is cut into heads."""
    kernel = state[f'{name}.weight'].T
    if heads is not None:
        shape = (kernel.shape[0], heads[1], -1) if heads[0] == 'out' else (heads[1], -1, kernel.shape[1])
        kernel = kernel.reshape(shape)
    yield path, kernel
    if f'{name}.bias' in state:
        offset = state[f'{name}.bias']
        yield f'{path}_bias', offset.reshape(heads[1], -1) if heads is not None and heads[0] == 'out' else offset


def norm(state: State, name: str, path: str) -> Iterator[tuple[str, np.ndarray]]:
    """A torch LayerNorm or RMSNorm."""
    yield f'{path}/scale', state[f'{name}.weight']
    if f'{name}.bias' in state:
        yield f'{path}/bias', state[f'{name}.bias']


def stacked(layers: list[dict[str, np.ndarray]], prefix: str) -> dict[str, np.ndarray]:
    """Layers of one kind, along a leading axis."""
    return {f'{prefix}/{path}': np.stack([layer[path] for layer in layers]) for path in layers[0]}
