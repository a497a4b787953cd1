"""How the small vocabularies of these tests are configured."""

from llm.data.vocabularies import SpecialTokens, VocabularyConfig

KINDS = ('bytes', 'byte_level_bpe', 'sentencepiece_bpe', 'sentencepiece_unigram')
SPECIAL_TOKENS = SpecialTokens(extra=('<|user|>', '<mask>'))


def config(kind: str, size: int = 600, **settings) -> VocabularyConfig:
    return VocabularyConfig(
        kind,
        None if kind == 'bytes' else size,
        **{'sample_bytes': 150_000, 'special_tokens': SPECIAL_TOKENS, **settings},
    )
