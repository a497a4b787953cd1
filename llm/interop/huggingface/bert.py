"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019): encoders with learned positions, normed after each branch.

Which of the heads a checkpoint has, its tensors say: that of the masked language model, the pooler, and on it BERT's
classifier of whether the second part of a row follows the first.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from llm.interop.huggingface.family import Family, all_equal, norm_rows
from llm.interop.huggingface.llama import linear_rows
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.attention import AttentionConfig
from llm.models.encoder import EncoderConfig
from llm.models.feed_forward import Activation, FeedForwardConfig
from llm.models.heads import MaskedLanguageModelHeadConfig
from llm.models.layer import LayerConfig
from llm.models.normalization import NormConfig
from llm.models.stack import StackConfig

ACTIVATIONS: dict[str, Activation] = {
    'gelu': 'gelu',
    'gelu_new': 'gelu_tanh',
    'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_fast': 'gelu_tanh',
    'relu': 'relu',
}
# Positions [0, 1, ...], which older releases saved.
POSITION_IDS = r'(\w+\.)?embeddings\.position_ids'
# Names of TensorFlow's layer norms.
RENAMED = ((r'LayerNorm\.gamma$', 'LayerNorm.weight'), (r'LayerNorm\.beta$', 'LayerNorm.bias'))


def projection_rows(names: dict[str, str]) -> tuple[Row, ...]:
    """Projections of attention with biases, of layers at encoder/: ours -> their name."""
    rows = []
    for ours, theirs in names.items():
        weight, bias = ('D (H K) -> H K D', '') if ours == 'output' else ('(H K) D -> D H K', '(H K) -> H K')
        rows += [
            Row(f'encoder/mixer/{ours}', f'{theirs}.weight', weight),
            Row(f'encoder/mixer/{ours}_bias', f'{theirs}.bias', bias),
        ]
    return tuple(rows)


def embedding_rows(prefix: str) -> tuple[Row, ...]:
    """The three tables and their norm."""
    names = {'embedding': 'word', 'positions': 'position', 'token_types': 'token_type'}
    return (
        *(Row(f'{ours}/table', f'{prefix}.embeddings.{each}_embeddings.weight') for ours, each in names.items()),
        *norm_rows({'embedding_norm': f'{prefix}.embeddings.LayerNorm'}),
    )


def pooler_rows(pooler: str, classifier: str) -> tuple[Row, ...]:
    """The pooler and what classifies its vector."""
    return (
        Row('pooler/dense', f'{pooler}.weight', 'F D -> D F'),
        Row('pooler/bias', f'{pooler}.bias'),
        Row('next_sentence/kernel', f'{classifier}.weight', 'C D -> D C'),
        Row('next_sentence/bias', f'{classifier}.bias'),
    )


def head_rows(dense: str, norm: str, bias: str) -> tuple[Row, ...]:
    """The head of the masked language model."""
    return *linear_rows({'head/dense': dense}), *norm_rows({'head/norm': norm}), Row('head/bias', bias)


def _table(prefix: str, head: tuple[Row, ...]) -> tuple[Row, ...]:
    layer = f'{prefix}.encoder.layer.{{layer}}'
    attention = f'{layer}.attention.self'
    return (
        *embedding_rows(prefix),
        *projection_rows({name: f'{attention}.{name}' for name in ('query', 'key', 'value')}),
        *projection_rows({'output': f'{layer}.attention.output.dense'}),
        *linear_rows(
            {
                'encoder/feed_forward/up': f'{layer}.intermediate.dense',
                'encoder/feed_forward/down': f'{layer}.output.dense',
            }
        ),
        *norm_rows(
            {
                'encoder/mixer_norm': f'{layer}.attention.output.LayerNorm',
                'encoder/feed_forward_norm': f'{layer}.output.LayerNorm',
            }
        ),
        *head,
        *pooler_rows(f'{prefix}.pooler.dense', 'cls.seq_relationship'),
    )


