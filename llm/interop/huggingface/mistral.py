"""Mistral (Jiang et al. 2023): Llama with a window."""

from typing import Any

from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family, all_equal
from llm.interop.huggingface.rope import read_rope
from llm.interop.huggingface.settings import Settings
from llm.models.decoder import DecoderConfig


def _read(settings: Settings) -> DecoderConfig:
    window = settings.optional('sliding_window', int, 4096)
    return llama.read(settings, read_rope(settings) | {'window': window})


def _write(config: DecoderConfig) -> dict[str, Any]:
    return llama.write(config) | {'sliding_window': all_equal(config, lambda layer: layer.attention.window)}


MISTRAL = Family('mistral', 'MistralForCausalLM', llama.TABLE, _read, _write)
