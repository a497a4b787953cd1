"""Phi-3 (Abdin et al. 2024), Phi-3.5 mini, Phi-4 and Phi-4 mini: Llama with fused projections, and LongRoPE."""

from typing import Any

from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family, all_equal
from llm.interop.huggingface.rope import read_rope
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig
from llm.models.normalization import NormConfig

_TABLE = (
    *llama.OUTSIDE,
    *llama.PRE_NORMS,
    Row(
        ('mixer/query', 'mixer/key', 'mixer/value'),
        f'{llama.LAYER}.self_attn.qkv_proj.weight',
        '(* H K) D -> D H K',
    ),
    Row('mixer/output', f'{llama.LAYER}.self_attn.o_proj.weight', 'D (H K) -> H K D'),
    Row(('feed_forward/gate', 'feed_forward/up'), f'{llama.LAYER}.mlp.gate_up_proj.weight', '(* F) D -> D F'),
    Row('feed_forward/down', f'{llama.LAYER}.mlp.down_proj.weight', 'F D -> D F'),
)


def _read(settings: Settings) -> DecoderConfig:
    settings.expect(attention_bias=False, mlp_bias=False, lm_head_bias=False)
    settings.pass_over('pretraining_tp', 'interpolate_factor', 'full_attn_mod')
    mixer = read_rope(settings, aliases=('su', 'yarn'))
    mixer['window'] = settings.optional('sliding_window', int)
    return llama.read(settings, mixer, norm=NormConfig('rms', settings.take('rms_norm_eps', float, 1e-5)))


def _write(config: DecoderConfig) -> dict[str, Any]:
    settings = llama.write(config)
    mixer = config.pattern[0].attention
    scaling = settings.get('rope_scaling')
    if scaling is not None:
        # Its own form of LongRoPE: what follows from the two lengths is left out, and one of them stands outside.
        settings['original_max_position_embeddings'] = scaling.pop('original_max_position_embeddings', None)
        if mixer.rotary_scaling.kind == 'longrope':
            scaling.pop('factor')
            scaling['type'] = scaling.pop('rope_type')
    return settings | {
        'partial_rotary_factor': mixer.rotary_fraction,
        'sliding_window': all_equal(config, lambda layer: layer.attention.window),
    }


PHI3 = Family('phi3', 'Phi3ForCausalLM', _TABLE, _read, _write)
