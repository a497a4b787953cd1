"""The files of llama2.c (https://github.com/karpathy/llama2.c): a Llama as .bin, version 0, and its tokenizer as .bin.

A model file is seven int32, width, hidden width, layers, heads, key/value heads, vocabulary (negative where the output
matrix is the file's own) and longest text, and then fp32 tensors, each for all layers, in the order of `_tensors`.
Rotation takes neighbours of a head's query for a pair, where ours takes its halves.

A tokenizer file is one int32, the length of the longest token, and for each token a score, a length and its bytes. Its
tokens are those of a SentencePiece model of the kind BPE, which is what it becomes here.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.vocabularies import SentencePieceVocabulary, Vocabulary
from llm.errors import UserError
from llm.interop.loading import Pieces
from llm.interop.tables import Link, Row, links
from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.normalization import NormConfig
from llm.models.parameters import parameter_specs

_HEADER = struct.Struct('<7i')
_TOKEN = struct.Struct('<fi')
_LITTLE_FLOAT = np.dtype('<f4')
# Constants of run.c.
_EPSILON, _ROTARY_BASE = 1e-5, 10_000.0
_FIRST_BYTE, _FIRST_PIECE = 3, 259
_REPAIR = 'Get the file again, from where it was made.'

_TABLE = (
    Row('embedding/table', 'token_embedding'),
    Row('mixer_norm/scale', 'attention_norm.{layer}'),
    Row('mixer/query', 'wq.{layer}', '(H k 2) D -> D H (2 k)'),
    Row('mixer/key', 'wk.{layer}', '(G k 2) D -> D G (2 k)'),
    Row('mixer/value', 'wv.{layer}', '(G K) D -> D G K'),
    Row('mixer/output', 'wo.{layer}', 'D (H K) -> H K D'),
    Row('feed_forward_norm/scale', 'ffn_norm.{layer}'),
    Row('feed_forward/gate', 'w1.{layer}', 'F D -> D F'),
    Row('feed_forward/down', 'w2.{layer}', 'D F -> F D'),
    Row('feed_forward/up', 'w3.{layer}', 'F D -> D F'),
    Row('final_norm/scale', 'norm'),
    Row('head/kernel', 'output', 'V D -> D V'),
)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: where it is, not its data. `start` is in bytes."""

    file: Path
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        """Of its elements."""
        return _LITTLE_FLOAT

    def read(self) -> np.ndarray:
        """The tensor mapped into memory."""
        return np.memmap(self.file, _LITTLE_FLOAT, 'r', self.start, self.shape)


@dataclasses.dataclass(frozen=True)
class Llama2cModel:
    """What a file holds, checked but not read.

    Attributes:
        config: of the model.
        sequence_length: the longest text that it was made for.
        pieces: the parameters.
    """

    config: DecoderConfig
    sequence_length: int
    pieces: Pieces

    @property
    def specs(self) -> dict[str, Any]:
        """The parameters' declarations."""
        return parameter_specs(Decoder(self.config))


