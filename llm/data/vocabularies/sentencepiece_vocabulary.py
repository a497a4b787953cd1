"""SentencePiece vocabularies, unigram and BPE (Kudo 2018; Kudo and Richardson 2018)."""

import functools
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Self

import numpy as np

from llm.data.vocabularies.special_tokens import SpecialTokens
from llm.data.vocabularies.vocabulary import Spans, Vocabulary, cut
from llm.errors import UserError

_MODEL = 'sentencepiece.model'
_UNKNOWN = '<unk>'
# SentencePiece writes a space as this character and cannot tell the two apart.
_SPACE = '▁'
# How training adds up depends on the number of threads (not on their timing): a fixed number gives one result.
_TRAINING_THREADS = 4
_TRAINING_LINE_CHARACTERS = 2048
_MAX_LINE_BYTES = 4 * 2 * _TRAINING_LINE_CHARACTERS


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model. Those trained here keep all text as it is: no normalisation, byte fallback.

    Args:
        model: the content of a .model file. Raises UserError when it is none.

    Attributes:
        model: that content.
        lossless: whether decoding gives back every text. A model from elsewhere may normalise, add a space at the
            start or have no byte fallback; it then gives its own ids and its own decoding, and `token_bytes` need not
            add up to the text.
    """

    kind = 'sentencepiece'
    # Pieces trained with white space as their prefix never have a space after another character.
    boundary = re.compile(r'(?<=[^ ]) ')

    def __init__(self, model: bytes) -> None:
        self.model = model
        proto = _parse(model)
        normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
        self.lossless = (
            not normalizer.precompiled_charsmap
            and not normalizer.normalization_rule_tsv
            and not normalizer.add_dummy_prefix
            and not normalizer.remove_extra_whitespaces
            and normalizer.escape_whitespaces
            and not trainer.treat_whitespace_as_suffix
            and trainer.byte_fallback
        )
        kinds = proto.SentencePiece
        self._types = [piece.type for piece in proto.pieces]
        self._pieces = [piece.piece for piece in proto.pieces]
        special = (kinds.CONTROL, kinds.UNKNOWN)
        special_ids = {p: i for i, (p, t) in enumerate(zip(self._pieces, self._types, strict=True)) if t in special}
        try:
            processor = self._processor
        except (RuntimeError, OSError) as error:
            raise UserError(f'is a SentencePiece model that cannot be used ({error})') from error
        ids = {
            'pad': processor.pad_id(),
            'eos': processor.eos_id(),
            'bos': processor.bos_id(),
            'unk': processor.unk_id(),
        }
        roles = {role: None if i < 0 else self._pieces[i] for role, i in ids.items()}
        super().__init__(len(self._pieces), special_ids, roles, rules=[model])

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        size: int,
        algorithm: Literal['unigram', 'bpe'],
        special_tokens: SpecialTokens = SpecialTokens(),
    ) -> Self:
        """A vocabulary of `size` pieces learnt from texts, 256 of them bytes. Raises UserError for too few texts."""
        import sentencepiece

        names = special_tokens.names(unk=_UNKNOWN)
        roles = {'pad': special_tokens.pad, 'eos': special_tokens.eos, 'bos': special_tokens.bos, 'unk': _UNKNOWN}
        arguments: dict[str, Any] = {}
        for role, name in roles.items():
            arguments[f'{role}_id'] = -1 if name is None else names.index(name)
            if name is not None:
                arguments[f'{role}_piece'] = name
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_training_lines(texts),
                model_writer=model,
                vocab_size=size,
                model_type=algorithm,
                control_symbols=list(special_tokens.extra),
                byte_fallback=True,
                normalization_rule_name='identity',
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,  # runs of spaces, as in program code, become one piece
                split_digits=True,
                character_coverage=0.9999,
                max_sentence_length=_MAX_LINE_BYTES,
                num_threads=_TRAINING_THREADS,
                minloglevel=3,
                **arguments,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f'SentencePiece cannot learn {size} pieces from the texts ({" ".join(str(error).split())})',
                fix='Change the size, or give more text',
            ) from error
        return cls(model.getvalue())

    @classmethod
    def restore(cls, settings: dict[str, Any], files: dict[str, bytes]) -> Self:
        """The vocabulary from its file."""
        del settings
        return cls(files[_MODEL])

    def with_special_tokens(self, names: Sequence[str]) -> Self:
        """The same with these special tokens after its own."""
        proto = self.proto
        for name in names:
            proto.pieces.add(piece=name, score=0.0, type=proto.SentencePiece.CONTROL)
        return type(self)(proto.SerializeToString())

    def files(self) -> dict[str, bytes]:
        """The .model file."""
        return {_MODEL: self.model}

    def token_bytes(self) -> list[bytes]:
        """The bytes of every piece by id, a space for '▁'; b'' for special tokens."""
        return [self._piece_bytes(i) for i in range(self.size)]

    def encode_segment(self, text: str) -> np.ndarray:
        """The ids. In a lossless vocabulary a true '▁' in the text becomes its three bytes."""
        text.encode()  # raises for lone surrogates
        if not self.lossless or _SPACE not in text:
            return self._processor.encode_as_numpy(text).astype(np.int32, copy=False)
        parts: list[np.ndarray] = []
        for i, part in enumerate(text.split(_SPACE)):
            if i:
                parts.append(self._space_character_ids)
            parts.append(self._processor.encode_as_numpy(part).astype(np.int32, copy=False))
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the pieces; as the model itself decodes where it is not lossless."""
        return super().decode(ids) if self.lossless else self._processor.decode([int(i) for i in ids])

    def _segments(self, text: str) -> list[str]:
        # A model that adds a space at the start of a text would add one at every cut.
        return super()._segments(text) if self.lossless else [text]

    def _encode_with_spans(self, text: str) -> tuple[list[int], Spans]:
        if self.lossless:
            return super()._encode_with_spans(text)
        pieces = self._processor.encode(text, return_type='proto').pieces
        character_of = [i for i, character in enumerate(text) for _ in character.encode()] + [len(text)]
        spans: Spans = []
        for piece in reversed(pieces):  # of the bytes of a character, only the last has its place
            within = piece.begin == piece.end and spans and self._processor.is_byte(piece.id)
            spans.append(spans[-1] if within else (character_of[piece.begin], character_of[piece.end]))
        return [piece.id for piece in pieces], spans[::-1]

    def _piece_bytes(self, token: int) -> bytes:
        if self._processor.is_byte(token):
            return bytes([int(self._pieces[token][3:5], 16)])  # spelt <0xAB>
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b''
        return self._pieces[token].replace(_SPACE, ' ').encode()

    @property
    def proto(self) -> Any:
        """The model as SentencePiece's protobuf message, ModelProto."""
        return _parse(self.model)

    @functools.cached_property
    def _space_character_ids(self) -> np.ndarray:
        return np.array([self._pieces.index(f'<0x{byte:02X}>') for byte in _SPACE.encode()], np.int32)

    @functools.cached_property
    def _processor(self) -> Any:
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=self.model)


def _parse(model: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = vars(sentencepiece_model_pb2)['ModelProto']()  # a class that protobuf makes, unknown to type checkers
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise UserError('is not a SentencePiece model', fix='Give a .model file of SentencePiece') from error
    if not proto.pieces:
        raise UserError('is a SentencePiece model without pieces', fix='Give a .model file of SentencePiece')
    return proto


def _training_lines(texts: Iterable[str]) -> Iterable[str]:
    """Texts in parts that the trainer takes: it passes over anything longer than `max_sentence_length` bytes."""
    for text in texts:
        boundary = SentencePieceVocabulary.boundary
        yield from cut(text, boundary, _TRAINING_LINE_CHARACTERS, 2 * _TRAINING_LINE_CHARACTERS)
