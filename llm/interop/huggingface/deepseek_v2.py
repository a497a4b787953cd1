"""DeepSeek-V2 (DeepSeek-AI 2024): latent attention, shared experts, first layers without experts."""

import math
from typing import Any

from llm.interop.huggingface import llama
from llm.interop.huggingface.experts import EXPERTS, read_router, written
from llm.interop.huggingface.family import Family, norm_rows
from llm.interop.huggingface.rope import mscale, read_rope, write_rope
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.latent_attention import LatentAttentionConfig
from llm.models.layer import LayerConfig, TokenwiseConfig
from llm.models.moe import MoeConfig
from llm.models.normalization import NormConfig

_ATTENTION = f'{llama.LAYER}.self_attn'
_TABLE = (
    *llama.OUTSIDE,
    *llama.PRE_NORMS,
    *llama.FEED_FORWARD,
    *EXPERTS,
    *llama.linear_rows(
        {
            f'feed_forward/shared/{each}': f'{llama.LAYER}.mlp.shared_experts.{each}_proj'
            for each in ('gate', 'up', 'down')
        }
    ),
    Row('mixer/query', f'{_ATTENTION}.q_proj.weight', '(H K) D -> D H K'),
    Row('mixer/query_down', f'{_ATTENTION}.q_a_proj.weight', 'R D -> D R'),
    Row('mixer/query_up', f'{_ATTENTION}.q_b_proj.weight', '(H K) R -> R H K'),
    *norm_rows(
        {'mixer/query_norm': f'{_ATTENTION}.q_a_layernorm', 'mixer/latent_norm': f'{_ATTENTION}.kv_a_layernorm'}
    ),
    Row(('mixer/latent', 'mixer/rotary_key'), f'{_ATTENTION}.kv_a_proj_with_mqa.weight', '(* R) D -> D R'),
    Row(('mixer/key', 'mixer/value'), f'{_ATTENTION}.kv_b_proj.weight', '(H * K) R -> R H K'),
    Row('mixer/output', f'{_ATTENTION}.o_proj.weight', 'D (H K) -> H K D'),
)


def _read(settings: Settings) -> DecoderConfig:
    settings.expect(
        attention_bias=False, mlp_bias=False, norm_topk_prob=False, scoring_func='softmax', moe_layer_freq=1
    )
    settings.expect(pretraining_tp=1)
    settings.pass_over('head_dim', 'qk_head_dim', 'num_key_value_heads', 'ep_size', 'seq_aux', 'aux_loss_alpha')
    norm = NormConfig('rms', settings.take('rms_norm_eps', float, 1e-6))
    rotary = read_rope(settings)
    plain, rotated = settings.take('qk_nope_head_dim', int, 128), settings.take('qk_rope_head_dim', int, 64)
    mixer = LatentAttentionConfig(
        settings.take('num_attention_heads', int),
        settings.take('kv_lora_rank', int, 512),
        plain,
        rotated,
        settings.take('v_head_dim', int, 128),
        query_latent=settings.optional('q_lora_rank', int),
        norm=NormConfig('rms', 1e-6),  # the class's own, whatever rms_norm_eps is
        rotary_base=rotary['rotary_base'],
        rotary_scaling=rotary['rotary_scaling'],
        rotary_neighbours=True,
        scale=_scale(settings, plain + rotated),
    )
    gate = settings.choose('hidden_act', llama.GATES, 'silu')
    expert = FeedForwardConfig(settings.take('moe_intermediate_size', int), gate)
    methods = {'greedy': False, 'group_limited_greedy': True}
    limited = settings.choose('topk_method', methods, 'greedy')
    groups = settings.optional('n_group', int) or 1
    per_token = settings.optional('topk_group', int) or groups
    moe = MoeConfig(
        settings.take('n_routed_experts', int, 64),
        settings.take('num_experts_per_tok', int),
        expert,
        FeedForwardConfig(settings.take('n_shared_experts', int, 2) * expert.d_ff, gate),
        router=read_router(
            settings,
            normalize=False,
            scaling=settings.take('routed_scaling_factor', float, 1.0),
            expert_groups=groups if limited else 1,
            groups_per_token=per_token if limited else 1,
        ),
    )
    first, num_layers = settings.take('first_k_dense_replace', int, 0), settings.take('num_hidden_layers', int)
    dense = FeedForwardConfig(settings.take('intermediate_size', int), gate)
    layers = [LayerConfig(mixer, dense if i < first else moe, norm) for i in range(num_layers)]
    return DecoderConfig(
        settings.take('vocab_size', int),
        settings.take('hidden_size', int),
        num_layers,
        tuple(layers[first:][:1]) or tuple(layers[:1]),
        norm,
        tied_embeddings=settings.take('tie_word_embeddings', bool, False),
        leading=tuple(layers[:first]) if first < num_layers else (),
    )


