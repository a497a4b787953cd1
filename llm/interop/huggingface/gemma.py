"""Gemma 2 (Gemma Team 2024) and the text model of Gemma 3 (2025): norms around each branch, local and global layers."""

from typing import Any

from llm.errors import UserError
from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family, all_equal, norm_rows
from llm.interop.huggingface.rope import read_rope, rope_fields, write_rope
from llm.interop.huggingface.settings import Settings
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.normalization import NormConfig

_TABLE = (
    *llama.OUTSIDE,
    *llama.ATTENTION,
    *llama.QK_NORM,
    *llama.FEED_FORWARD,
    *norm_rows(
        {
            'mixer_norm': f'{llama.LAYER}.input_layernorm',
            'mixer_output_norm': f'{llama.LAYER}.post_attention_layernorm',
            'feed_forward_norm': f'{llama.LAYER}.pre_feedforward_layernorm',
            'feed_forward_output_norm': f'{llama.LAYER}.post_feedforward_layernorm',
        }
    ),
)


def _read(settings: Settings, mixer: dict[str, Any], period: int, **arguments: Any) -> DecoderConfig:
    """What both have in common; every `period`-th layer is global."""
    settings.expect(use_bidirectional_attention=False)
    # Set in older files, and not read by the model: hidden_activation is.
    settings.pass_over('hidden_act')
    num_layers = settings.take('num_hidden_layers', int)
    window = settings.optional('sliding_window', int, 4096)
    bias = settings.take('attention_bias', bool, False)
    norm = NormConfig('rms', settings.take('rms_norm_eps', float, 1e-6), unit_offset=True)
    mixer = mixer | {
        'head_dim': settings.take('head_dim', int, 256),
        'scale': settings.take('query_pre_attn_scalar', float, 256.0) ** -0.5,
        'qkv_bias': bias,
        'output_bias': bias,
    }
    feed_forward = FeedForwardConfig(
        settings.take('intermediate_size', int),
        settings.choose('hidden_activation', llama.GATES, 'gelu_pytorch_tanh'),
    )
    return llama.read(
        settings,
        mixer,
        feed_forward=feed_forward,
        norm=norm,
        windows=llama.sliding(settings, num_layers, window, [(i + 1) % period != 0 for i in range(num_layers)]),
        layer={'norm_position': 'sandwich'},
        tied=True,
        embedding_multiplier=None,
        **arguments,
    )


def _read_gemma2(settings: Settings) -> DecoderConfig:
    cap = settings.optional('attn_logit_softcapping', float, 50.0)
    final = settings.optional('final_logit_softcapping', float, 30.0)
    return _read(settings, read_rope(settings) | {'logit_soft_cap': cap}, 2, final_logit_soft_cap=final)


def _read_gemma3(settings: Settings) -> DecoderConfig:
    settings.expect(attn_logit_softcapping=None)
    period = settings.take('sliding_window_pattern', int, settings.take('_sliding_window_pattern', int, 6))
    by_kind = settings.raw('rope_parameters') or {}
    scaling = settings.raw('rope_scaling') or {}
    if not isinstance(by_kind, dict) or not isinstance(scaling, dict):
        raise settings.unsupported('rope_parameters', 'not an object')
    bases = {
        'full_attention': settings.take('rope_theta', float, 1_000_000.0),
        'sliding_attention': settings.take('rope_local_base_freq', float, 10_000.0),
    }
    if by_kind.keys() - bases.keys():
        raise settings.unsupported('rope_parameters', f'supported are {", ".join(bases)}')
    rope = {
        kind: rope_fields(settings, (by_kind.get(kind) or {}) | (scaling if kind == 'full_attention' else {}), base)
        for kind, base in bases.items()
    }
    num_layers = settings.take('num_hidden_layers', int)
    local = llama.sliding(settings, num_layers, 1, [(i + 1) % max(period, 1) != 0 for i in range(num_layers)])
    norm = NormConfig('rms', settings.take('rms_norm_eps', float, 1e-6), unit_offset=True)
    return _read(
        settings,
        {'qk_norm': norm},
        max(period, 1),
        change=lambda i: rope['full_attention' if local[i] is None else 'sliding_attention'],
        final_logit_soft_cap=settings.optional('final_logit_softcapping', float),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    settings = llama.write(config)
    mixer = config.pattern[0].attention
    scale = all_equal(config, lambda layer: layer.attention.score_scale)
    return {
        **settings,
        **llama.layer_types(config),
        'hidden_activation': settings.pop('hidden_act'),
        'query_pre_attn_scalar': _whole(scale**-2),
        'attention_bias': mixer.qkv_bias,
        'final_logit_softcapping': config.final_logit_soft_cap,
    }


def _whole(value: float) -> float:
    """224.00000000000003 as 224."""
    return round(value) if abs(value - round(value)) < 1e-6 else value


def _write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return _write(config) | {'attn_logit_softcapping': all_equal(config, lambda layer: layer.attention.logit_soft_cap)}


def _write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    settings = _write(config)
    mixers = {config.layer(i).attention.window is None: config.layer(i).attention for i in range(config.num_layers)}
    settings.pop('rope_scaling', None)
    if True in mixers:
        settings |= {'rope_theta': mixers[True].rotary_base, 'rope_scaling': write_rope(mixers[True])}
    if False in mixers:
        settings['rope_local_base_freq'] = mixers[False].rotary_base
    if all(mixer.qk_norm is None for mixer in mixers.values()):
        raise UserError('queries and keys are not normalised', where='AttentionConfig.qk_norm')
    return settings


GEMMA2 = Family('gemma2', 'Gemma2ForCausalLM', _TABLE, _read_gemma2, _write_gemma2)
GEMMA3 = Family('gemma3_text', 'Gemma3ForCausalLM', _TABLE, _read_gemma3, _write_gemma3)
