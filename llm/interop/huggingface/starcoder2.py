"""StarCoder 2 (Lozhkov et al. 2024): LayerNorm, a plain feed-forward layer, biases everywhere, a window."""

from typing import Any

from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family, all_equal
from llm.interop.huggingface.rope import read_rope
from llm.interop.huggingface.settings import Settings
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import Activation, FeedForwardConfig
from llm.models.normalization import NormConfig

_ACTIVATIONS: dict[str, Activation] = {
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_new': 'gelu_tanh',
    'gelu': 'gelu',
    'relu': 'relu',
}
_TABLE = (
    *llama.OUTSIDE,
    *llama.ATTENTION,
    *llama.PRE_NORMS,
    *llama.linear_rows(
        {'feed_forward/up': f'{llama.LAYER}.mlp.c_fc', 'feed_forward/down': f'{llama.LAYER}.mlp.c_proj'}
    ),
)


def _read(settings: Settings) -> DecoderConfig:
    settings.expect(norm_type='layer_norm', mlp_type='default')
    bias = settings.take('use_bias', bool, True)
    mixer = read_rope(settings) | {'qkv_bias': bias, 'output_bias': bias}
    mixer['window'] = settings.optional('sliding_window', int)
    feed_forward = FeedForwardConfig(
        settings.take('intermediate_size', int), settings.choose('hidden_act', _ACTIVATIONS, 'gelu_pytorch_tanh'), bias
    )
    norm = NormConfig('layer', settings.take('norm_epsilon', float, 1e-5), bias=True)
    return llama.read(settings, mixer, feed_forward=feed_forward, norm=norm, tied=True)


def _write(config: DecoderConfig) -> dict[str, Any]:
    settings = llama.write(config)
    feed_forward = all_equal(config, lambda layer: layer.feed_forward)
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    settings['norm_epsilon'] = settings.pop('rms_norm_eps')
    return settings | {
        'hidden_act': activations.get(feed_forward.activation),
        'use_bias': feed_forward.bias,
        'sliding_window': all_equal(config, lambda layer: layer.attention.window),
    }


STARCODER2 = Family('starcoder2', 'Starcoder2ForCausalLM', _TABLE, _read, _write)
