"""Longformer (Beltagy et al. 2020): RoBERTa in windows, with projections of their own for global tokens.

Which tokens are global, a caller of transformers says row by row, and no setting does. A model that is read has room
for 64 of them in a row, and `first_is_global` is for its run to set.
"""

import dataclasses
from typing import Any

from llm.errors import UserError
from llm.interop.huggingface import bert
from llm.interop.huggingface.family import GLOBAL_TOKENS, Family, repeating
from llm.interop.huggingface.settings import Settings
from llm.models.attention import AttentionConfig
from llm.models.encoder import EncoderConfig
from llm.models.long_attention import LongAttentionConfig

_ATTENTION = 'longformer.encoder.layer.{layer}.attention.self'
_TABLE = (
    *bert.roberta_table('longformer'),
    *bert.projection_rows({f'global_{name}': f'{_ATTENTION}.{name}_global' for name in ('query', 'key', 'value')}),
)


def _read(settings: Settings) -> EncoderConfig:
    settings.expect(attention_mode='longformer', ignore_attention_mask=False, onnx_export=False)
    windows = settings.raw('attention_window')
    windows = 512 if windows is None else windows
    config = bert.read_roberta(settings)
    count = config.layers.num_layers
    windows = [windows] * count if isinstance(windows, int) else windows
    if not isinstance(windows, list) or not all(isinstance(w, int) and w > 0 and w % 2 == 0 for w in windows):
        raise settings.unsupported('attention_window', 'even numbers of at least 2 are')
    if len(windows) != count:
        raise settings.unsupported('attention_window', f'{len(windows)} windows for {count} layers')
    layer = config.layers.pattern[0]
    assert isinstance(layer.mixer, AttentionConfig)
    fields = {field.name: getattr(layer.mixer, field.name) for field in dataclasses.fields(layer.mixer)}
    layers = [
        dataclasses.replace(
            layer, mixer=LongAttentionConfig(**fields | {'window': w // 2 + 1}, global_tokens=GLOBAL_TOKENS)
        )
        for w in windows
    ]
    return dataclasses.replace(config, layers=dataclasses.replace(config.layers, pattern=repeating(layers)))


def _write(config: EncoderConfig) -> dict[str, Any]:
    mixers = [config.layers.layer(index).mixer for index in range(config.layers.num_layers)]
    windows = [mixer.window for mixer in mixers if isinstance(mixer, LongAttentionConfig)]
    if len(windows) != len(mixers):
        raise UserError('a layer that does not attend in windows', where='EncoderConfig.layers')
    plain = [dataclasses.replace(layer, mixer=mixers[0]) for layer in config.layers.pattern]
    alike = dataclasses.replace(config, layers=dataclasses.replace(config.layers, pattern=repeating(plain)))
    settings = bert.write(alike) | {'pad_token_id': config.first_position - 1}
    settings |= {'attention_window': [2 * (window - 1) for window in windows if window is not None]}
    return settings | bert.architectures('Longformer', config)


LONGFORMER = Family(
    model_type='longformer',
    architecture='LongformerForMaskedLM',
    table=_TABLE,
    read=_read,
    write=_write,
    prefix='longformer.',
    ignored=(bert.POSITION_IDS,),
    kind=EncoderConfig,
    parts=bert.parts,
    copies=bert.roberta_copies('longformer'),
    renamed=bert.RENAMED,
)