def _scale(settings: Settings, size: int) -> float | None:
    """Factor on the scores: YaRN's temperature stands there, and not in the rotation."""
    values = (settings.raw('rope_scaling') or {}) | (settings.raw('rope_parameters') or {})
    over = values.get('mscale_all_dim')
    return mscale(values['factor'], over) ** 2 / math.sqrt(size) if over else None


def _write(config: DecoderConfig) -> dict[str, Any]:
    moe, _ = written(config)
    networks = [layer.feed_forward for layer in config.layers]
    first = next(i for i, each in enumerate(networks) if isinstance(each, MoeConfig))
    first_network: TokenwiseConfig | None = networks[0]
    mixer: Any = config.layer(0).mixer
    scaling = write_rope(mixer)
    if mixer.scale is not None and scaling is not None:
        over = (math.sqrt(mixer.scale * math.sqrt(mixer.head_dim)) - 1) / (mscale(scaling['factor'], 1.0) - 1)
        scaling['mscale_all_dim'] = round(over, 9)
    limited = moe.router.expert_groups > 1
    return {
        'vocab_size': config.vocab_size,
        'hidden_size': config.d_model,
        'num_hidden_layers': config.num_layers,
        'num_attention_heads': mixer.num_heads,
        'num_key_value_heads': mixer.num_heads,
        'kv_lora_rank': mixer.latent,
        'q_lora_rank': mixer.query_latent,
        'qk_nope_head_dim': mixer.plain_dim,
        'qk_rope_head_dim': mixer.rotary_dim,
        'v_head_dim': mixer.value_dim,
        'intermediate_size': first_network.d_ff if isinstance(first_network, FeedForwardConfig) else moe.expert.d_ff,
        'first_k_dense_replace': first,
        'moe_intermediate_size': moe.expert.d_ff,
        'n_routed_experts': moe.num_experts,
        'num_experts_per_tok': moe.experts_per_token,
        'n_shared_experts': 0 if moe.shared is None else moe.shared.d_ff // moe.expert.d_ff,
        'topk_method': 'group_limited_greedy' if limited else 'greedy',
        'n_group': moe.router.expert_groups,
        'topk_group': moe.router.groups_per_token,
        'routed_scaling_factor': moe.router.scaling,
        'norm_topk_prob': False,
        'router_aux_loss_coef': moe.router.balance_loss,
        'hidden_act': next(theirs for theirs, ours in llama.GATES.items() if ours == moe.expert.activation),
        'rms_norm_eps': config.layer(0).norm.epsilon if config.layer(0).norm else None,
        'rope_theta': mixer.rotary_base,
        **({'rope_scaling': scaling} if scaling else {}),
        'max_position_embeddings': round((mixer.rotary_scaling.original_length or 2048) * mixer.rotary_scaling.factor),
        'tie_word_embeddings': config.tied_embeddings,
    }


DEEPSEEK_V2 = Family('deepseek_v2', 'DeepseekV2ForCausalLM', _TABLE, _read, _write)
