"""Small models of every kind, with parameters in files as programs are exported from, and arrays to run them on."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm.interop.exporting.signatures import Signature, signatures
from llm.interop.exporting.writing import ProgramFormat, write_programs
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.model import ModelConfig
from llm.models.moe import MoeConfig
from llm.models.normalization import NormConfig
from llm.models.parameters import named_specs, parameter_specs
from tests.models import small_encoders

V, F = 64, 24
RMS, LAYER_NORM = NormConfig('rms', 1e-5), NormConfig('layer', 1e-5, bias=True)
SWIGLU, GROUPED = FeedForwardConfig(F, 'swiglu'), AttentionConfig(2, 1, 8)


def _decoder(*pattern: LayerConfig, layers: int = 2, **settings: Any) -> DecoderConfig:
    return DecoderConfig(V, 16, layers, pattern, pattern[0].norm, **settings)


def _gemma(window: int | None) -> LayerConfig:
    mixer = AttentionConfig(2, 1, 8, window=window, logit_soft_cap=5.0)
    return LayerConfig(mixer, FeedForwardConfig(F, 'geglu'), RMS, norm_position='sandwich')


def configs() -> dict[str, ModelConfig]:
    """By the family that each is like."""
    mixer = AttentionConfig(2, 2, 8, qkv_bias=True, output_bias=True)
    gpt2 = LayerConfig(mixer, FeedForwardConfig(F, 'gelu_tanh', bias=True), LAYER_NORM)
    return {
        'llama': _decoder(LayerConfig(GROUPED, SWIGLU, RMS)),
        'gpt2': _decoder(gpt2, position='learned', max_positions=40, tied_embeddings=True),
        # The last layer is a remainder of the pattern.
        'gemma': _decoder(
            _gemma(3), _gemma(None), layers=3, tied_embeddings=True, embedding_multiplier=None, final_logit_soft_cap=3.0
        ),
        'mixtral': _decoder(LayerConfig(GROUPED, MoeConfig(4, 2, SWIGLU), RMS)),
        'mamba': _decoder(LayerConfig(MambaConfig(32, 2, 4), None, RMS), position='none'),
        'bert': small_encoders.bert(),
        't5': small_encoders.t5(),
    }


@functools.cache
def parameters(name: str) -> dict[str, np.ndarray]:
    """By path: large enough for logits to differ, and small enough for fp32 to be within 1e-5 of float64.

    At twice this T5, which does not scale its scores, is 1.7e-4 from it.
    """
    random = np.random.default_rng(0)
    found = {}
    for path, spec in named_specs(parameter_specs(configs()[name].build())):
        found[path] = (random.normal(size=spec.shape) * 0.15 + (path.endswith('scale'))).astype(np.float32)
    return found


def write(name: str, to: ProgramFormat, directory: Path, **settings: Any) -> tuple[Signature, ...]:
    """A model as programs, and what they should be."""
    values = parameters(name)
    directory.mkdir(parents=True)
    dtypes = dict.fromkeys(values, 'float32')
    write_programs(directory, to, configs()[name], lambda path, index: values[path][index], dtypes, **settings)
    return signatures(configs()[name])


@functools.cache
def _jitted(name: str, program: str) -> Any:
    (signature,) = (each for each in signatures(configs()[name]) if each.name == program)
    return jax.jit(signature.run)


def expected(name: str, program: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a program of a model gives here."""
    return {key: np.asarray(value) for key, value in _jitted(name, program)(parameters(name), dict(arrays)).items()}


def calls(
    name: str, program: Signature, rows: Sequence[tuple[int, int]] = ((2, 7), (3, 9)), steps: int = 3
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """What to call a program of a model with, and what it gives here.

    Args:
        rows: batch and length of each call. steps: of `decode`, a prompt and the tokens after it.
    """
    for batch, length in rows:
        given = arrays(program, batch, length)
        for _ in range(steps if program.name == 'decode' else 1):
            wanted = expected(name, program.name, given)
            yield given, wanted
            if program.name == 'decode':
                given = next_arrays(wanted, given)


def arrays(program: Signature, batch: int, length: int, room: int = 16) -> dict[str, np.ndarray]:
    """Inputs of a program: rows of different lengths, an empty cache, any memory of an encoder."""
    random = np.random.default_rng(batch)
    sizes = {'batch': batch, 'length': length, 'encoder_length': length + 2, 'room': room}
    found: dict[str, np.ndarray] = {}
    for each in program.inputs:
        shape = [size if isinstance(size, int) else sizes[size] for size in each.shape]
        if each.name.endswith('lengths'):
            found[each.name] = np.arange(length - batch + 1, length + 1, dtype=np.int32)
        elif each.name.endswith('tokens'):
            found[each.name] = random.integers(1, 30, shape, np.int32)
        elif each.name.startswith('memory'):
            found[each.name] = random.normal(size=shape).astype(each.dtype)
        elif each.name == 'token_types':
            found[each.name] = random.integers(0, 2, shape, np.int32)
        else:
            found[each.name] = np.zeros(shape, each.dtype)
    return found


def next_arrays(made: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs of `decode` for the most probable next token of each row."""
    tokens = made['logits'].argmax(-1)[:, None].astype(np.int32)
    cache = {name.removeprefix('new_'): np.asarray(array) for name, array in made.items() if name != 'logits'}
    ones = np.ones(len(tokens), np.int32)
    return {**before, 'tokens': tokens, 'lengths': ones, 'offsets': before['offsets'] + before['lengths'], **cache}
