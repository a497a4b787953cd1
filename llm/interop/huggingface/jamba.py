"""Jamba (Lieber et al. 2024): Mamba and, in one layer of several, attention without positions; experts in some."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llm.errors import UserError
from llm.interop.huggingface import llama, mamba
from llm.interop.huggingface.experts import expert_rows, read_router
from llm.interop.huggingface.family import Family, all_equal, norm_rows, repeating
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.moe import MoeConfig
from llm.models.normalization import NormConfig

_MAMBA, _NETWORK = (f'{llama.LAYER}.{part}' for part in ('mamba', 'feed_forward'))
_MATRICES = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}
_TABLE = (
    Row('embedding/table', 'model.embed_tokens.weight'),
    *norm_rows(
        {
            'final_norm': 'model.final_layernorm',
            'mixer_norm': f'{llama.LAYER}.input_layernorm',
            'feed_forward_norm': f'{llama.LAYER}.pre_ff_layernorm',
        }
    ),
    Row('head/kernel', 'lm_head.weight', 'V D -> D V'),
    *(dataclasses.replace(row, beside='mixer/query') for row in llama.ATTENTION),
    *mamba.mixer_rows(_MAMBA),
    *norm_rows({f'mixer/{name}_norm': f'{_MAMBA}.{name}_layernorm' for name in ('dt', 'b', 'c')}),
    *llama.linear_rows({f'feed_forward/{ours}': f'{_NETWORK}.{name}' for ours, name in _MATRICES.items()}),
    *expert_rows('feed_forward', _MATRICES, 'router'),
)


def _every(settings: Settings, kind: str, period: int, offset: int, num_layers: int) -> list[bool]:
    """Whether each layer is of a kind that comes once in a period; period and offset are the class's own defaults."""
    period = settings.take(f'{kind}_layer_period', int, period)
    offset = settings.take(f'{kind}_layer_offset', int, offset)
    if not 0 <= offset < period:
        raise settings.unsupported(f'{kind}_layer_offset', f'use from 0 to {kind}_layer_period - 1')
    return [i % period == offset for i in range(num_layers)]


def _read(settings: Settings) -> DecoderConfig:
    mamba.pass_over(settings)
    settings.pass_over('max_position_embeddings', 'n_ctx', 'calc_logits_for_entire_prompt')
    settings.expect(mamba_inner_layernorms=True, sliding_window=None)
    width, num_layers = settings.take('hidden_size', int, 4096), settings.take('num_hidden_layers', int, 32)
    norm = NormConfig('rms', settings.take('rms_norm_eps', float, 1e-6))
    gate = settings.choose('hidden_act', {'silu': llama.GATES['silu']}, 'silu')
    heads = settings.take('num_attention_heads', int, 32)
    size = settings.optional('head_dim', int)
    attention = AttentionConfig(
        heads,
        settings.take('num_key_value_heads', int, heads),
        settings.whole_heads(width, heads) if size is None else size,
    )
    recurrent = MambaConfig(
        settings.take('mamba_expand', int, 2) * width,
        mamba.read_rank(settings, 'mamba_dt_rank', width),
        settings.take('mamba_d_state', int, 16),
        settings.take('mamba_d_conv', int, 4),
        settings.take('mamba_conv_bias', bool, True),
        settings.take('mamba_proj_bias', bool, False),
        norm,
    )
    dense = FeedForwardConfig(settings.take('intermediate_size', int, 14336), gate)
    num_experts, per_token = settings.take('num_experts', int, 16), settings.take('num_experts_per_tok', int, 2)
    router = read_router(settings, normalize=False)
    experts = MoeConfig(num_experts, per_token, dense, router=router) if num_experts > 1 else dense
    attends = _every(settings, 'attn', 8, 4, num_layers)
    has_experts = _every(settings, 'expert', 2, 1, num_layers)
    layers = [
        LayerConfig(attention if attends[i] else recurrent, experts if has_experts[i] else dense, norm)
        for i in range(num_layers)
    ]
    return DecoderConfig(
        settings.take('vocab_size', int, 65536),
        width,
        num_layers,
        repeating(layers),
        norm,
        position='none',
        tied_embeddings=settings.take('tie_word_embeddings', bool, False),
    )


def period(kind: str, wanted: Sequence[bool]) -> dict[str, int]:
    """The settings that say which layers are of a kind that comes once in a period.

    Raises:
        UserError: they do not.
    """
    length = len(wanted)
    # One more than the layers: none of them is.
    for every in range(1, length + 2):
        for offset in range(every):
            if [i % every == offset for i in range(length)] == list(wanted):
                return {f'{kind}_layer_period': every, f'{kind}_layer_offset': offset}
    raise UserError('attention or experts that do not come at one distance', where='DecoderConfig.pattern')


def _one(kind: str, configs: Sequence[Any]) -> Any:
    if len(set(configs)) != 1:
        raise UserError(f'{len(set(configs))} kinds of {kind}', where='DecoderConfig.pattern')
    return configs[0]


def _write(config: DecoderConfig) -> dict[str, Any]:
    mixers = [layer.mixer for layer in config.layers]
    attention = _one('attention layers', [each for each in mixers if isinstance(each, AttentionConfig)])
    recurrent = _one('Mamba layers', [each for each in mixers if isinstance(each, MambaConfig)])
    networks = [layer.feed_forward for layer in config.layers]
    experts = [each for each in networks if isinstance(each, MoeConfig)]
    moe = _one('layers of experts', experts) if experts else None
    dense = _one('feed-forward layers', [each.expert if isinstance(each, MoeConfig) else each for each in networks])
    norm = all_equal(config, lambda layer: layer.norm)
    whole = attention.num_heads * attention.head_dim == config.d_model
    return {
        'vocab_size': config.vocab_size,
        'hidden_size': config.d_model,
        'num_hidden_layers': config.num_layers,
        'num_attention_heads': attention.num_heads,
        'num_key_value_heads': attention.num_kv_heads,
        **({} if whole else {'head_dim': attention.head_dim}),
        'intermediate_size': dense.d_ff,
        'hidden_act': 'silu',
        'rms_norm_eps': norm.epsilon,
        'mamba_expand': recurrent.d_inner // config.d_model,
        'mamba_dt_rank': recurrent.dt_rank,
        'mamba_d_state': recurrent.state_size,
        'mamba_d_conv': recurrent.convolution_width,
        'mamba_conv_bias': recurrent.convolution_bias,
        'mamba_proj_bias': recurrent.bias,
        **period('attn', [isinstance(each, AttentionConfig) for each in mixers]),
        **period('expert', [isinstance(each, MoeConfig) for each in networks]),
        'num_experts': 1 if moe is None else moe.num_experts,
        'num_experts_per_tok': 1 if moe is None else moe.experts_per_token,
        'router_aux_loss_coef': 0.001 if moe is None else moe.router.balance_loss,
        'tie_word_embeddings': config.tied_embeddings,
    }


JAMBA = Family('jamba', 'JambaForCausalLM', _TABLE, _read, _write)
