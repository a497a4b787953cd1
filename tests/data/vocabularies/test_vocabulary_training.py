"""Sampling and training."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data.vocabularies import ByteVocabulary, VocabularyConfig, train_vocabulary
from llm.data.vocabularies.training import sample_documents
from llm.errors import UserError
from tests.data.vocabularies.small_vocabularies import config


@given(st.lists(st.text(max_size=30), max_size=30), st.integers(1, 300), st.integers(0, 3), st.randoms())
def test_a_sample_depends_on_the_documents_and_not_on_their_order(documents, num_bytes, seed, rng):
    sample = sample_documents(documents, num_bytes, seed)
    shuffled = rng.sample(documents, len(documents))
    assert sample_documents(iter(shuffled), num_bytes, seed) == sample
    total = sum(len(document.encode()) for document in documents)
    size = sum(len(text.encode()) for text in sample)
    assert min(total, num_bytes) - 3 <= size <= min(total, num_bytes)
    assert all(any(text in document for document in documents) for text in sample)
    if num_bytes >= total:
        assert sorted(sample) == sorted(document for document in documents if document)


def test_a_sample_is_even_and_not_the_head():
    documents = [f'{i:05d}\n' * 100 for i in range(2000)]
    sample = sample_documents(documents, 120_000, seed=0)
    chosen = sorted(int(text[:5]) for text in sample)
    assert len(chosen) == 200
    quarters = [sum(500 * q <= i < 500 * (q + 1) for i in chosen) for q in range(4)]
    assert all(30 < quarter < 70 for quarter in quarters)
    assert sample_documents(documents, 120_000, seed=1) != sample


def test_one_long_document_does_not_fill_the_sample():
    rng = random.Random(0)
    book = ''.join(f'book {rng.random()}\n' for _ in range(100_000))
    notes = [''.join(f'note {rng.random()}\n' for _ in range(100)) for _ in range(1000)]
    sample = sample_documents([book, *notes], 200_000, seed=0)
    share = sum(len(text) for text in sample if text.startswith('book')) / 200_000
    assert 0.3 < share < 0.7  # it is half of the text
    assert all(text.endswith('\n') for text in sample[:-1])


def test_bytes_need_no_documents():
    assert train_vocabulary(VocabularyConfig('bytes', None), iter(())) == ByteVocabulary()


def test_a_size_is_needed_to_train(documents):
    with pytest.raises(UserError, match="'byte_level_bpe' needs a size"):
        train_vocabulary(VocabularyConfig(), documents)


def test_the_seed_and_the_size_of_the_sample_matter(documents, trained):
    assert train_vocabulary(config('byte_level_bpe', seed=1), documents) != trained['byte_level_bpe']
    assert train_vocabulary(config('byte_level_bpe', sample_bytes=50_000), documents) != trained['byte_level_bpe']


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'kind': 'bytes', 'size': 300}, r'bytes cannot have 300 tokens\. Set size to None or 259'),
        ({'sample_bytes': 0}, 'not positive'),
    ],
)
def test_configs_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        VocabularyConfig(**settings)
