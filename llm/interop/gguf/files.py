"""A model as a GGUF file: reading what a file holds, and writing one from our parameters."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llm.data.vocabularies import Vocabulary
from llm.errors import UserError
from llm.interop.gguf import rotary
from llm.interop.gguf.architecture import Architecture
from llm.interop.gguf.architectures import ARCHITECTURES, NAMES, find
from llm.interop.gguf.blocks import BY_NAME, BlockType
from llm.interop.gguf.format import GgufFile, read_header
from llm.interop.gguf.tokenizer import read_tokenizer, tokenizer_metadata
from llm.interop.gguf.writing import NewTensor, write_file
from llm.interop.huggingface.directory import find_family, read_settings
from llm.interop.huggingface.family import described
from llm.interop.loading import Pieces, check_tensors
from llm.interop.tables import Link, links
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.parameters import parameter_specs
from llm.models.position import RotaryScaling

GgufType = Literal['F32', 'F16', 'BF16', 'Q8_0']
# llama.cpp's numbers for what most of a file is (general.file_type).
_FILE_TYPES: dict[GgufType, int] = {'F32': 0, 'F16': 1, 'Q8_0': 7, 'BF16': 32}
# Its code computes with these in fp32 alone: positions, routers, convolutions, norms, and what is no weight.
_ALWAYS_F32 = re.compile(r'^position_embd|ffn_gate_inp\.|ssm_conv1d\.|_norm\.|(?<!\.weight)$')
# llama.cpp looks for these, and stops where they are missing, in a model of which the name says that it is Phi-3's.
_PHI3_TOKENS = {'</s>', '<unk>', '<s>', '<|endoftext|>'}


@dataclasses.dataclass(frozen=True)
class GgufModel:
    """What a file holds, checked but not read.

    Attributes:
        file, architecture.
        config: of the model.
        sequence_length: that it was made for; None if the file does not say.
        pieces: the parameters.
    """

    file: GgufFile
    architecture: Architecture
    config: DecoderConfig
    sequence_length: int | None
    pieces: Pieces

    @property
    def specs(self) -> dict[str, Any]:
        """The parameters' declarations."""
        return parameter_specs(Decoder(self.config))

    def read_vocabulary(self) -> Vocabulary:
        """Raises UserError where the file has no tokenizer, or one of a kind that is not known here."""
        return read_tokenizer(self.file)

    @property
    def chat_template(self) -> str | None:
        """A Jinja template."""
        return self.file.metadata.get('tokenizer.chat_template')


def open_gguf(path: str | Path) -> GgufModel:
    """Read the header of a file.

    Raises:
        UserError: the file is damaged, its architecture or a key is unknown, or the tensors are not those of its keys.
    """
    file = read_header(path)
    where = str(file.path)
    architecture = find(file.metadata, where)
    config = read_config(architecture, file.metadata, file.tensors, where)
    specs = parameter_specs(Decoder(config))
    table = links(architecture.rows(config), specs, config.num_layers, config.location)
    check_tensors(file.tensors, table, where, rotary.TENSORS if architecture.factors else ())
    length = file.metadata.get(f'{architecture.name}.context_length')
    sequence_length = length if type(length) is int else None
    return GgufModel(file, architecture, config, sequence_length, Pieces(file.tensors, table, specs))


