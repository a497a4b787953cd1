"""What an architecture of GGUF files is to us: keys and tensors, by way of a Hugging Face family.

A key of the metadata says what a setting of config.json says, so the family that reads and writes config.json knows
what it means; only names are translated here.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llm.errors import UserError
from llm.interop.gguf.rotary import START, TENSORS, plain, read_scaling, write_scaling
from llm.interop.huggingface.families import FAMILIES
from llm.interop.huggingface.family import Family
from llm.interop.loading import Tensor
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig

_FIX = 'This model cannot be converted as it is.'
# Say nothing that changes logits, or what tensors say as well.
_HARMLESS = {'vocab_size', 'attention.value_length', 'tensor_data_layout', 'context_length'}
_MOST_LAYERS = 10_000
ROTATED = 'rope.dimension_count'
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One kind of model that general.architecture names.

    Attributes:
        name.
        model_type: of the family that has the same models.
        table: see llm.interop.gguf.tables.
        keys: key, without the architecture -> setting of config.json.
        constants: settings that every such model has.
        fixed: keys that every file has with this value, or not at all.
        tied: whether llama.cpp runs such models with tied embeddings.
        factors: whether it divides their frequencies by tensors of factors.
        fraction: setting of the part of a head that is rotated; '' where all of it is.
        written: more keys, of the settings: for llama.cpp, which wants what others say as well, or by layer.
        derived: settings that follow from keys, settings so far and tensors.
        own_keys: that `written` gives and `derived` takes.
    """

    name: str
    model_type: str
    table: tuple[Row, ...]
    keys: Mapping[str, str]
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tied: bool = True
    factors: bool = False
    fraction: str = ''
    written: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    derived: Callable[[dict[str, Any], Settings, Mapping[str, Tensor]], Settings] = lambda keys, settings, tensors: {}
    own_keys: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """Of Hugging Face models."""
        return FAMILIES[self.model_type]

    def rows(self, config: DecoderConfig) -> tuple[Row, ...]:
        """The table for a model: `groups` is a number there."""
        groups = str(getattr(config.layer(0).mixer, 'num_groups', 1))
        return tuple(dataclasses.replace(row, axes=row.axes.replace('groups', groups)) for row in self.table)

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a file of this name is of this kind: some names are those of models with and without experts."""
        return ('expert_count' in self.keys) == bool(metadata.get(f'{self.name}.expert_count'))

    def settings(self, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Settings:
        """The config.json that says what the metadata say.

        Raises:
            UserError: a key is unknown, or has a value that is not supported.
        """
        start = f'{self.name}.'
        given = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
        settings: Settings = {'model_type': self.model_type, **self.constants}
        embedding = tensors.get('token_embd.weight')
        if embedding is not None:
            settings['vocab_size'] = embedding.shape[0]
        settings['tie_word_embeddings'] = 'output.weight' not in tensors
        scaling = {key.removeprefix(START): given.pop(key) for key in [*given] if key.startswith(START)}
        for key, value in given.items():
            if key in self.keys:
                settings[self.keys[key]] = _one(value, key, where)
            elif key in self.fixed:
                if plain(value) != self.fixed[key]:
                    raise UserError(f'{start}{key} is {value!r:.40}, not {self.fixed[key]}', where=where, fix=_FIX)
            elif key not in _HARMLESS and key not in self.own_keys and key != ROTATED:
                raise UserError(f'the key {start}{key} ({value!r:.40}) is unknown', where=where, fix=_FIX)
        layers = given.get('block_count')
        if type(layers) is not int or not 1 <= layers <= _MOST_LAYERS:
            raise UserError(f'{start}block_count is {layers!r:.40}', where=where, fix=_FIX)
        try:
            settings |= self.derived(given, settings, tensors)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise UserError(f'its keys do not say what a {self.name} needs ({error})', where=where, fix=_FIX) from error
        says = ROTATED in given or scaling or any(name in tensors for name in TENSORS)
        if says and settings.get(self.keys.get('attention.head_count', '')):
            self._read_rotation(settings, given, scaling, tensors, where)
        return settings

    def _read_rotation(
        self,
        settings: Settings,
        given: Mapping[str, Any],
        scaling: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        where: str,
    ) -> None:
        """Put into the settings what keys say of rotation."""
        heads, width = (settings.get(self.keys[key]) for key in ('attention.head_count', 'embedding_length'))
        size = settings.get('qk_rope_head_dim', settings.get('head_dim'))
        if size is None and isinstance(heads, int) and isinstance(width, int):
            size = width // heads
        rotated = given.get(ROTATED, size)
        if type(size) is not int or type(rotated) is not int or not 0 < rotated <= size:
            raise UserError(f'{self.name}.{ROTATED} is {rotated!r:.40}, and heads have {size}', where=where, fix=_FIX)
        if self.fraction:
            settings[self.fraction] = rotated / size
        elif rotated != size:
            raise UserError(f'{self.name}.{ROTATED} is {rotated}, not {size}', where=where, fix=_FIX)
        base, length = settings.get(self.keys.get('rope.freq_base', ''), 10_000.0), given.get('context_length')
        if type(length) is int and length > 0 and isinstance(base, int | float) and base > 0:
            if found := read_scaling(scaling, tensors, length, rotated, base, where):
                settings['rope_scaling'] = found
        else:
            raise UserError(f'says how it rotates, with context_length {length!r:.40}', where=where, fix=_FIX)

    def metadata(self, settings: Settings, config: DecoderConfig, length: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keys and values for a model with these settings of config.json, which say more than keys can; more tensors.

        Raises:
            UserError: llama.cpp does not run such a model.
        """
        if config.tied_embeddings and not self.tied:
            raise UserError(
                f'its embeddings are tied, and llama.cpp has no {self.name} of that kind',
                where='DecoderConfig.tied_embeddings',
                fix='Export it to a Hugging Face directory.',
            )
        found: dict[str, Any] = {'context_length': length, 'vocab_size': config.vocab_size, **self.fixed}
        found |= {key: settings[name] for key, name in self.keys.items() if settings.get(name) is not None}
        found |= self.written(settings)
        tensors: dict[str, Any] = {}
        if config.position == 'rope':
            mixers: list[Any] = [layer.mixer for layer in config.layers]
            # Where layers differ, those that see all before them are scaled.
            mixer = next((each for each in mixers if each.window is None), mixers[0])
            scaling = mixer.rotary.scaling
            if scaling.kind == 'longrope':
                found['context_length'] = round(scaling.original_length * scaling.factor)
            found[ROTATED] = mixer.rotary.size
            found.setdefault('attention.value_length', mixer.value_dim)
            over = (settings.get('rope_scaling') or {}).get('mscale_all_dim')
            keys, tensors = write_scaling(mixer.rotary, length, factors=self.factors, over=over)
            found |= keys
        return {f'{self.name}.{key}': value for key, value in found.items()}, tensors


def _one(value: Any, key: str, where: str) -> Any:
    """Numbers that a list gives for each layer, where all are equal."""
    if isinstance(value, list):
        if not value or any(each != value[0] for each in value):
            raise UserError(f'the key {key} differs from layer to layer', where=where, fix='Not supported.')
        return value[0]
    return plain(value)
