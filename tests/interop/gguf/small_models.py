"""Small models of every architecture that GGUF files are written for, the same numbers everywhere and always.

tools/gguf_reference.py has llama.cpp compute their logits; the files must then be the same to the byte.
"""

import dataclasses
import functools
import hashlib
import math
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
from llm.models.latent_attention import LatentAttentionConfig
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.moe import MoeConfig
from llm.models.normalization import NormConfig
from llm.models.parameters import named_specs, parameter_specs
from llm.models.position import RotaryScaling
from llm.models.routing import RouterConfig

V, D, F, LENGTH = 288, 64, 96, 64
DTYPES: tuple[GgufType, ...] = ('F32', 'Q8_0')
# Of the first model, the others too: they are of tensors, whatever these are of.
FIRST = 'llama'
MORE: tuple[GgufType, ...] = ('F16', 'BF16')
# The positions whose logits are kept.
KEPT = slice(3, None, 4)


RMS, LAYER_NORM, SWIGLU = NormConfig('rms', 1e-5), NormConfig('layer', 1e-5, bias=True), FeedForwardConfig(F, 'swiglu')
PLAIN = AttentionConfig(4, 2, 16)
BIASED = AttentionConfig(4, 4, 16, qkv_bias=True, output_bias=True)
YARN = RotaryScaling('yarn', 4.0, 16, attention_factor=0.1 * math.log(4.0) + 1)


def _config(*pattern: LayerConfig, layers: int = 3, **settings: Any) -> DecoderConfig:
    return DecoderConfig(V, D, layers, pattern, pattern[0].norm, **settings)


def _gemma(mixers: list[AttentionConfig], **settings: Any) -> DecoderConfig:
    norm = NormConfig('rms', 1e-6, unit_offset=True)
    mixers = [dataclasses.replace(each, scale=32**-0.5) for each in mixers]
    layers = [LayerConfig(each, FeedForwardConfig(F, 'geglu'), norm, norm_position='sandwich') for each in mixers]
    return _config(*layers, tied_embeddings=True, embedding_multiplier=None, final_logit_soft_cap=3.0, **settings)


def _gemma3() -> DecoderConfig:
    local = AttentionConfig(4, 2, 32, window=8, qk_norm=NormConfig('rms', 1e-6, unit_offset=True), rotary_base=100.0)
    whole = dataclasses.replace(local, window=None, rotary_base=1e4, rotary_scaling=RotaryScaling('linear', 8.0))
    return _gemma([local, local, whole], layers=4)


# Most of the experts: where Q8_0 sends a token to another, it is one that counts little.
def _moe(normalize: bool, per_token: int, **more: Any) -> MoeConfig:
    router = RouterConfig(normalize=normalize, z_loss=0.0, **more)
    return MoeConfig(6, per_token, FeedForwardConfig(32, 'swiglu'), router=router)


def _jamba() -> DecoderConfig:
    recurrent = MambaConfig(2 * D, 8, 16, state_norm=RMS)
    network = FeedForwardConfig(32, 'swiglu')
    layers = [
        LayerConfig(recurrent, _moe(False, 5), RMS),
        LayerConfig(PLAIN, network, RMS),
        LayerConfig(recurrent, network, RMS),
    ]
    return _config(*layers, position='none')


def _deepseek2(query_latent: int | None, **rotation: Any) -> DecoderConfig:
    norm = NormConfig('rms', 1e-6)
    mixer = LatentAttentionConfig(4, 32, 16, 8, 16, query_latent, norm, rotary_neighbours=True, **rotation)
    experts = dataclasses.replace(_moe(False, 2, scaling=1.5), shared=FeedForwardConfig(64, 'swiglu'))
    first = LayerConfig(mixer, SWIGLU, norm)
    return DecoderConfig(V, D, 3, (LayerConfig(mixer, experts, norm),), norm, leading=(first,))