def open_model(path: str | Path) -> Llama2cModel:
    """Read the header of a model file.

    Raises:
        UserError: the file cannot be read, its header makes no sense, or its size is not what the header says.
    """
    path = Path(path).expanduser()
    try:
        with path.open('rb') as file:
            header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f'cannot be read ({error.strerror})', where=str(path), fix='Check the path.') from error
    if len(header) < _HEADER.size:
        raise UserError('is too short for a model of llama2.c', where=str(path), fix=_REPAIR)
    width, hidden, num_layers, heads, kv_heads, vocab_size, length = _HEADER.unpack(header)
    sizes = (width, hidden, num_layers, heads, kv_heads, abs(vocab_size), length)
    if min(sizes) < 1 or max(sizes) > 1 << 24 or width % heads or heads % kv_heads or (width // heads) % 2:
        raise UserError(
            f'is no model of llama2.c, version 0: its header says {sizes}',
            where=str(path),
            fix='Export it with version 0 (legacy), or convert its Hugging Face directory.',
        )
    config = _config(width, hidden, num_layers, heads, kv_heads, abs(vocab_size), tied=vocab_size > 0)
    tensors: dict[str, StoredTensor] = {}
    end = _HEADER.size
    for name, shape in _tensors(config, length):
        tensors[name] = StoredTensor(path, shape, end)
        end += math.prod(shape) * _LITTLE_FLOAT.itemsize
    if end != size:
        raise UserError(f'the file has {size:,} bytes, its header asks for {end:,}', where=str(path), fix=_REPAIR)
    specs = parameter_specs(Decoder(config))
    return Llama2cModel(config, length, Pieces(tensors, _links(config, specs), specs))


def write_model(
    path: str | Path,
    config: DecoderConfig,
    read: Callable[[str, tuple[int, ...]], np.ndarray],
    *,
    sequence_length: int,
) -> None:
    """Write a model file, one tensor in memory at a time.

    Args:
        read: gives the piece of our array `path` at an index along its leading axes.
        sequence_length: the longest text; run.c goes no further.

    Raises:
        UserError: the model is not one that run.c can run, or the file cannot be written.
    """
    layer = config.pattern[0]
    mixer: Any = layer.mixer
    hidden = getattr(layer.feed_forward, 'd_ff', 0)
    expected = _config(
        config.d_model,
        hidden,
        config.num_layers,
        getattr(mixer, 'num_heads', 1),
        getattr(mixer, 'num_kv_heads', 1),
        config.vocab_size,
        tied=config.tied_embeddings,
    )
    from llm.interop.huggingface.family import described

    if described(config) != described(expected):
        raise UserError(
            'the model is not the Llama that run.c computes: RMSNorm with epsilon 1e-5, rotation of base 10,000, heads '
            'that fill the width, SwiGLU, no biases',
            where='DecoderConfig',
            fix='Export it to a Hugging Face directory.',
        )
    found = {link.name: link for link in _links(config, parameter_specs(Decoder(config)))}
    sign = 1 if config.tied_embeddings else -1
    sizes = (config.d_model, hidden, config.num_layers, mixer.num_heads, mixer.num_kv_heads)
    path = Path(path)
    try:
        with path.open('wb') as file:
            file.write(_HEADER.pack(*sizes, sign * config.vocab_size, sequence_length))
            for name, shape in _tensors(config, sequence_length):
                out = np.empty(shape, _LITTLE_FLOAT)
                if name in found:
                    found[name].write(out, read(found[name].path, found[name].index))
                else:
                    out[:] = _rotation(name, config, sequence_length)
                file.write(out.tobytes())
    except OSError as error:
        raise UserError(f'cannot write ({error.strerror})', where=str(path), fix='Check the path.') from error


def _config(
    width: int, hidden: int, num_layers: int, heads: int, kv_heads: int, vocab_size: int, *, tied: bool
) -> DecoderConfig:
    norm = NormConfig('rms', _EPSILON)
    mixer = AttentionConfig(heads, kv_heads, max(1, width // heads), rotary_base=_ROTARY_BASE)
    layer = LayerConfig(mixer, FeedForwardConfig(hidden, 'swiglu'), norm)
    return DecoderConfig(vocab_size, width, num_layers, (layer,), norm, tied_embeddings=tied)


def _links(config: DecoderConfig, specs: dict[str, Any]) -> list[Link]:
    return links(_TABLE, specs, config.num_layers, config.location)


def _tensors(config: DecoderConfig, length: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file. The two tables of rotation are read by no program any more."""
    mixer: Any = config.pattern[0].mixer
    width, hidden = config.d_model, getattr(config.pattern[0].feed_forward, 'd_ff', 0)
    queries, keys = mixer.num_heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
    by_layer: dict[str, tuple[int, ...]] = {
        'attention_norm': (width,),
        'wq': (queries, width),
        'wk': (keys, width),
        'wv': (keys, width),
        'wo': (width, queries),
        'ffn_norm': (width,),
        'w1': (hidden, width),
        'w2': (width, hidden),
        'w3': (hidden, width),
    }
    found: list[tuple[str, tuple[int, ...]]] = [('token_embedding', (config.vocab_size, width))]
    found += [(f'{name}.{i}', shape) for name, shape in by_layer.items() for i in range(config.num_layers)]
    found += [('norm', (width,)), *((name, (length, mixer.head_dim // 2)) for name in ('cosines', 'sines'))]
    return found if config.tied_embeddings else [*found, ('output', (config.vocab_size, width))]


def _rotation(name: str, config: DecoderConfig, length: int) -> np.ndarray:
    mixer: Any = config.pattern[0].mixer
    frequencies = _ROTARY_BASE ** (-np.arange(0, mixer.head_dim, 2) / mixer.head_dim)
    angles = np.arange(length)[:, None] * frequencies
    return np.cos(angles) if name == 'cosines' else np.sin(angles)


def read_tokenizer(path: str | Path, num_tokens: int) -> SentencePieceVocabulary:
    """The tokenizer of a model with `num_tokens` tokens.

    Raises:
        UserError: the file cannot be read, or does not hold that many tokens as such a file does.
    """
    from sentencepiece import sentencepiece_model_pb2

    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f'cannot be read ({error.strerror})', where=str(path), fix='Check the path.') from error
    proto: Any = vars(sentencepiece_model_pb2)['ModelProto']()
    kinds = proto.SentencePiece
    at = 4
    for token in range(num_tokens):
        if at + _TOKEN.size > len(content):
            raise UserError(f'ends before token {token} of {num_tokens}', where=str(path), fix=_REPAIR)
        score, length = _TOKEN.unpack_from(content, at)
        spelling = content[at + _TOKEN.size : at + _TOKEN.size + length]
        at += _TOKEN.size + length
        if length < 0 or len(spelling) < length:
            raise UserError(f'token {token} has length {length}', where=str(path), fix=_REPAIR)
        try:
            piece = spelling.decode().replace(' ', '▁')
        except UnicodeDecodeError as error:
            raise UserError(f'token {token} is not UTF-8', where=str(path), fix=_REPAIR) from error
        kind = kinds.NORMAL
        if token < _FIRST_BYTE:
            piece, kind = ('<unk>', '<s>', '</s>')[token], (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL)[token]
        elif token < _FIRST_PIECE:
            kind = kinds.BYTE
            if piece != f'<0x{token - _FIRST_BYTE:02X}>':
                raise UserError(f'token {token} is {piece!r:.40}, not a byte', where=str(path), fix=_REPAIR)
        proto.pieces.add(piece=piece, score=score, type=kind)
    if at != len(content) or num_tokens < _FIRST_PIECE:
        raise UserError(f'holds more than the {num_tokens} tokens of the model', where=str(path), fix=_REPAIR)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = num_tokens
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = 'identity'
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    try:
        return SentencePieceVocabulary(proto.SerializeToString())
    except UserError as error:
        raise UserError(error.what, where=str(path), fix=_REPAIR) from error


def write_tokenizer(path: str | Path, vocabulary: Vocabulary) -> None:
    """Write the tokenizer of a model whose vocabulary has Llama's first tokens: <unk>, <s>, </s> and the bytes.

    Raises:
        UserError: the vocabulary is another, or the file cannot be written.
    """
    proto = vocabulary.proto if isinstance(vocabulary, SentencePieceVocabulary) else None
    pieces = proto.pieces if proto else ()
    kinds = proto.SentencePiece if proto else None
    expected = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256] if kinds else None
    if [piece.type for piece in pieces[:_FIRST_PIECE]] != expected or (vocabulary.bos_id, vocabulary.eos_id) != (1, 2):
        raise UserError(
            'the first tokens are not <unk>, <s>, </s> and the bytes, which run.c relies on',
            where=type(vocabulary).__name__,
            fix='Export the model to a Hugging Face directory.',
        )
    # As llama2.c's tokenizer.py spells these two.
    spellings = {1: '\n<s>\n', 2: '\n</s>\n'}
    tokens = [(piece.score, spellings.get(i, piece.piece).replace('▁', ' ').encode()) for i, piece in enumerate(pieces)]
    path = Path(path)
    try:
        with path.open('wb') as file:
            file.write(struct.pack('<i', max(len(spelling) for _, spelling in tokens)))
            for score, spelling in tokens:
                file.write(_TOKEN.pack(score, len(spelling)) + spelling)
    except OSError as error:
        raise UserError(f'cannot write ({error.strerror})', where=str(path), fix='Check the path.') from error