def write_gguf(
    path: str | Path,
    config: DecoderConfig,
    read: Callable[[str, tuple[int, ...]], np.ndarray],
    *,
    dtype: GgufType,
    sequence_length: int,
    vocabulary: Vocabulary,
    name: str = 'llm',
    chat_template: str | None = None,
) -> Architecture:
    """Write a file, one tensor in memory at a time.

    Args:
        read: gives the piece of our array `path` at an index along its leading axes.
        dtype: of matrices; vectors are always F32, and so are matrices whose rows are no whole blocks.
        sequence_length: that the model was trained on.
        chat_template: a Jinja template.

    Raises:
        UserError: no architecture can describe the model or its vocabulary, a value does not fit `dtype`, or the file
            cannot be written.
    """
    path = Path(path)
    architecture, settings = _find_architecture(config)
    keys, factors = architecture.metadata(settings, config, config.max_positions or sequence_length)
    metadata: dict[str, Any] = {
        'general.architecture': architecture.name,
        'general.name': name,
        'general.file_type': _FILE_TYPES[dtype],
        'general.quantization_version': 2,
        **keys,
    }
    specs = parameter_specs(Decoder(config))
    by_name: dict[str, list[Link]] = {}
    for link in links(architecture.rows(config), specs, config.num_layers, config.location):
        by_name.setdefault(link.name, []).append(link)

    def make(parts: list[Link]) -> np.ndarray:
        out = np.empty(parts[0].layout.theirs, np.float32)
        for link in parts:
            link.write(out, read(link.path, link.index))
        return out

    def type_of(name: str, shape: tuple[int, ...]) -> BlockType:
        wanted = BY_NAME[dtype]
        plain = len(shape) < 2 or _ALWAYS_F32.search(name) or shape[-1] % wanted.numbers
        return BY_NAME['F32'] if plain else wanted

    tensors = []
    for theirs, parts in by_name.items():
        shape = parts[0].layout.theirs
        tensors.append(NewTensor(theirs, shape, type_of(theirs, shape), functools.partial(make, parts)))
    for theirs, values in factors.items():
        tensors.append(NewTensor(theirs, values.shape, BY_NAME['F32'], functools.partial(np.asarray, values)))
    embedding = by_name['token_embd.weight'][0].layout.theirs
    if vocabulary.size > embedding[0]:
        raise UserError(f'the vocabulary has {vocabulary.size} tokens and the model {embedding[0]}')
    metadata |= tokenizer_metadata(vocabulary, embedding[0])
    if re.search('phi-?3', name.lower()) and _PHI3_TOKENS - {*metadata['tokenizer.ggml.tokens']}:
        del metadata['general.name']
    if chat_template is not None:
        metadata['tokenizer.chat_template'] = chat_template
    # Whatever the keys cannot say, the config read back shows.
    shown = {tensor.name: _Shown(tensor.shape, tensor.make) for tensor in tensors}
    back = read_config(architecture, metadata, shown, str(path))
    if described(_without_scaling(back)) != described(_without_scaling(config)):
        raise UserError(
            f'as {architecture.name!r}, the nearest architecture, a GGUF file would not say all of the model',
            where='DecoderConfig',
            fix='Export it to a Hugging Face directory.',
        )
    write_file(path, metadata, tensors)
    return architecture


@dataclasses.dataclass(frozen=True)
class _Shown:
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_config(
    architecture: Architecture, metadata: Mapping[str, Any], tensors: Mapping[str, Any], where: str
) -> DecoderConfig:
    """The config that metadata and the names and shapes of tensors say.

    Raises:
        UserError: a key is unknown, missing, or has a value that is not supported.
    """
    settings = architecture.settings(metadata, tensors, where)
    config, _ = read_settings(settings, architecture.family, where)
    assert isinstance(config, DecoderConfig)  # all of these architectures are
    return config


def _find_architecture(config: DecoderConfig) -> tuple[Architecture, dict[str, Any]]:
    reasons = []
    for architecture in ARCHITECTURES:
        try:
            _, settings = find_family(config, architecture.model_type)
        except UserError as error:
            reasons.append(error.what)
            continue
        return architecture, settings
    raise UserError(
        f'the model is of no architecture that can be written: {reasons[0]}',
        where='DecoderConfig',
        fix=f'Architectures: {", ".join(NAMES)}. Or export it to a Hugging Face directory.',
    )


def _without_scaling(config: DecoderConfig) -> DecoderConfig:
    """The config without what tensors of factors say, which round them."""

    def plain(layer: Any) -> Any:
        mixer = layer.mixer
        if getattr(mixer, 'rotary_scaling', RotaryScaling()).kind in ('llama3', 'longrope'):
            mixer = dataclasses.replace(mixer, rotary_scaling=RotaryScaling())
        return dataclasses.replace(layer, mixer=mixer)

    return dataclasses.replace(config, pattern=tuple(plain(layer) for layer in config.pattern))
