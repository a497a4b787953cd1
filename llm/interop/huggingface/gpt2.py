"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, fused projections stored [in, out]."""

from typing import Any

from llm.interop.huggingface.family import Family, all_equal, norm_rows
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import Activation, FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.normalization import NormConfig

_LAYER = 'transformer.h.{layer}'
_QKV = ('mixer/query', 'mixer/key', 'mixer/value')
_ACTIVATIONS: dict[str, Activation] = {
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu': 'gelu',
    'relu': 'relu',
}


def _read(settings: Settings) -> DecoderConfig:
    settings.expect(
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
        is_encoder_decoder=False,
    )
    settings.pass_over('n_ctx', 'reorder_and_upcast_attn', 'summary_type', 'summary_use_proj', 'summary_activation')
    settings.pass_over('summary_proj_to_labels', 'summary_first_dropout')
    width, heads = settings.take('n_embd', int, 768), settings.take('n_head', int, 12)
    norm = NormConfig('layer', settings.take('layer_norm_epsilon', float, 1e-5), bias=True)
    mixer = AttentionConfig(heads, heads, settings.whole_heads(width, heads), qkv_bias=True, output_bias=True)
    activation = settings.choose('activation_function', _ACTIVATIONS, 'gelu_new')
    feed_forward = FeedForwardConfig(settings.take('n_inner', int, 4 * width), activation, bias=True)
    return DecoderConfig(
        settings.take('vocab_size', int, 50257),
        width,
        settings.take('n_layer', int, 12),
        (LayerConfig(mixer, feed_forward, norm),),
        norm,
        position='learned',
        max_positions=settings.take('n_positions', int, 1024),
        tied_embeddings=settings.take('tie_word_embeddings', bool, True),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    mixer = all_equal(config, lambda layer: layer.mixer)
    feed_forward = all_equal(config, lambda layer: layer.feed_forward)
    norm = all_equal(config, lambda layer: layer.norm)
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        'vocab_size': config.vocab_size,
        'n_embd': config.d_model,
        'n_layer': config.num_layers,
        'n_head': mixer.num_heads,
        'n_inner': feed_forward.d_ff,
        'n_positions': config.max_positions,
        'activation_function': activations.get(feed_forward.activation),
        'layer_norm_epsilon': norm.epsilon,
        'tie_word_embeddings': config.tied_embeddings,
    }


GPT2 = Family(
    model_type='gpt2',
    architecture='GPT2LMHeadModel',
    table=(
        Row('embedding/table', 'transformer.wte.weight'),
        Row('positions/table', 'transformer.wpe.weight'),
        Row(_QKV, f'{_LAYER}.attn.c_attn.weight', 'D (* H K) -> D H K'),
        Row(tuple(f'{name}_bias' for name in _QKV), f'{_LAYER}.attn.c_attn.bias', '(* H K) -> H K'),
        Row('mixer/output', f'{_LAYER}.attn.c_proj.weight', '(H K) D -> H K D'),
        Row('mixer/output_bias', f'{_LAYER}.attn.c_proj.bias'),
        Row('feed_forward/up', f'{_LAYER}.mlp.c_fc.weight'),
        Row('feed_forward/up_bias', f'{_LAYER}.mlp.c_fc.bias'),
        Row('feed_forward/down', f'{_LAYER}.mlp.c_proj.weight'),
        Row('feed_forward/down_bias', f'{_LAYER}.mlp.c_proj.bias'),
        *norm_rows({'mixer_norm': f'{_LAYER}.ln_1', 'feed_forward_norm': f'{_LAYER}.ln_2'}),
        *norm_rows({'final_norm': 'transformer.ln_f'}),
        Row('head/kernel', 'lm_head.weight', 'V D -> D V'),
    ),
    read=_read,
    write=_write,
    prefix='transformer.',
    # Causal masks.
    ignored=(r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias',),
)
