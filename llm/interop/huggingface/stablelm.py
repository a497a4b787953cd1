"""StableLM (Bellagente et al. 2024): LayerNorm, a quarter of each head rotated; the 12B normalises queries and keys."""

from typing import Any

from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family
from llm.interop.huggingface.rope import read_rope
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig
from llm.models.normalization import NormConfig

_TABLE = (
    *llama.OUTSIDE,
    *llama.ATTENTION,
    *llama.FEED_FORWARD,
    *llama.PRE_NORMS,
    Row('mixer/query_norm/scale', f'{llama.LAYER}.self_attn.q_layernorm.norms.{{H}}.weight', 'K -> H K'),
    Row('mixer/key_norm/scale', f'{llama.LAYER}.self_attn.k_layernorm.norms.{{G}}.weight', 'K -> G K'),
)


def _read(settings: Settings) -> DecoderConfig:
    epsilon = settings.take('layer_norm_eps', float, 1e-5)
    mixer = read_rope(settings, fraction=0.25) | {'qkv_bias': settings.take('use_qkv_bias', bool, False)}
    if settings.take('qk_layernorm', bool, False):
        mixer |= {'qk_norm': NormConfig('layer', epsilon), 'qk_norm_scope': 'each_head'}
    parallel = settings.take('use_parallel_residual', bool, False)
    return llama.read(settings, mixer, norm=NormConfig('layer', epsilon, bias=True), layer={'parallel': parallel})


def _write(config: DecoderConfig) -> dict[str, Any]:
    settings = llama.write(config)
    layer = config.pattern[0]
    settings['layer_norm_eps'] = settings.pop('rms_norm_eps')
    settings.pop('head_dim')
    return settings | {
        'partial_rotary_factor': layer.mixer.rotary_fraction,
        'use_qkv_bias': layer.mixer.qkv_bias,
        'qk_layernorm': layer.mixer.qk_norm is not None,
        'use_parallel_residual': layer.parallel,
    }


STABLELM = Family('stablelm', 'StableLmForCausalLM', _TABLE, _read, _write)
