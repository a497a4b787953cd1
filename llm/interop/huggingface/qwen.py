"""Qwen 2 (Yang et al. 2024), with biases on query, key and value, and Qwen 3, with normalised queries and keys."""

from typing import Any

from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family
from llm.interop.huggingface.rope import read_rope
from llm.interop.huggingface.settings import Settings
from llm.models.decoder import DecoderConfig
from llm.models.normalization import NormConfig


def _windows(settings: Settings) -> list[int | None]:
    num_layers = settings.take('num_hidden_layers', int)
    window = settings.optional('sliding_window', int, 4096)
    full = settings.take('max_window_layers', int, 28)
    if not settings.take('use_sliding_window', bool, False):
        window = None
    return llama.sliding(settings, num_layers, window, [i >= full for i in range(num_layers)])


def _write_windows(config: DecoderConfig) -> dict[str, Any]:
    types = llama.layer_types(config)
    return types | {'use_sliding_window': types['sliding_window'] is not None}


def _read_qwen2(settings: Settings) -> DecoderConfig:
    mixer = read_rope(settings) | {'qkv_bias': True}
    return llama.read(settings, mixer, windows=_windows(settings))


def _read_qwen3(settings: Settings) -> DecoderConfig:
    norm = NormConfig('rms', settings.take('rms_norm_eps', float, 1e-6))
    bias = settings.take('attention_bias', bool, False)
    mixer = read_rope(settings) | {'qk_norm': norm, 'qkv_bias': bias, 'output_bias': bias}
    # The class's own default, whatever the width.
    mixer['head_dim'] = settings.take('head_dim', int, 128)
    return llama.read(settings, mixer, norm=norm, windows=_windows(settings))


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return llama.write(config) | _write_windows(config)


def _write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {'attention_bias': config.pattern[0].attention.qkv_bias}


QWEN2 = Family('qwen2', 'Qwen2ForCausalLM', llama.TABLE, _read_qwen2, _write_qwen2)
QWEN3 = Family('qwen3', 'Qwen3ForCausalLM', llama.TABLE, _read_qwen3, _write_qwen3)
