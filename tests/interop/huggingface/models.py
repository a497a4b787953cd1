"""Tiny random models of every family, made by transformers: odd sizes and values, so that what is mixed up shows."""

import contextlib
import dataclasses
import functools
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

V, D, H, G, F, L, S = 64, 32, 4, 2, 48, 3, 20
SIZES = {'vocab_size': V, 'hidden_size': D, 'num_hidden_layers': L, 'num_attention_heads': H, 'intermediate_size': F}
GROUPED = SIZES | {'num_key_value_heads': G}
LATENT = {
    'kv_lora_rank': 12,
    'qk_nope_head_dim': 8,
    'qk_rope_head_dim': 4,
    'v_head_dim': 8,
    'n_routed_experts': 8,
    'num_experts_per_tok': 2,
    'n_shared_experts': 2,
    'moe_intermediate_size': 20,
    'first_k_dense_replace': 1,
    'max_position_embeddings': 128,
}
MAMBA = {'vocab_size': V, 'hidden_size': D, 'num_hidden_layers': L, 'state_size': 6, 'layer_norm_epsilon': 1e-4}
JAMBA = GROUPED | {'mamba_d_state': 6, 'mamba_dt_rank': 3, 'attn_layer_offset': 1, 'expert_layer_offset': 0}
# No token that ends or fills anything: all ids are as good as another.
TOKENS = {'bos_token_id': None, 'eos_token_id': None, 'pad_token_id': None}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of transformers.

    Attributes:
        family: of the classes, 'Llama' for LlamaConfig and LlamaForCausalLM. settings: of the config.
        architecture: class of the model where it is not family + 'ForCausalLM'.
        decodes: whether decoding is compared: once a family, where angles do not change as the row grows.
    """

    family: str
    settings: dict[str, Any]
    architecture: str = ''
    decodes: bool = True


def rope(kind: str = 'default', base: float = 500.0, **more: Any) -> dict[str, Any]:
    """The setting of rotation as transformers 5 has it."""
    return {'rope_parameters': {'rope_type': kind, 'rope_theta': base, **more}}


def _slow(factor: float, original: int = 8) -> dict[str, Any]:
    return {'factor': factor, 'original_max_position_embeddings': original}


_LONGROPE = {'short_factor': [1.0, 1.1, 1.3, 1.4], 'long_factor': [1.0, 1.5, 2.0, 4.0]}

CASES: dict[str, Case] = {
    'gpt2': Case(
        'GPT2',
        {'vocab_size': V, 'n_positions': 40, 'n_embd': D, 'n_layer': L, 'n_head': H, 'n_inner': F},
        'LMHeadModel',
    ),
    'gpt_neox': Case('GPTNeoX', SIZES | rope(partial_rotary_factor=0.25)),
    'gpt_neox serial': Case(
        'GPTNeoX',
        SIZES | rope(partial_rotary_factor=0.5) | {'use_parallel_residual': False, 'attention_bias': False},
        decodes=False,
    ),
    'llama': Case('Llama', GROUPED | {'head_dim': 6, 'rms_norm_eps': 1e-4} | rope()),
    'llama tied, biases, gelu': Case(
        'Llama',
        GROUPED
        | {'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True, 'hidden_act': 'gelu'}
        | rope('linear', factor=3.0),
        decodes=False,
    ),
    'llama dynamic': Case(
        'Llama', GROUPED | {'max_position_embeddings': 12} | rope('dynamic', factor=2.0), decodes=False
    ),
    'llama llama3': Case(
        'Llama', GROUPED | rope('llama3', low_freq_factor=1.0, high_freq_factor=4.0, **_slow(4.0, 32)), decodes=False
    ),
    'llama yarn': Case('Llama', GROUPED | rope('yarn', beta_fast=4.0, **_slow(4.0, 32)), decodes=False),
    'mistral': Case('Mistral', GROUPED | {'head_dim': 8, 'sliding_window': 5} | rope()),
    'mistral without window': Case('Mistral', GROUPED | {'sliding_window': None} | rope(), decodes=False),
    'qwen2': Case('Qwen2', GROUPED | rope()),
    'qwen2 tied, window': Case(
        'Qwen2',
        GROUPED
        | {'tie_word_embeddings': True, 'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1}
        | rope(),
        decodes=False,
    ),
    'qwen3': Case('Qwen3', GROUPED | {'head_dim': 6} | rope()),
    'smollm3': Case('SmolLM3', GROUPED | {'no_rope_layers': [1, 0, 1]} | rope()),
    'gemma2': Case(
        'Gemma2',
        GROUPED
        | {'head_dim': 6, 'sliding_window': 5, 'query_pre_attn_scalar': 12}
        | {'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 3.0}
        | rope(),
    ),
    'gemma3': Case(
        'Gemma3',
        GROUPED
        | {'num_hidden_layers': 4, 'head_dim': 8, 'sliding_window': 5, 'query_pre_attn_scalar': 12}
        | {'layer_types': ['sliding_attention', 'sliding_attention', 'full_attention', 'sliding_attention']}
        | {
            'rope_parameters': {
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 100.0},
                'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 10_000.0},
            }
        },
    ),
    'olmo2': Case('Olmo2', GROUPED | rope()),
    'phi3': Case('Phi3', GROUPED | {'sliding_window': 7} | rope()),
    'phi3 longrope, short': Case(
        'Phi3',
        GROUPED
        | {'max_position_embeddings': 256, 'original_max_position_embeddings': 64}
        | rope('longrope', 100.0, **_LONGROPE),
        decodes=False,
    ),
    'phi3 longrope, long': Case(
        'Phi3',
        GROUPED
        | {'max_position_embeddings': 64, 'original_max_position_embeddings': 16}
        | rope('longrope', 100.0, **_LONGROPE),
    ),
    'stablelm': Case('StableLm', GROUPED | {'use_qkv_bias': True} | rope(partial_rotary_factor=0.25)),
    'stablelm 2': Case(
        'StableLm',
        GROUPED | {'qk_layernorm': True, 'use_parallel_residual': True} | rope(partial_rotary_factor=0.5),
    ),
    'mixtral': Case('Mixtral', GROUPED | {'num_local_experts': 5, 'num_experts_per_tok': 2} | rope()),
    'olmoe': Case('Olmoe', GROUPED | {'num_experts': 6, 'num_experts_per_tok': 3} | rope()),
    'qwen3_moe': Case(
        'Qwen3Moe',
        GROUPED
        | {'head_dim': 6, 'num_experts': 6, 'num_experts_per_tok': 3, 'moe_intermediate_size': 20}
        | {'norm_topk_prob': True, 'mlp_only_layers': [1]}
        | rope(),
    ),
    'deepseek_v2': Case('DeepseekV2', SIZES | LATENT | {'q_lora_rank': None} | rope()),
    'deepseek_v2 groups, query latent, yarn': Case(
        'DeepseekV2',
        SIZES
        | LATENT
        | {'q_lora_rank': 10, 'first_k_dense_replace': 0, 'routed_scaling_factor': 2.0}
        | {'topk_method': 'group_limited_greedy', 'n_group': 4, 'topk_group': 2}
        | rope('yarn', beta_fast=4.0, mscale=0.8, mscale_all_dim=0.7, **_slow(4.0, 32)),
    ),
    'mamba': Case('Mamba', MAMBA | {'time_step_rank': 3}),
    'mamba biases, untied': Case(
        'Mamba',
        MAMBA
        | {'intermediate_size': 40, 'conv_kernel': 3, 'use_bias': True, 'use_conv_bias': False}
        | {'tie_word_embeddings': False},
        decodes=False,
    ),
    'mamba2': Case('Mamba2', MAMBA | {'num_heads': 4, 'head_dim': 16, 'n_groups': 2, 'chunk_size': 8}),
    'mamba2 biases, tied': Case(
        'Mamba2',
        MAMBA
        | {'expand': 1, 'num_heads': 4, 'head_dim': 8, 'n_groups': 1, 'conv_kernel': 3, 'use_bias': True}
        | {'use_conv_bias': False, 'tie_word_embeddings': True},
        decodes=False,
    ),
    'jamba': Case('Jamba', JAMBA | {'num_hidden_layers': 4, 'attn_layer_period': 2, 'num_experts': 5}),
    'jamba biases, tied, dense': Case(
        'Jamba',
        JAMBA
        | {'num_experts': 1, 'num_experts_per_tok': 1, 'head_dim': 6, 'mamba_conv_bias': False}
        | {'mamba_proj_bias': True, 'tie_word_embeddings': True},
        decodes=False,
    ),
    'starcoder2': Case('Starcoder2', GROUPED | {'sliding_window': 6} | rope()),
    'starcoder2 untied': Case(
        'Starcoder2', GROUPED | {'tie_word_embeddings': False, 'use_bias': False} | rope(), decodes=False
    ),
}


@functools.cache
def make(name: str) -> tuple[Any, Path]:
    """The model of a case, as `saved` makes it."""
    return saved(CASES[name])


def saved(case: Case) -> tuple[Any, Path]:
    """A model in float32 with eager attention, and a directory that it was saved to."""
    import torch
    import transformers

    config_class = {'Gemma3': 'Gemma3TextConfig'}.get(case.family, f'{case.family}Config')
    config = getattr(transformers, config_class)(**case.settings | TOKENS)
    config._attn_implementation = 'eager'
    torch.manual_seed(0)
    model = getattr(transformers, case.family + (case.architecture or 'ForCausalLM'))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    directory = Path(tempfile.mkdtemp(prefix='huggingface-'))
    with quiet():
        model.save_pretrained(directory)
    return model, directory


def by_file_names(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays by the names of a model's parameters, by those of its files: transformers 5 stacks experts in memory."""
    mixtral = model.config.model_type == 'mixtral'
    gate, up, down = ('w1', 'w3', 'w2') if mixtral else ('gate_proj', 'up_proj', 'down_proj')
    found = {}
    for name, array in arrays.items():
        block, _, matrix = name.partition('.experts.')
        block = block.replace('.mlp', '.block_sparse_moe') if mixtral else block
        if not matrix or 'shared' in matrix:
            found[name.replace('.mlp', '.block_sparse_moe') if mixtral else name] = array
            continue
        for expert, each in enumerate(array):
            parts = {down: each} if matrix == 'down_proj' else dict(zip((gate, up), np.split(each, 2), strict=True))
            found |= {f'{block}.experts.{expert}.{part}.weight': x for part, x in parts.items()}
    return found


def load(directory: Path) -> Any:
    """A model as transformers loads it from a directory, with every tensor of the model in it and no other."""
    import transformers

    with quiet():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation='eager', output_loading_info=True
        )
    assert not any(report[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), report
    return model.eval()


def token_ids(rows: int = 2, length: int = S) -> np.ndarray:
    """Random ids [rows, length]."""
    return np.random.default_rng(0).integers(0, V, (rows, length)).astype(np.int32)


@contextlib.contextmanager
def quiet():
    """Without transformers' progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
