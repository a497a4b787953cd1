"""The architectures of GGUF files, and the keys of each. Sources: llama.cpp's `conversion/` and `src/models/`.

To add one: its tensors in `tables`, an entry here, a model in tests/interop/gguf/small_models.py, and the logits that
llama.cpp computes of it (tools/gguf_reference.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

from llm.errors import UserError
from llm.interop.gguf import tables
from llm.interop.gguf.architecture import ROTATED, Architecture, Settings
from llm.interop.huggingface.jamba import period
from llm.interop.loading import Tensor

_BLOCKS = {
    'block_count': 'num_hidden_layers',
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
}
_EPSILON = 'attention.layer_norm_rms_epsilon'
_BY_HEAD = {
    **_BLOCKS,
    'attention.head_count_kv': 'num_key_value_heads',
    _EPSILON: 'rms_norm_eps',
    'rope.freq_base': 'rope_theta',
}
_LLAMA = {**_BY_HEAD, 'attention.key_length': 'head_dim'}
_LAYER_NORM = {key: name for key, name in _BY_HEAD.items() if key != _EPSILON}
_LAYER_NORM_EPSILON = 'attention.layer_norm_epsilon'
_EXPERTS_USED = {'expert_used_count': 'num_experts_per_tok'}
_WINDOW, _PATTERN = 'attention.sliding_window', 'attention.sliding_window_pattern'
_GEMMA = {
    **_LLAMA,
    _WINDOW: 'sliding_window',
    'final_logit_softcapping': 'final_logit_softcapping',
}
_SSM = {
    'block_count': 'num_hidden_layers',
    'embedding_length': 'hidden_size',
    _EPSILON: 'layer_norm_epsilon',
    'ssm.conv_kernel': 'conv_kernel',
    'ssm.state_size': 'state_size',
}
_NO_HEADS = {'feed_forward_length': 0, 'attention.head_count': 0}


def _gemma_scale(layers: int) -> Callable[..., Settings]:
    """llama.cpp tells the 27B, alone in scaling by width / heads, by its layers."""

    def derived(keys: dict[str, Any], settings: Settings, tensors: Mapping[str, Tensor]) -> Settings:
        wide = settings['num_hidden_layers'] == layers
        size = settings['hidden_size'] / settings['num_attention_heads'] if wide else settings.get('head_dim', 256)
        return {'query_pre_attn_scalar': size}

    return derived


def _gemma3(keys: dict[str, Any], settings: Settings, tensors: Mapping[str, Tensor]) -> Settings:
    count, pattern = settings['num_hidden_layers'], keys.get(_PATTERN, 6)
    if type(pattern) is int:
        pattern = [(i + 1) % pattern != 0 for i in range(count)]
    if not settings.get('sliding_window'):
        pattern = [False] * count
    types = ['sliding_attention' if each else 'full_attention' for each in pattern]
    return {'layer_types': types, **_gemma_scale(62)(keys, settings, tensors)}


def _gemma3_pattern(settings: Settings) -> dict[str, Any]:
    local = [each == 'sliding_attention' for each in settings['layer_types']]
    return {_PATTERN: local} if any(local) else {}


def _mamba2_sizes(settings: Settings) -> dict[str, Any]:
    return {
        'ssm.inner_size': settings['num_heads'] * settings['head_dim'],
        'ssm.time_step_rank': settings['num_heads'],
    }


def _jamba_layers(keys: dict[str, Any], settings: Settings, tensors: Mapping[str, Tensor]) -> Settings:
    key_heads, count = keys['attention.head_count_kv'], settings['num_hidden_layers']
    heads = {each for each in key_heads if each}
    if len(key_heads) != count or len(heads) != 1:
        raise KeyError('attention.head_count_kv')
    has_experts = [f'blk.{i}.ffn_gate_inp.weight' in tensors for i in range(count)]
    return {
        'num_key_value_heads': heads.pop(),
        **period('attn', [bool(each) for each in key_heads]),
        **period('expert', has_experts),
    }


def _jamba_heads(settings: Settings) -> dict[str, Any]:
    every, first = settings['attn_layer_period'], settings['attn_layer_offset']
    heads = settings['num_key_value_heads']
    return {
        'attention.head_count_kv': [heads if i % every == first else 0 for i in range(settings['num_hidden_layers'])],
        'ssm.inner_size': settings['mamba_expand'] * settings['hidden_size'],
    }


def _deepseek2_heads(keys: dict[str, Any], settings: Settings, tensors: Mapping[str, Tensor]) -> Settings:
    rotated = keys[ROTATED]
    return {
        'qk_rope_head_dim': rotated,
        'qk_nope_head_dim': keys['attention.key_length_mla'] - rotated,
        'q_lora_rank': keys.get('attention.q_lora_rank') or None,
    }


def _deepseek2_sizes(settings: Settings) -> dict[str, Any]:
    latent, rotated = settings['kv_lora_rank'], settings['qk_rope_head_dim']
    return {
        'attention.q_lora_rank': settings['q_lora_rank'] or 0,
        'attention.key_length': latent + rotated,
        'attention.value_length': latent,
        'attention.key_length_mla': settings['qk_nope_head_dim'] + rotated,
    }


# When a model is written, the first that can describe it is taken.
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture('llama', 'llama', tables.llama_like(tables.PRE_NORMS, interleaved=True), _LLAMA, factors=True),
    Architecture('qwen2', 'qwen2', tables.llama_like(tables.PRE_NORMS), _LLAMA),
    Architecture('qwen3', 'qwen3', tables.llama_like(tables.PRE_NORMS | tables.QK_NORMS), _LLAMA),
    Architecture(
        'gemma2',
        'gemma2',
        tables.llama_like(tables.PRE_NORMS | tables.OUTPUT_NORMS, offset=1.0),
        {**_GEMMA, 'attn_logit_softcapping': 'attn_logit_softcapping'},
        {'hidden_activation': 'gelu_pytorch_tanh'},
        derived=_gemma_scale(46),
    ),
    Architecture(
        'gemma3',
        'gemma3_text',
        tables.llama_like(tables.PRE_NORMS | tables.OUTPUT_NORMS | tables.QK_NORMS, offset=1.0),
        {**_GEMMA, 'rope.freq_base_swa': 'rope_local_base_freq'},
        {'hidden_activation': 'gelu_pytorch_tanh'},
        derived=_gemma3,
        written=_gemma3_pattern,
        own_keys=(_PATTERN,),
    ),
    Architecture(
        'phi3',
        'phi3',
        tables.PHI3,
        _BY_HEAD,
        factors=True,
        fraction='partial_rotary_factor',
        # llama.cpp passes over the window; 0 tells Phi-4 from others.
        written=lambda settings: {_WINDOW: 0},
        derived=lambda keys, settings, tensors: {'sliding_window': keys.get(_WINDOW) or None},
        own_keys=(_WINDOW,),
    ),
    Architecture(
        'starcoder2',
        'starcoder2',
        tables.llama_like(tables.PRE_NORMS),
        {**_LAYER_NORM, _LAYER_NORM_EPSILON: 'norm_epsilon'},
    ),
    Architecture(
        'stablelm',
        'stablelm',
        tables.STABLELM,
        {
            **_LAYER_NORM,
            _LAYER_NORM_EPSILON: 'layer_norm_eps',
            'use_parallel_residual': 'use_parallel_residual',
        },
        tied=False,
        fraction='partial_rotary_factor',
        derived=lambda keys, settings, tensors: {
            'use_qkv_bias': 'blk.0.attn_q.bias' in tensors,
            'qk_layernorm': 'blk.0.attn_q_norm.weight' in tensors,
        },
    ),
    Architecture(
        'gptneox',
        'gpt_neox',
        tables.FUSED,
        {
            **_BLOCKS,
            _LAYER_NORM_EPSILON: 'layer_norm_eps',
            'use_parallel_residual': 'use_parallel_residual',
            'rope.freq_base': 'rotary_emb_base',
        },
        tied=False,
        fraction='rotary_pct',
    ),
    Architecture(
        'gpt2',
        'gpt2',
        tables.GPT2,
        {
            'block_count': 'n_layer',
            'embedding_length': 'n_embd',
            'feed_forward_length': 'n_inner',
            'attention.head_count': 'n_head',
            _LAYER_NORM_EPSILON: 'layer_norm_epsilon',
            'context_length': 'n_positions',
        },
        {'activation_function': 'gelu_new'},
    ),
    Architecture('olmo2', 'olmo2', tables.OLMO2, _BY_HEAD, tied=False),
    Architecture(
        'llama',
        'mixtral',
        tables.llama_like(tables.PRE_NORMS, interleaved=True),
        {**_LLAMA, **_EXPERTS_USED, 'expert_count': 'num_local_experts'},
        {'sliding_window': None},
        factors=True,
    ),
    Architecture(
        'qwen3moe',
        'qwen3_moe',
        tables.llama_like(tables.PRE_NORMS | tables.QK_NORMS),
        {
            **_LLAMA,
            **_EXPERTS_USED,
            'expert_count': 'num_experts',
            'expert_feed_forward_length': 'moe_intermediate_size',
        },
        {'norm_topk_prob': True},
    ),
    Architecture(
        'olmoe',
        'olmoe',
        tables.OLMOE,
        {**_BY_HEAD, **_EXPERTS_USED, 'expert_count': 'num_experts'},
        tied=False,
    ),
    Architecture(
        'mamba',
        'mamba',
        tables.MAMBA,
        {**_SSM, 'ssm.inner_size': 'intermediate_size', 'ssm.time_step_rank': 'time_step_rank'},
        fixed={**_NO_HEADS, 'ssm.dt_b_c_rms': False},
        # llama.cpp runs no other width.
        derived=lambda keys, settings, tensors: {'intermediate_size': 2 * settings['hidden_size']},
    ),
    Architecture(
        'mamba2',
        'mamba2',
        tables.MAMBA2,
        {**_SSM, 'ssm.group_count': 'n_groups'},
        fixed=_NO_HEADS,
        written=_mamba2_sizes,
        derived=lambda keys, settings, tensors: {
            'num_heads': keys['ssm.time_step_rank'],
            'head_dim': keys['ssm.inner_size'] // keys['ssm.time_step_rank'],
            'expand': keys['ssm.inner_size'] // settings['hidden_size'],
        },
        own_keys=('ssm.inner_size', 'ssm.time_step_rank'),
    ),
    Architecture(
        'jamba',
        'jamba',
        tables.JAMBA,
        {
            **_BLOCKS,
            **_EXPERTS_USED,
            _EPSILON: 'rms_norm_eps',
            'expert_count': 'num_experts',
            'ssm.conv_kernel': 'mamba_d_conv',
            'ssm.state_size': 'mamba_d_state',
            'ssm.time_step_rank': 'mamba_dt_rank',
        },
        written=_jamba_heads,
        derived=_jamba_layers,
        own_keys=('attention.head_count_kv', 'ssm.inner_size'),
    ),
    Architecture(
        'deepseek2',
        'deepseek_v2',
        tables.DEEPSEEK2,
        {
            **_BLOCKS,
            **_EXPERTS_USED,
            'expert_count': 'n_routed_experts',
            'expert_shared_count': 'n_shared_experts',
            'expert_feed_forward_length': 'moe_intermediate_size',
            'expert_weights_scale': 'routed_scaling_factor',
            'leading_dense_block_count': 'first_k_dense_replace',
            'attention.kv_lora_rank': 'kv_lora_rank',
            'attention.value_length_mla': 'v_head_dim',
            'rope.freq_base': 'rope_theta',
        },
        # The norms of latents have an epsilon of their own in the family, and the model's here.
        {'rms_norm_eps': 1e-6},
        {_EPSILON: 1e-6, 'attention.head_count_kv': 1, 'expert_weights_norm': False, 'expert_gating_func': 1},
        written=_deepseek2_sizes,
        derived=_deepseek2_heads,
        own_keys=('attention.q_lora_rank', 'attention.key_length', 'attention.key_length_mla'),
    ),
)
NAMES = tuple(dict.fromkeys(each.name for each in ARCHITECTURES))


def find(metadata: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a file.

    Raises:
        UserError: it is unknown.
    """
    name = metadata.get('general.architecture')
    candidates = [each for each in ARCHITECTURES if each.name == name]
    if not candidates:
        raise UserError(f'general.architecture is {name!r:.40}', where=where, fix=f'Known are {", ".join(NAMES)}.')
    return next((each for each in candidates if each.holds(metadata)), candidates[0])
