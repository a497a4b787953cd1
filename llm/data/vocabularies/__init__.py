"""Vocabularies: bytes, byte-level BPE, SentencePiece, and those of others. `vocabulary` says what all can do."""

from llm.data.vocabularies.byte_level_bpe import ByteLevelBPE
from llm.data.vocabularies.byte_vocabulary import ByteVocabulary
from llm.data.vocabularies.hugging_face import read_chat_templates, write_vocabulary
from llm.data.vocabularies.loading import load_vocabulary
from llm.data.vocabularies.sentencepiece_vocabulary import SentencePieceVocabulary
from llm.data.vocabularies.special_tokens import SpecialTokens
from llm.data.vocabularies.tiktoken_vocabulary import TiktokenVocabulary
from llm.data.vocabularies.tokenizer_json import TokenizerJson
from llm.data.vocabularies.training import VocabularyConfig, train_vocabulary
from llm.data.vocabularies.vocabulary import Vocabulary

__all__ = [
    'ByteLevelBPE',
    'ByteVocabulary',
    'SentencePieceVocabulary',
    'SpecialTokens',
    'TiktokenVocabulary',
    'TokenizerJson',
    'Vocabulary',
    'VocabularyConfig',
    'load_vocabulary',
    'read_chat_templates',
    'train_vocabulary',
    'write_vocabulary',
]