def read(
    settings: Settings,
    *,
    activation: str = 'gelu',
    head_activation: Activation | None = None,
    positions: int = 512,
    first_position: int = 0,
    shared: bool = False,
    sizes: tuple[int, int, int, int, int] = (30522, 768, 12, 12, 3072),
    **model: Any,
) -> EncoderConfig:
    """An encoder whose settings have BERT's names, with a head and without a pooler.

    Args:
        activation: default of `hidden_act`. head_activation: of the head; None for that of the layers.
        positions: default of `max_position_embeddings`. shared: whether layers share their parameters.
        sizes: defaults of vocabulary, width, layers, heads and feed-forward layers.
        model: fields of EncoderConfig.
    """
    settings.expect(
        is_decoder=False,
        add_cross_attention=False,
        is_encoder_decoder=False,
        position_embedding_type='absolute',
        tie_word_embeddings=True,
    )
    settings.pass_over('hidden_dropout_prob', 'attention_probs_dropout_prob', 'output_past')
    vocab, width, layers, heads, d_ff = sizes
    width, heads = settings.take('hidden_size', int, width), settings.take('num_attention_heads', int, heads)
    norm = NormConfig('layer', settings.take('layer_norm_eps', float, 1e-12), bias=True)
    chosen = settings.choose('hidden_act', ACTIVATIONS, activation)
    mixer = AttentionConfig(
        heads, heads, settings.whole_heads(width, heads), causal=False, qkv_bias=True, output_bias=True
    )
    feed_forward = FeedForwardConfig(settings.take('intermediate_size', int, d_ff), chosen, bias=True)
    num_layers = settings.take('num_hidden_layers', int, layers)
    return EncoderConfig(
        settings.take('vocab_size', int, vocab),
        width,
        StackConfig(num_layers, (LayerConfig(mixer, feed_forward, norm, 'post'),), shared_layers=shared),
        max_positions=settings.take('max_position_embeddings', int, positions),
        first_position=first_position,
        token_types=settings.take('type_vocab_size', int, 2),
        embedding_norm=norm,
        head=MaskedLanguageModelHeadConfig(head_activation or chosen, norm),
        **model,
    )


def write(config: EncoderConfig) -> dict[str, Any]:
    """The settings that all such encoders have."""
    mixer: Any = all_equal(config.layers, lambda layer: layer.mixer)
    feed_forward = all_equal(config.layers, lambda layer: layer.feed_forward)
    activations = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        'vocab_size': config.vocab_size,
        'hidden_size': config.d_model,
        'num_hidden_layers': config.layers.num_layers,
        'num_attention_heads': mixer.num_heads,
        'intermediate_size': feed_forward.d_ff,
        'hidden_act': activations.get(feed_forward.activation),
        'layer_norm_eps': all_equal(config.layers, lambda layer: layer.norm.epsilon if layer.norm else None),
        'max_position_embeddings': config.max_positions,
        'type_vocab_size': config.token_types,
        'tie_word_embeddings': True,
    }


def parts(config: EncoderConfig, present: Collection[str]) -> EncoderConfig:
    """See Family.parts."""
    return dataclasses.replace(
        config,
        head=config.head if 'head/dense' in present else None,
        pooler='pooler/dense' in present,
        next_sentence='next_sentence/kernel' in present,
    )


def architectures(name: str, config: EncoderConfig) -> dict[str, Any]:
    """The class that has all of these parts, as far as there is one."""
    if config.head is None:
        return {'architectures': [f'{name}Model']}
    return {'architectures': [f'{name}ForPreTraining' if config.next_sentence else f'{name}ForMaskedLM']}


def _write_bert(config: EncoderConfig) -> dict[str, Any]:
    return write(config) | architectures('Bert', config)


def roberta_table(prefix: str) -> tuple[Row, ...]:
    """Rows of RoBERTa, and of what is built as it is."""
    return _table(prefix, head_rows('lm_head.dense', 'lm_head.layer_norm', 'lm_head.bias'))


def roberta_copies(prefix: str) -> tuple[tuple[str, str], ...]:
    """See Family.copies."""
    return (
        ('lm_head.decoder.weight', f'{prefix}.embeddings.word_embeddings.weight'),
        ('lm_head.decoder.bias', 'lm_head.bias'),
    )


def read_roberta(settings: Settings) -> EncoderConfig:
    """RoBERTa's encoder: positions are counted from after the number of padding."""
    padding = settings.take('pad_token_id', int, 1)
    if padding < 0:
        raise settings.unsupported('pad_token_id', 'positions are counted from the one after it')
    return read(
        settings,
        head_activation='gelu',
        first_position=padding + 1,
        sizes=(50265, 768, 12, 12, 3072),
    )


def _write_roberta(config: EncoderConfig) -> dict[str, Any]:
    # Tokens that are not padding count positions from after the number of padding.
    return write(config) | {'pad_token_id': config.first_position - 1} | architectures('Roberta', config)


BERT = Family(
    model_type='bert',
    architecture='BertForMaskedLM',
    table=_table(
        'bert',
        head_rows('cls.predictions.transform.dense', 'cls.predictions.transform.LayerNorm', 'cls.predictions.bias'),
    ),
    read=read,
    write=_write_bert,
    prefix='bert.',
    ignored=(POSITION_IDS,),
    kind=EncoderConfig,
    other_architectures=('BertForPreTraining',),
    parts=parts,
    copies=(
        ('cls.predictions.decoder.weight', 'bert.embeddings.word_embeddings.weight'),
        ('cls.predictions.decoder.bias', 'cls.predictions.bias'),
    ),
    renamed=RENAMED,
)
ROBERTA = Family(
    model_type='roberta',
    architecture='RobertaForMaskedLM',
    table=roberta_table('roberta'),
    read=read_roberta,
    write=_write_roberta,
    prefix='roberta.',
    ignored=(POSITION_IDS,),
    kind=EncoderConfig,
    parts=parts,
    copies=roberta_copies('roberta'),
    renamed=RENAMED,
)
