"""GPT-NeoX (Black et al. 2022) and Pythia: parallel branches, query, key and value of one head side by side."""

from typing import Any

from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family, all_equal, norm_rows
from llm.interop.huggingface.rope import read_rope
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import Activation, FeedForwardConfig
from llm.models.normalization import NormConfig

_LAYER = 'gpt_neox.layers.{layer}'
_QKV = ('mixer/query', 'mixer/key', 'mixer/value')
_ACTIVATIONS: dict[str, Activation] = {
    'gelu': 'gelu',
    'gelu_fast': 'gelu_tanh',
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'relu': 'relu',
}


def _read(settings: Settings) -> DecoderConfig:
    norm = NormConfig('layer', settings.take('layer_norm_eps', float, 1e-5), bias=True)
    bias = settings.take('attention_bias', bool, True)
    rope = read_rope(settings, fraction=0.25, base_name='rotary_emb_base', fraction_name='rotary_pct')
    feed_forward = FeedForwardConfig(
        settings.take('intermediate_size', int), settings.choose('hidden_act', _ACTIVATIONS, 'gelu'), bias=True
    )
    parallel = settings.take('use_parallel_residual', bool, True)
    return llama.read(
        settings,
        rope | {'qkv_bias': bias, 'output_bias': bias},
        feed_forward=feed_forward,
        norm=norm,
        layer={'parallel': parallel, 'shared_norm': not parallel},
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    settings = llama.write(config)
    layer = config.pattern[0]
    feed_forward = all_equal(config, lambda layer: layer.feed_forward)
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    for name in ('num_key_value_heads', 'head_dim', 'rms_norm_eps', 'rope_theta'):
        settings.pop(name)
    return {
        **settings,
        'hidden_act': activations.get(feed_forward.activation),
        'layer_norm_eps': layer.norm.epsilon if layer.norm else None,
        'attention_bias': layer.attention.qkv_bias,
        'rotary_emb_base': layer.attention.rotary_base,
        'rotary_pct': layer.attention.rotary_fraction,
        'use_parallel_residual': layer.parallel,
    }


GPT_NEOX = Family(
    model_type='gpt_neox',
    architecture='GPTNeoXForCausalLM',
    table=(
        Row('embedding/table', 'gpt_neox.embed_in.weight'),
        Row(_QKV, f'{_LAYER}.attention.query_key_value.weight', '(H * K) D -> D H K'),
        Row(tuple(f'{name}_bias' for name in _QKV), f'{_LAYER}.attention.query_key_value.bias', '(H * K) -> H K'),
        *llama.projection_rows('output', f'{_LAYER}.attention.dense', 'D (H K) -> H K D', ''),
        *llama.linear_rows(
            {
                'feed_forward/up': f'{_LAYER}.mlp.dense_h_to_4h',
                'feed_forward/down': f'{_LAYER}.mlp.dense_4h_to_h',
            }
        ),
        *norm_rows(
            {
                'mixer_norm': f'{_LAYER}.input_layernorm',
                'feed_forward_norm': f'{_LAYER}.post_attention_layernorm',
                'final_norm': 'gpt_neox.final_layer_norm',
            }
        ),
        Row('head/kernel', 'embed_out.weight', 'V D -> D V'),
    ),
    read=_read,
    write=_write,
    prefix='gpt_neox.',
    # Causal masks and inverse frequencies.
    ignored=(r'(gpt_neox\.)?layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)',),
)
