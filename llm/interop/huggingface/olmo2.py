"""OLMo 2 (OLMo et al. 2024): norms on the outputs of the branches, queries and keys normalised over all heads."""

from typing import Any

from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family, norm_rows
from llm.interop.huggingface.rope import read_rope
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig
from llm.models.normalization import NormConfig

QK_NORM_ALL_HEADS = (
    Row('mixer/query_norm/scale', f'{llama.LAYER}.self_attn.q_norm.weight', '(H K) -> H K'),
    Row('mixer/key_norm/scale', f'{llama.LAYER}.self_attn.k_norm.weight', '(G K) -> G K'),
)
_TABLE = (
    *llama.OUTSIDE,
    *llama.ATTENTION,
    *llama.FEED_FORWARD,
    *QK_NORM_ALL_HEADS,
    *norm_rows(
        {
            'mixer_output_norm': f'{llama.LAYER}.post_attention_layernorm',
            'feed_forward_output_norm': f'{llama.LAYER}.post_feedforward_layernorm',
        }
    ),
)


def _read(settings: Settings) -> DecoderConfig:
    norm = NormConfig('rms', settings.take('rms_norm_eps', float, 1e-5))
    bias = settings.take('attention_bias', bool, False)
    mixer = {'qk_norm': norm, 'qk_norm_scope': 'all_heads', 'qkv_bias': bias, 'output_bias': bias}
    return llama.read(settings, read_rope(settings) | mixer, norm=norm, layer={'norm_position': 'output'})


def _write(config: DecoderConfig) -> dict[str, Any]:
    return llama.write(config) | {'attention_bias': config.pattern[0].attention.qkv_bias}


OLMO2 = Family('olmo2', 'Olmo2ForCausalLM', _TABLE, _read, _write)
