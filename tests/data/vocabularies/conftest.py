"""Small vocabularies of every kind, trained once."""

import pytest

from llm.data.sources import StandardLibrary, read_documents
from llm.data.vocabularies import Vocabulary, train_vocabulary
from tests.data.vocabularies.small_vocabularies import KINDS, config


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