def configs() -> dict[str, DecoderConfig]:
    """By name; the first word is the architecture."""
    qwen3 = dataclasses.replace(PLAIN, head_dim=32, qk_norm=RMS)
    slowed = RotaryScaling('llama3', 8.0, 16, low_frequency_factor=1.0, high_frequency_factor=4.0)
    factors = (1.0, 1.1, 1.3, 1.4, 1.7, 2.0), (1.0, 1.5, 2.0, 3.0, 3.5, 4.0)
    longrope = RotaryScaling(
        'longrope',
        2.0,
        32,
        math.sqrt(1 + math.log(2) / math.log(32)),
        short_factors=factors[0],
        long_factors=factors[1],
    )
    partial: dict[str, Any] = {'rotary_fraction': 0.25}
    over = (0.1 * 0.7 * math.log(4.0) + 1) ** 2 / math.sqrt(24)
    return {
        'llama': _config(LayerConfig(PLAIN, SWIGLU, RMS)),
        'llama tied, slowed': _config(
            LayerConfig(AttentionConfig(4, 1, 32, rotary_base=500.0, rotary_scaling=slowed), SWIGLU, RMS),
            tied_embeddings=True,
        ),
        'llama experts': _config(LayerConfig(PLAIN, _moe(True, 4), RMS)),
        'qwen2': _config(
            LayerConfig(AttentionConfig(4, 2, 16, qkv_bias=True, rotary_base=1e6, rotary_scaling=YARN), SWIGLU, RMS)
        ),
        'qwen3': _config(LayerConfig(qwen3, SWIGLU, RMS), tied_embeddings=True),
        'gemma2': _gemma([AttentionConfig(4, 2, 32, window=w, logit_soft_cap=5.0) for w in (8, None)], layers=4),
        'gemma3': _gemma3(),
        'phi3': _config(
            LayerConfig(dataclasses.replace(PLAIN, rotary_fraction=0.75, rotary_scaling=longrope), SWIGLU, RMS)
        ),
        'starcoder2': _config(
            LayerConfig(
                AttentionConfig(4, 2, 16, qkv_bias=True, output_bias=True, rotary_scaling=RotaryScaling('linear', 2.0)),
                FeedForwardConfig(F, 'gelu_tanh', bias=True),
                LAYER_NORM,
            ),
            tied_embeddings=True,
        ),
        'stablelm': _config(
            LayerConfig(AttentionConfig(4, 2, 16, qkv_bias=True, **partial), SWIGLU, LAYER_NORM),
        ),
        'stablelm 12B': _config(
            LayerConfig(
                AttentionConfig(4, 2, 16, qk_norm=NormConfig('layer', 1e-5), qk_norm_scope='each_head', **partial),
                SWIGLU,
                LAYER_NORM,
                parallel=True,
            ),
        ),
        'gptneox': _config(
            LayerConfig(
                dataclasses.replace(BIASED, **partial),
                FeedForwardConfig(F, 'gelu', bias=True),
                LAYER_NORM,
                parallel=True,
                shared_norm=False,
            ),
        ),
        'gpt2': _config(
            LayerConfig(BIASED, FeedForwardConfig(F, 'gelu_tanh', bias=True), LAYER_NORM),
            position='learned',
            max_positions=LENGTH,
            tied_embeddings=True,
        ),
        'olmo2': _config(
            LayerConfig(
                dataclasses.replace(PLAIN, qk_norm=RMS, qk_norm_scope='all_heads'), SWIGLU, RMS, norm_position='output'
            )
        ),
        'qwen3moe': _config(LayerConfig(qwen3, _moe(True, 4), RMS)),
        'olmoe': _config(
            LayerConfig(AttentionConfig(4, 4, 16, qk_norm=RMS, qk_norm_scope='all_heads'), _moe(False, 3), RMS)
        ),
        'mamba': _config(LayerConfig(MambaConfig(2 * D, 8, 16), None, RMS), position='none', tied_embeddings=True),
        'mamba2': _config(LayerConfig(Mamba2Config(8, 16, 32, 2), None, RMS), position='none'),
        'jamba': _jamba(),
        'deepseek2': _deepseek2(24),
        'deepseek2 without query latent, yarn': _deepseek2(
            None, scale=over, rotary_scaling=dataclasses.replace(YARN, attention_factor=1.0)
        ),
    }


def files() -> list[tuple[str, GgufType]]:
    """Models and types to write."""
    return [(name, dtype) for name in configs() for dtype in (*DTYPES, *(MORE if name == FIRST else ()))]


@functools.cache
def parameters(name: str) -> dict[str, np.ndarray]:
    """By path: numbers that depend on the paths alone."""
    found = {}
    for path, spec in named_specs(parameter_specs(Decoder(configs()[name]))):
        seed = int.from_bytes(hashlib.sha256(f'{name} {path}'.encode()).digest()[:8], 'little')
        # Random integers are the same in every release of NumPy, as normal numbers need not be.
        random = np.random.RandomState(seed % 2**32).randint(-1000, 1001, spec.shape).astype(np.float32)
        offset = np.float32(1 if path.endswith('scale') and 'gemma' not in name else 0)
        if '/b_norm' in path or '/c_norm' in path:
            offset *= np.float32(0.25)  # small states: the rounding of all that makes them multiplies
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
