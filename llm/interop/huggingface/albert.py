"""ALBERT (Lan et al. 2020): BERT with one layer that runs many times, and narrow embeddings that are projected."""

from typing import Any

from llm.interop.huggingface import bert
from llm.interop.huggingface.family import Family, norm_rows
from llm.interop.huggingface.llama import linear_rows
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.encoder import EncoderConfig

_LAYER = 'albert.encoder.albert_layer_groups.{layer}.albert_layers.0'


def _read(settings: Settings) -> EncoderConfig:
    settings.expect(
        num_hidden_groups=1,
        inner_group_num=1,
        net_structure_type=0,
        down_scale_factor=1,
        gap_size=0,
        num_memory_blocks=0,
    )
    settings.pass_over('classifier_dropout_prob', 'layers_to_keep')
    return bert.read(
        settings,
        activation='gelu_new',
        shared=True,
        sizes=(30000, 4096, 12, 64, 16384),
        embedding_size=settings.take('embedding_size', int, 128),
    )


def _write(config: EncoderConfig) -> dict[str, Any]:
    return bert.write(config) | {'embedding_size': config.embedding_size} | bert.architectures('Albert', config)


ALBERT = Family(
    model_type='albert',
    architecture='AlbertForMaskedLM',
    table=(
        *bert.embedding_rows('albert'),
        Row('widen', 'albert.encoder.embedding_hidden_mapping_in.weight', 'D F -> F D'),
        Row('widen_bias', 'albert.encoder.embedding_hidden_mapping_in.bias'),
        *bert.projection_rows({name: f'{_LAYER}.attention.{name}' for name in ('query', 'key', 'value')}),
        *bert.projection_rows({'output': f'{_LAYER}.attention.dense'}),
        *linear_rows({'encoder/feed_forward/up': f'{_LAYER}.ffn', 'encoder/feed_forward/down': f'{_LAYER}.ffn_output'}),
        *norm_rows(
            {
                'encoder/mixer_norm': f'{_LAYER}.attention.LayerNorm',
                'encoder/feed_forward_norm': f'{_LAYER}.full_layer_layer_norm',
            }
        ),
        *bert.head_rows('predictions.dense', 'predictions.LayerNorm', 'predictions.bias'),
        *bert.pooler_rows('albert.pooler', 'sop_classifier.classifier'),
    ),
    read=_read,
    write=_write,
    prefix='albert.',
    ignored=(bert.POSITION_IDS,),
    kind=EncoderConfig,
    other_architectures=('AlbertForPreTraining',),
    parts=bert.parts,
    copies=(
        ('predictions.decoder.weight', 'albert.embeddings.word_embeddings.weight'),
        ('predictions.decoder.bias', 'predictions.bias'),
    ),
    renamed=bert.RENAMED,
)
