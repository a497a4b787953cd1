"""Vocabularies: bytes, byte-level BPE and SentencePiece. `vocabulary` says what all of them can do."""

from llm.data.vocabularies.byte_level_bpe import ByteLevelBPE
from llm.data.vocabularies.byte_vocabulary import ByteVocabulary
from llm.data.vocabularies.loading import load_vocabulary
from llm.data.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from llm.data.vocabularies.special_tokens import SpecialTokens
from llm.data.vocabularies.training import VocabularyConfig, train_vocabulary
from llm.data.vocabularies.vocabulary import Vocabulary

__all__ = [
    'ByteLevelBPE',
    'ByteVocabulary',
    'SentencePieceVocabulary',
    'SpecialTokens',
    'Vocabulary',
    'VocabularyConfig',
    'load_vocabulary',
    'train_vocabulary',
]
