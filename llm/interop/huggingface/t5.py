"""T5 (Raffel et al. 2020), version 1.1 and Flan-T5: encoder and decoder with a relative bias for all layers of each.

The first version ties its embeddings and scales what the decoder gives by D ** -0.5 before them; the later ones do
neither. transformers 4 says which by `tie_word_embeddings`, transformers 5 by `scale_decoder_outputs`.
"""

import dataclasses
from typing import Any

from llm.interop.huggingface.family import Family, all_equal, norm_rows
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.attention import AttentionConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.feed_forward import Activation, FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.normalization import NormConfig
from llm.models.relative_bias import RelativeBiasConfig
from llm.models.stack import StackConfig

# Their name, and what transformers derives of it, which it writes, too.
_ACTIVATIONS: dict[str, tuple[Activation, str]] = {
    'relu': ('relu', 'relu'),
    'gelu': ('gelu', 'gelu'),
    'gelu_new': ('gelu_tanh', 'gelu_new'),
    'gated-gelu': ('geglu', 'gelu_new'),
    'gated-silu': ('swiglu', 'silu'),
}

_QKV = ('query', 'key', 'value')


def _rows(side: str, branches: dict[str, str]) -> tuple[Row, ...]:
    """One side: its attentions by our name -> theirs, and the feed-forward layer after them."""
    block = f'{side}.block.{{layer}}.layer'
    rows = [
        Row(f'{side}/relative_bias/table', f'{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'),
        *norm_rows({f'{side}/final_norm': f'{side}.final_layer_norm'}),
    ]
    for number, (ours, theirs) in enumerate(branches.items()):
        name = f'{block}.{number}.{theirs}'
        rows += [Row(f'{side}/{ours}/{each}', f'{name}.{each[0]}.weight', '(H K) D -> D H K') for each in _QKV]
        rows.append(Row(f'{side}/{ours}/output', f'{name}.o.weight', 'D (H K) -> H K D'))
        rows += norm_rows({f'{side}/{ours}_norm': f'{block}.{number}.layer_norm'})
    dense = f'{block}.{len(branches)}.DenseReluDense'
    gate = f'{side}/feed_forward/gate'
    rows += [
        Row(gate, f'{dense}.wi_0.weight', 'F D -> D F'),
        Row(f'{side}/feed_forward/up', f'{dense}.wi_1.weight', 'F D -> D F', beside=gate),
        Row(f'{side}/feed_forward/up', f'{dense}.wi.weight', 'F D -> D F', without=gate),
        Row(f'{side}/feed_forward/down', f'{dense}.wo.weight', 'F D -> D F'),
    ]
    rows += norm_rows({f'{side}/feed_forward_norm': f'{block}.{len(branches)}.layer_norm'})
    return tuple(rows)


def _read(settings: Settings) -> EncoderDecoderConfig:
    name = settings.take('feed_forward_proj', str, 'relu')
    activation, derived = settings.choose('feed_forward_proj', _ACTIVATIONS, 'relu')
    settings.expect(is_encoder_decoder=True, dense_act_fn=derived, is_gated_act=name.startswith('gated'))
    settings.pass_over('dropout_rate', 'initializer_factor', 'n_positions', 'output_past')
    start, padding = settings.raw('decoder_start_token_id'), settings.raw('pad_token_id')
    if None not in (start, padding) and start != padding:
        raise settings.unsupported('decoder_start_token_id', f'only that of padding, {padding!r:.40}, is supported')
    tied = settings.take('tie_word_embeddings', bool, True)
    scaled = settings.take('scale_decoder_outputs', bool, tied)
    if scaled and not tied:
        raise settings.unsupported('scale_decoder_outputs', 'only tied embeddings are scaled')
    width, heads, size = (settings.take(each, int, n) for each, n in (('d_model', 512), ('num_heads', 8), ('d_kv', 64)))
    norm = NormConfig('rms', settings.take('layer_norm_epsilon', float, 1e-6))
    mixer = AttentionConfig(heads, heads, size, causal=False, scale=1.0)
    layer = LayerConfig(mixer, FeedForwardConfig(settings.take('d_ff', int, 2048), activation), norm)
    decoding = dataclasses.replace(layer, mixer=dataclasses.replace(mixer, causal=True), cross=mixer)
    num_layers = settings.take('num_layers', int, 6)
    bias = RelativeBiasConfig(
        settings.take('relative_attention_num_buckets', int, 32),
        settings.take('relative_attention_max_distance', int, 128),
    )
    return EncoderDecoderConfig(
        settings.take('vocab_size', int, 32128),
        width,
        StackConfig(num_layers, (layer,), norm, bias),
        StackConfig(
            settings.take('num_decoder_layers', int, num_layers),
            (decoding,),
            norm,
            dataclasses.replace(bias, bidirectional=False),
        ),
        tied_embeddings=scaled,
    )


def _write(config: EncoderDecoderConfig) -> dict[str, Any]:
    mixer: Any = all_equal(config.encoder, lambda layer: layer.mixer)
    feed_forward = all_equal(config.encoder, lambda layer: layer.feed_forward)
    norm = all_equal(config.encoder, lambda layer: layer.norm)
    bias: Any = config.encoder.relative_bias
    names = {ours: theirs for theirs, (ours, _) in _ACTIVATIONS.items()}
    return {
        'vocab_size': config.vocab_size,
        'd_model': config.d_model,
        'd_kv': mixer.head_dim,
        'd_ff': feed_forward.d_ff,
        'num_layers': config.encoder.num_layers,
        'num_decoder_layers': config.decoder.num_layers,
        'num_heads': mixer.num_heads,
        'relative_attention_num_buckets': bias.num_buckets,
        'relative_attention_max_distance': bias.max_distance,
        'feed_forward_proj': names.get(feed_forward.activation),
        'layer_norm_epsilon': norm.epsilon,
        'is_encoder_decoder': True,
        'tie_word_embeddings': config.tied_embeddings,
    }


T5 = Family(
    model_type='t5',
    architecture='T5ForConditionalGeneration',
    table=(
        Row('embedding/table', 'shared.weight'),
        *_rows('encoder', {'mixer': 'SelfAttention'}),
        *_rows('decoder', {'mixer': 'SelfAttention', 'cross': 'EncDecAttention'}),
        Row('head/kernel', 'lm_head.weight', 'V D -> D V'),
    ),
    read=_read,
    write=_write,
    prefix='',
    # Of the first version's files; nothing reads it.
    ignored=(r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',),
    kind=EncoderDecoderConfig,
    other_architectures=('T5WithLMHeadModel',),
    copies=(
        ('encoder.embed_tokens.weight', 'shared.weight'),
        ('decoder.embed_tokens.weight', 'shared.weight'),
        ('lm_head.weight', 'shared.weight'),
    ),
)
