"""What holds for every kind of vocabulary."""

import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data.vocabularies import ByteVocabulary, SpecialTokens, VocabularyConfig
from llm.data.vocabularies.vocabulary import cut
from tests.data.vocabularies.small_vocabularies import SPECIAL_TOKENS

# Strings that some vocabulary treats in its own way inside, between strings that none knows.
CURIOUS = ['<pad>', '<eos>', '<unk>', '<|user|>', '<0x41>', '▁', '▁▁ ', ' ⁇ ', '▅', '\t', '\r\n', '\0', '\ufeff', '  ']
TEXTS = st.lists(st.one_of(st.text(), st.sampled_from(CURIOUS), st.text('a \n▁'))).map(''.join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=300)
@given(text=TEXTS)
def test_decoding_gives_back_any_text_and_the_tokens_bytes_add_up(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode_bytes(ids) == text.encode()
    table = vocabulary.token_bytes()
    assert sum(len(table[token]) for token in ids) == len(text.encode())
    assert not set(ids) & set(vocabulary.special_ids.values())
    (batched,) = vocabulary.encode_batch([text])
    assert batched.dtype == np.int32
    assert batched.tolist() == ids


def test_special_tokens_have_the_first_ids_and_no_bytes(vocabulary):
    unk = [] if vocabulary.unk_id is None else ['<unk>']
    names = ['<pad>', '<eos>', *unk, '<bos>', '<|user|>', '<mask>']
    assert vocabulary.special_ids == {name: i for i, name in enumerate(names)}
    roles = (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id)
    assert roles == tuple(names.index(name) for name in ('<pad>', '<eos>', '<bos>'))
    table = vocabulary.token_bytes()
    assert len(table) == vocabulary.size
    assert [token for token in table if token == b''] == [b''] * len(names)
    assert set(table) >= {bytes([byte]) for byte in range(256)}
    assert vocabulary.decode(range(len(names))) == ''


def test_unknown_ids_and_text_that_is_no_unicode_are_refused(vocabulary):
    for token in (-1, vocabulary.size):
        with pytest.raises(ValueError, match=f'not all in a vocabulary of {vocabulary.size}'):
            vocabulary.decode([0, token])
    with pytest.raises(UnicodeEncodeError):
        vocabulary.encode('lone \ud83e surrogate')


def test_half_a_character_decodes_to_the_replacement_character(vocabulary):
    ids = vocabulary.encode('𐂃')  # in no training text: four bytes
    assert len(ids) == 4
    assert vocabulary.decode(ids[:2]) == '\ufffd'


def test_a_batch_equals_single_calls_in_any_number_of_threads(vocabulary, documents):
    texts = ['', *documents[:20], 'x' * 300_000, '']
    expected = [vocabulary.encode(text) for text in texts]
    for threads in (1, 3, None):
        batch = vocabulary.encode_batch(iter(texts), num_threads=threads)
        assert [ids.tolist() for ids in batch] == expected
    assert vocabulary.encode_batch([]) == []


def test_a_long_text_is_cut_without_changing_its_ids(vocabulary, trained, documents):
    text = ''.join(documents)[:600_000]
    assert len(vocabulary._segments(text)) == 3
    cut_ids, whole_ids = vocabulary.encode(text), vocabulary.encode_segment(text).tolist()
    if vocabulary is not trained['sentencepiece_unigram']:
        assert cut_ids == whole_ids
        return
    # Unigram adds fp32 scores from the start of a text, so equally likely pieces may be chosen otherwise far from it.
    scores = [vocabulary._processor.get_score(token) for token in range(vocabulary.size)]
    totals = [sum(scores[token] for token in ids) for ids in (cut_ids, whole_ids)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-9)
    assert sum(a != b for a, b in zip(cut_ids, whole_ids, strict=True)) < 10


def test_words_that_are_never_cut_still_come_back(vocabulary):
    text = 'été' * 500_000
    segments = vocabulary._segments(text)
    assert len(segments) == (6 if isinstance(vocabulary, ByteVocabulary) else 2)
    assert ''.join(segments) == text
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(st.text('ab \n'), st.integers(1, 8), st.integers(0, 8))
def test_cut_keeps_the_text_and_its_bounds(text, length, more):
    import re

    boundary = re.compile(r'(?<=\S)[ \n]')
    segments = cut(text, boundary, length, length + more)
    assert ''.join(segments) == text
    assert all(length <= len(segment) <= length + more for segment in segments[:-1])
    for before, after in itertools.pairwise(segments):
        assert len(before) == length + more or (before[-1] not in ' \n' and after[0] in ' \n')


def test_the_digest_tells_vocabularies_apart(trained):
    assert len({vocabulary.digest for vocabulary in trained.values()}) == len(trained)
    plain = ByteVocabulary()
    assert plain == ByteVocabulary()
    assert hash(plain) == hash(ByteVocabulary())
    assert len({plain, ByteVocabulary(SpecialTokens(bos=None)), ByteVocabulary(SpecialTokens(eos='</s>'))}) == 3


def test_a_pickled_vocabulary_is_the_same(vocabulary, documents):
    vocabulary.encode(documents[0])  # engines are loaded, and must not be pickled
    copy = pickle.loads(pickle.dumps(vocabulary))
    assert copy == vocabulary
    assert copy.special_ids == vocabulary.special_ids
    assert copy.encode(documents[0]) == vocabulary.encode(documents[0])


def test_importing_vocabularies_loads_no_engine():
    code = 'import sys, llm.data.vocabularies; print(*sorted({m.partition(".")[0] for m in sys.modules}))'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    heavy = {'tensorflow', 'seqio', 'jax', 'tokenizers', 'tiktoken', 'sentencepiece', 'google'}
    assert not heavy & set(run.stdout.split())


def test_special_tokens_are_checked():
    from llm.errors import UserError

    for wrong in (SpecialTokens, VocabularyConfig):
        assert wrong()  # the defaults are right
    with pytest.raises(UserError, match="'<pad>' is empty or given twice"):
        SpecialTokens(eos='<pad>')
    with pytest.raises(UserError, match="'' is empty"):
        SpecialTokens(extra=('',))
    assert SPECIAL_TOKENS.names() == ['<pad>', '<eos>', '<bos>', '<|user|>', '<mask>']
