"""Small vocabularies of every kind, trained once."""

import pytest

from llm.data.sources import StandardLibrary, read_documents
from llm.data.vocabularies import SpecialTokens, Vocabulary, VocabularyConfig, train_vocabulary

KINDS = ('bytes', 'byte_level_bpe', 'sentencepiece_bpe', 'sentencepiece_unigram')
SPECIAL_TOKENS = SpecialTokens(extra=('<|user|>', '<mask>'))


def config(kind: str, size: int = 600, **settings) -> VocabularyConfig:
    return VocabularyConfig(
        kind,
        None if kind == 'bytes' else size,
        **{'sample_bytes': 150_000, 'special_tokens': SPECIAL_TOKENS, **settings},
    )


@pytest.fixture(scope='session')
def documents() -> list[str]:
    """Real program text, and some in other scripts."""
    foreign = 'Заяц и черепаха. Η χελώνα. うさぎとかめ。 토끼와 거북이 🐢🐇 \n' * 40
    return [*read_documents(StandardLibrary(), 'validation'), foreign]


@pytest.fixture(scope='session')
def trained(documents) -> dict[str, Vocabulary]:
    return {kind: train_vocabulary(config(kind), documents) for kind in KINDS}


@pytest.fixture(params=KINDS)
def vocabulary(request, trained) -> Vocabulary:
    return trained[request.param]
