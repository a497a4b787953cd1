"""Small models of every architecture that GGUF files are written for, the same numbers everywhere and always.

tools/gguf_reference.py has llama.cpp compute their logits; the files must then be the same to the byte.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.vocabularies import ByteLevelBPE, Vocabulary
from llm.data.vocabularies.byte_alphabet import BYTE_ALPHABET
from llm.interop.gguf.files import GgufType, write_gguf
from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.normalization import NormConfig
from llm.models.parameters import named_specs, parameter_specs
from llm.models.position import RotaryScaling

V, D, F, LENGTH = 288, 64, 96, 64
DTYPES: tuple[GgufType, ...] = ('F32', 'F16', 'BF16', 'Q8_0')
# The positions whose logits are kept.
KEPT = slice(3, None, 4)
TEXT = "The hare's ears: 12 élans 🐢\n"


def _config(layer: LayerConfig, layers: int = 3, **settings: Any) -> DecoderConfig:
    pattern = settings.pop('pattern', (layer,))
    return DecoderConfig(V, D, layers, pattern, layer.norm, **settings)


def _gemma2() -> DecoderConfig:
    norm = NormConfig('rms', 1e-6, unit_offset=True)

    def layer(window: int | None) -> LayerConfig:
        mixer = AttentionConfig(4, 2, 32, window=window, logit_soft_cap=5.0, scale=32**-0.5)
        return LayerConfig(mixer, FeedForwardConfig(F, 'geglu'), norm, norm_position='sandwich')

    settings = {'tied_embeddings': True, 'embedding_multiplier': None, 'final_logit_soft_cap': 3.0}
    return _config(layer(8), 4, pattern=(layer(8), layer(None)), **settings)


def configs() -> dict[str, DecoderConfig]:
    """By name; the first word is the architecture."""
    rms, swiglu = NormConfig('rms', 1e-5), FeedForwardConfig(F, 'swiglu')
    layer_norm = NormConfig('layer', 1e-5, bias=True)
    plain = AttentionConfig(4, 2, 16)
    slowed = RotaryScaling('llama3', 8.0, 16, low_frequency_factor=1.0, high_frequency_factor=4.0)
    gpt2 = LayerConfig(
        AttentionConfig(4, 4, 16, qkv_bias=True, output_bias=True),
        FeedForwardConfig(F, 'gelu_tanh', bias=True),
        layer_norm,
    )
    return {
        'llama': _config(LayerConfig(plain, swiglu, rms)),
        'llama tied, slowed': _config(
            LayerConfig(AttentionConfig(4, 1, 32, rotary_base=500.0, rotary_scaling=slowed), swiglu, rms),
            tied_embeddings=True,
        ),
        'qwen2': _config(LayerConfig(AttentionConfig(4, 2, 16, qkv_bias=True, rotary_base=1e6), swiglu, rms)),
        'qwen3': _config(LayerConfig(AttentionConfig(4, 2, 32, qk_norm=rms), swiglu, rms), tied_embeddings=True),
        'gemma2': _gemma2(),
        'gpt2': _config(gpt2, position='learned', max_positions=LENGTH, tied_embeddings=True),
    }


@functools.cache
def parameters(name: str) -> dict[str, np.ndarray]:
    """By path: numbers that depend on the paths alone."""
    found = {}
    for path, spec in named_specs(parameter_specs(Decoder(configs()[name]))):
        seed = int.from_bytes(hashlib.sha256(f'{name} {path}'.encode()).digest()[:8], 'little')
        # Random integers are the same in every release of NumPy, as normal numbers need not be.
        random = np.random.RandomState(seed % 2**32).randint(-1000, 1001, spec.shape).astype(np.float32)
        offset = np.float32(1 if path.endswith('scale') and 'gemma' not in name else 0)
        found[path] = offset + random * np.float32(0.0002)
    return found


def vocabulary() -> Vocabulary:
    """Byte-level BPE with a few merges."""
    merges = [('h', 'e'), ('Ġ', 'he'), ('Ġhe', 'a'), ('Ã', '©'), ('l', 'a'), ('1', '2'), ('T', 'he'), ('r', 's')]
    spellings = [*BYTE_ALPHABET, *(left + right for left, right in merges)]
    special = {'<pad>': 0, '<eos>': 1, '<bos>': 2}
    roles = {'pad': '<pad>', 'eos': '<eos>', 'bos': '<bos>'}
    return ByteLevelBPE({s: 3 + i for i, s in enumerate(spellings)}, merges, special, roles)


def reader(name: str) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """The pieces of a model's parameters."""
    return lambda path, index: parameters(name)[path][index]


def write(name: str, dtype: GgufType, directory: Path) -> Path:
    """The model as a file."""
    path = directory / f'{name.replace(" ", "_")}.{dtype}.gguf'
    settings: dict[str, Any] = {'sequence_length': LENGTH, 'vocabulary': vocabulary(), 'name': name}
    write_gguf(path, configs()[name], reader(name), dtype=dtype, **settings)
    return path


def token_ids() -> list[int]:
    """A text of 48 tokens, the first of them bos."""
    return [2, *np.random.RandomState(7).randint(3, V - 22, 47).tolist()]
