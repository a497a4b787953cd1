"""Families with experts in place of feed-forward layers: Mixtral (Jiang et al. 2024), OLMoE and Qwen 3 MoE."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm.errors import UserError
from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family, repeating
from llm.interop.huggingface.olmo2 import QK_NORM_ALL_HEADS
from llm.interop.huggingface.rope import read_rope
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import TokenwiseConfig
from llm.models.moe import MoeConfig
from llm.models.normalization import NormConfig
from llm.models.routing import RouterConfig


def expert_rows(block: str, names: Mapping[str, str], router: str = 'gate') -> tuple[Row, ...]:
    """A router and the matrices of each expert: our name -> theirs, within `block` of a layer."""
    theirs = f'{llama.LAYER}.{block}'
    return (
        Row('feed_forward/router/kernel', f'{theirs}.{router}.weight', 'E D -> D E'),
        *(
            Row(f'feed_forward/experts/{ours}', f'{theirs}.experts.{{E}}.{name}.weight', 'F D -> E D F')
            for ours, name in names.items()
        ),
    )


EXPERTS = expert_rows('mlp', {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'})
_AROUND = (*llama.OUTSIDE, *llama.ATTENTION, *llama.PRE_NORMS)
_MIXTRAL = (*_AROUND, *expert_rows('block_sparse_moe', {'gate': 'w1', 'up': 'w3', 'down': 'w2'}))
_OLMOE = (*_AROUND, *QK_NORM_ALL_HEADS, *EXPERTS)
_QWEN3_MOE = (*llama.TABLE, *EXPERTS)


def read_router(settings: Settings, *, normalize: bool, **fields: Any) -> RouterConfig:
    """A router by softmax; `fields` of RouterConfig."""
    settings.pass_over('output_router_logits', 'router_jitter_noise')
    loss = settings.take('router_aux_loss_coef', float, 0.001)
    return RouterConfig(normalize=normalize, balance_loss=loss, z_loss=0.0, **fields)


def with_networks(config: DecoderConfig, networks: list[TokenwiseConfig]) -> DecoderConfig:
    """The model with these in its layers, in order."""
    pairs = zip(config.layers, networks, strict=True)
    layers = [dataclasses.replace(layer, feed_forward=network) for layer, network in pairs]
    return dataclasses.replace(config, pattern=repeating(layers), leading=())


def written(config: DecoderConfig) -> tuple[MoeConfig, DecoderConfig]:
    """The layers of experts, and the model with an expert alone in place of each, for `llama.write`.

    Raises:
        UserError: there is none, or they differ.
    """
    networks = [layer.feed_forward for layer in config.layers]
    found = {each for each in networks if isinstance(each, MoeConfig)}
    if len(found) != 1:
        raise UserError(f'{len(found)} kinds of layers of experts', where='DecoderConfig.pattern')
    moe = found.pop()
    return moe, with_networks(config, [moe.expert] * len(networks))


def _expert(settings: Settings, size: str) -> FeedForwardConfig:
    return FeedForwardConfig(settings.take(size, int), settings.choose('hidden_act', llama.GATES, 'silu'))


def _count(settings: Settings, default: int) -> int:
    """Of experts: transformers 5 writes one name for all families."""
    found = [settings.optional(name, int) for name in ('num_local_experts', 'num_experts')]
    return next((each for each in found if each is not None), default)


def _read_mixtral(settings: Settings) -> DecoderConfig:
    mixer = read_rope(settings, base=1e6) | {'window': settings.optional('sliding_window', int)}
    moe = MoeConfig(
        _count(settings, 8),
        settings.take('num_experts_per_tok', int, 2),
        _expert(settings, 'intermediate_size'),
        router=read_router(settings, normalize=True),
    )
    norm = NormConfig('rms', settings.take('rms_norm_eps', float, 1e-5))
    config = llama.read(settings, mixer, feed_forward=moe.expert, norm=norm)
    return with_networks(config, [moe] * config.num_layers)


def _write_mixtral(config: DecoderConfig) -> dict[str, Any]:
    moe, dense = written(config)
    return llama.write(dense) | {
        'num_local_experts': moe.num_experts,
        'num_experts_per_tok': moe.experts_per_token,
        'router_aux_loss_coef': moe.router.balance_loss,
        'sliding_window': config.pattern[0].attention.window,
    }


def _read_olmoe(settings: Settings) -> DecoderConfig:
    settings.expect(clip_qkv=None)
    norm = NormConfig('rms', settings.take('rms_norm_eps', float, 1e-5))
    bias = settings.take('attention_bias', bool, False)
    mixer = {'qk_norm': norm, 'qk_norm_scope': 'all_heads', 'qkv_bias': bias, 'output_bias': bias}
    moe = MoeConfig(
        _count(settings, 64),
        settings.take('num_experts_per_tok', int, 8),
        _expert(settings, 'intermediate_size'),
        router=read_router(settings, normalize=settings.take('norm_topk_prob', bool, False)),
    )
    config = llama.read(settings, read_rope(settings) | mixer, feed_forward=moe.expert, norm=norm)
    return with_networks(config, [moe] * config.num_layers)


def _write_olmoe(config: DecoderConfig) -> dict[str, Any]:
    moe, dense = written(config)
    settings = llama.write(dense)
    if settings.pop('head_dim') * config.pattern[0].attention.num_heads != config.d_model:
        raise UserError('heads that are not d_model / num_heads wide', where='AttentionConfig.head_dim')
    return settings | {
        'num_experts': moe.num_experts,
        'num_experts_per_tok': moe.experts_per_token,
        'norm_topk_prob': moe.router.normalize,
        'router_aux_loss_coef': moe.router.balance_loss,
        'attention_bias': config.pattern[0].attention.qkv_bias,
    }


def _read_qwen3_moe(settings: Settings) -> DecoderConfig:
    norm = NormConfig('rms', settings.take('rms_norm_eps', float, 1e-6))
    bias = settings.take('attention_bias', bool, False)
    mixer: dict[str, Any] = {'qk_norm': norm, 'qkv_bias': bias, 'output_bias': bias}
    window = settings.optional('sliding_window', int)
    mixer['window'] = window if settings.take('use_sliding_window', bool, False) else None
    settings.pass_over('max_window_layers')  # transformers gives every layer the window
    moe = MoeConfig(
        _count(settings, 128),
        settings.take('num_experts_per_tok', int, 8),
        _expert(settings, 'moe_intermediate_size'),
        router=read_router(settings, normalize=settings.take('norm_topk_prob', bool, False)),
    )
    dense = _expert(settings, 'intermediate_size')
    every, without = settings.take('decoder_sparse_step', int, 1), settings.raw('mlp_only_layers') or []
    config = llama.read(settings, read_rope(settings) | mixer, feed_forward=dense, norm=norm)
    has_experts = [i not in without and (i + 1) % every == 0 for i in range(config.num_layers)]
    return with_networks(config, [moe if each else dense for each in has_experts])


def _write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    moe, dense = written(config)
    networks = [layer.feed_forward for layer in config.layers]
    sizes = [each.d_ff for each in networks if isinstance(each, FeedForwardConfig)]
    mixer = config.pattern[0].attention
    return llama.write(dense) | {
        'num_experts': moe.num_experts,
        'num_experts_per_tok': moe.experts_per_token,
        'norm_topk_prob': moe.router.normalize,
        'router_aux_loss_coef': moe.router.balance_loss,
        'moe_intermediate_size': moe.expert.d_ff,
        'intermediate_size': sizes[0] if sizes else moe.expert.d_ff,
        'mlp_only_layers': [i for i, each in enumerate(networks) if not isinstance(each, MoeConfig)],
        'decoder_sparse_step': 1,
        'attention_bias': mixer.qkv_bias,
        'sliding_window': mixer.window,
        'use_sliding_window': mixer.window is not None,
    }


MIXTRAL = Family('mixtral', 'MixtralForCausalLM', _MIXTRAL, _read_mixtral, _write_mixtral)
OLMOE = Family('olmoe', 'OlmoeForCausalLM', _OLMOE, _read_olmoe, _write_olmoe)
QWEN3_MOE = Family('qwen3_moe', 'Qwen3MoeForCausalLM', _QWEN3_MOE, _read_qwen3_moe, _write_qwen3_moe)
