"""Byte-level BPE against GPT-2's files, published ids, and the tokenizers library."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm.data.sources import ReadCounts, TextFiles
from llm.data.vocabularies import ByteLevelBPE, SpecialTokens, load_vocabulary, train_vocabulary
from llm.data.vocabularies.byte_alphabet import BYTE_ALPHABET
from llm.errors import UserError
from tests.data.vocabularies.small_vocabularies import config


@pytest.fixture(scope='module')
def gpt2(dev_data):
    return load_vocabulary(dev_data / 'tokenizers' / 'gpt2')


def test_gpt2_files_give_the_published_ids(gpt2, dev_data):
    """llama.cpp's vectors: texts between lines `__ggml_vocab_test__`, and the ids of each on a line."""
    vectors = dev_data / 'tokenizers' / 'vectors'
    texts = (vectors / 'gpt-2.inp').read_bytes().decode().split('\n__ggml_vocab_test__\n')
    expected = [[int(token) for token in line.split()] for line in (vectors / 'gpt-2.out').read_text().split('\n')]
    assert len(texts) == len(expected) == 47
    assert [gpt2.encode(text) for text in texts] == expected
    assert [gpt2.decode(ids) for ids in expected] == texts


def test_gpt2_special_token_is_both_ends_and_never_encoded(gpt2):
    assert (gpt2.size, gpt2.bos_id, gpt2.eos_id, gpt2.pad_id, gpt2.unk_id) == (50257, 50256, 50256, 50256, None)
    assert gpt2.special_ids == {'<|endoftext|>': 50256}
    assert gpt2.encode('<|endoftext|>') == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.token_bytes()[50256] == b''


def test_tiktoken_and_tokenizers_agree_on_a_long_real_text(gpt2, dev_data):
    """That the fast engine gives the reference's ids, on a megabyte each of plays, stories and articles."""
    source = TextFiles(str(dev_data / 'text' / '*.txt.gz'), validation_fraction=0)
    texts = [next(shard.documents(ReadCounts())) for shard in source.shards('train')]
    reference = gpt2.reference_encoder.encode_batch(texts, add_special_tokens=False)
    assert gpt2._tiktoken is not None
    for ours, theirs in zip(gpt2.encode_batch(texts), reference, strict=True):
        assert np.array_equal(ours, theirs.ids)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=500)
@given(text=st.one_of(st.text(), st.text("a'sre \n\t\x1c\x85\u00a0\u3000٣½"), st.text('=- \n').map(lambda t: t * 9)))
def test_both_engines_agree_on_any_text(gpt2, trained, text):
    for vocabulary in (gpt2, trained['byte_level_bpe']):
        assert vocabulary._tiktoken is not None
        reference = vocabulary.reference_encoder.encode(text, add_special_tokens=False)
        assert vocabulary.encode(text) == reference.ids


def test_a_table_that_tiktoken_would_follow_otherwise_is_left_to_the_reference():
    merges = [('b', 'c'), ('a', 'b'), ('ab', 'c')]  # 'abc' is a token, but 'a' and 'bc' are not a listed pair
    spellings = [*BYTE_ALPHABET, 'bc', 'ab', 'abc']
    vocabulary = ByteLevelBPE({s: i for i, s in enumerate(spellings)}, merges, {}, {})
    assert vocabulary._tiktoken is None
    assert vocabulary.encode('abc abd') == [ord('a'), 256, ord(' '), 257, ord('d')]
    reordered = {s: i for i, s in enumerate([*BYTE_ALPHABET, 'ab', 'bc'])}
    vocabulary = ByteLevelBPE(reordered, [('b', 'c'), ('a', 'b')], {}, {})
    assert vocabulary._tiktoken is None
    assert vocabulary.encode('abc') == [ord('a'), 257]


def test_ids_are_special_tokens_then_bytes_then_merges_by_rank(trained):
    vocabulary = trained['byte_level_bpe']
    table = vocabulary.token_bytes()
    assert table[5:261] == [bytes([byte]) for byte in range(256)]
    assert len(vocabulary.merges) == vocabulary.size - 261 == 339
    assert vocabulary.token_ids[''.join(vocabulary.merges[0])] == 261
    assert table[261] == b'  '  # what program text has most of


TRAIN = """
import sys
from llm.data.sources import StandardLibrary, read_documents
from llm.data.vocabularies import VocabularyConfig, train_vocabulary
documents = list(read_documents(StandardLibrary(), 'validation'))[:: int(sys.argv[1])]
print(train_vocabulary(VocabularyConfig('byte_level_bpe', 1000, sample_bytes=300_000), documents).digest)
"""


def test_training_is_the_same_in_any_number_of_threads_and_any_order():
    digests = set()
    for threads, order in ((1, 1), (2, 1), (4, -1)):
        environment = {**os.environ, 'RAYON_NUM_THREADS': str(threads), 'TOKENIZERS_PARALLELISM': 'true'}
        command = [sys.executable, '-c', TRAIN, str(order)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.add(run.stdout)
    assert len(digests) == 1


def test_too_little_text_and_too_small_a_size_are_errors():
    with pytest.raises(UserError, match=r'the texts give \d+ tokens, not 600'):
        train_vocabulary(config('byte_level_bpe'), ['the cat the cat'])
    with pytest.raises(UserError, match=r'cannot have 200 tokens\. Its size is at least 261'):
        train_vocabulary(config('byte_level_bpe', size=200), ['the cat'])


def test_saved_files_are_those_of_gpt2(gpt2, dev_data, tmp_path):
    import json

    gpt2.save(tmp_path / 'saved')
    original = dev_data / 'tokenizers' / 'gpt2'
    assert (tmp_path / 'saved' / 'vocab.bpe').read_bytes() == (original / 'vocab.bpe').read_bytes()
    encoder = json.loads((tmp_path / 'saved' / 'encoder.json').read_bytes())
    assert encoder == json.loads((original / 'encoder.json').read_bytes())
    assert load_vocabulary(tmp_path / 'saved') == gpt2
    (tmp_path / 'saved' / 'vocabulary.json').unlink()
    (tmp_path / 'saved' / 'encoder.json').rename(tmp_path / 'saved' / 'vocab.json')
    (tmp_path / 'saved' / 'vocab.bpe').rename(tmp_path / 'saved' / 'merges.txt')  # the names at Hugging Face
    assert load_vocabulary(tmp_path / 'saved') == gpt2


def test_a_vocabulary_without_special_tokens_has_none():
    bare = SpecialTokens(pad=None, eos=None, bos=None)
    vocabulary = train_vocabulary(config('byte_level_bpe', size=258, special_tokens=bare), ['abababab cdcdcd'])
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id) == (0, None, None)
    assert vocabulary.token_bytes()[256:] == [b'ab', b'cd']
