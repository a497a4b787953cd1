"""Saved vocabularies: the same when loaded, and named when damaged."""

import json
import shutil

import pytest

from llm.data.vocabularies import ByteVocabulary, SpecialTokens, load_vocabulary
from llm.errors import UserError


def test_a_saved_vocabulary_is_the_same_when_loaded(vocabulary, documents, tmp_path):
    vocabulary.save(tmp_path / 'a' / 'b')
    loaded = load_vocabulary(tmp_path / 'a' / 'b')
    assert loaded == vocabulary
    assert type(loaded) is type(vocabulary)
    assert loaded.special_ids == vocabulary.special_ids
    assert (loaded.pad_id, loaded.eos_id, loaded.bos_id) == (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id)
    assert loaded.encode(documents[0]) == vocabulary.encode(documents[0])
    assert sorted(path.suffix for path in (tmp_path / 'a' / 'b').iterdir()).count('.partial') == 0


def test_saving_again_is_fine_and_saving_another_is_not(tmp_path):
    ByteVocabulary().save(tmp_path)
    ByteVocabulary().save(tmp_path)
    with pytest.raises(UserError, match='holds another vocabulary already'):
        ByteVocabulary(SpecialTokens(bos=None)).save(tmp_path)
    assert load_vocabulary(tmp_path) == ByteVocabulary()


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot write a vocabulary'):
        ByteVocabulary().save(tmp_path / 'file' / 'below')


def test_every_flipped_or_cut_file_is_named(vocabulary, tmp_path):
    vocabulary.save(tmp_path / 'good')
    for path in sorted((tmp_path / 'good').iterdir()):
        content = path.read_bytes()
        for damage in (
            content[:-2],
            content[: len(content) // 2],
            b'',
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :],
        ):
            shutil.rmtree(tmp_path / 'bad', ignore_errors=True)
            shutil.copytree(tmp_path / 'good', tmp_path / 'bad')
            (tmp_path / 'bad' / path.name).write_bytes(damage)
            try:
                loaded = load_vocabulary(tmp_path / 'bad')
            except UserError as error:
                assert str(tmp_path / 'bad') in str(error)
                if path.name != 'vocabulary.json':
                    assert path.name in str(error)
            else:
                assert loaded == vocabulary  # the damage changed no meaning
                assert path.name == 'vocabulary.json'


def test_a_missing_file_is_named(trained, tmp_path):
    for kind, name in (('byte_level_bpe', 'encoder.json'), ('byte_level_bpe', 'vocab.bpe')):
        trained[kind].save(tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(UserError, match=rf'{name}/{name}: cannot be read'):
            load_vocabulary(tmp_path / name)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'format': 2}, 'has format 2, not 1'),
        ({'kind': 'hieroglyphs'}, "kind 'hieroglyphs' is not one of bytes, byte_level_bpe, sentencepiece"),
        ({'digest': '0' * 64}, 'their digest is another'),
        ({'roles': {'pad': '<other>', 'eos': None, 'bos': None}}, 'digest is another'),
        ({'roles': None}, 'does not describe a vocabulary'),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(tmp_path, change, message):
    ByteVocabulary().save(tmp_path)
    path = tmp_path / 'vocabulary.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_vocabulary(tmp_path)


def test_files_of_two_vocabularies_do_not_mix(trained, tmp_path):
    trained['sentencepiece_bpe'].save(tmp_path / 'one')
    trained['sentencepiece_unigram'].save(tmp_path / 'other')
    shutil.copy(tmp_path / 'other' / 'sentencepiece.model', tmp_path / 'one')
    with pytest.raises(
        UserError, match=r'sentencepiece\.model: is not the file that vocabulary\.json was written with'
    ):
        load_vocabulary(tmp_path / 'one')


def test_a_run_directory_stands_for_its_vocabulary(tmp_path):
    ByteVocabulary().save(tmp_path / 'vocabulary')
    assert load_vocabulary(tmp_path) == ByteVocabulary()


def test_a_place_without_a_vocabulary_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / 'nowhere'):
        with pytest.raises(UserError, match='no vocabulary is here'):
            load_vocabulary(path)


GOOD_MERGES = '#version: 0.2\na b\nab c\n'


@pytest.mark.parametrize(
    ('encoder', 'merges', 'message'),
    [
        ('{', GOOD_MERGES, r'encoder\.json: is not JSON'),
        ('[]', GOOD_MERGES, r'encoder\.json: is not an object of ids by token'),
        ({'a': '0'}, GOOD_MERGES, r'encoder\.json: is not an object of ids by token'),
        ({'a': 0}, GOOD_MERGES, 'byte 0 has no token: this is not a byte-level vocabulary'),
        ({}, 'a b\nabc\n', r'vocab\.bpe: line 2 is not two tokens'),
        ({}, GOOD_MERGES, r"the merge of 'ab' and 'c' needs 'abc', which has no id"),
        ({'abc': 300}, GOOD_MERGES, r'the ids of 258 tokens are not 0 to 257, each once'),
    ],
)
def test_gpt2_files_that_do_not_fit_are_errors(tmp_path, encoder, merges, message):
    from llm.data.vocabularies.byte_alphabet import BYTE_ALPHABET

    if isinstance(encoder, dict) and 'a' not in encoder:
        encoder = json.dumps({**{s: i for i, s in enumerate([*BYTE_ALPHABET, 'ab'])}, **encoder})
    (tmp_path / 'encoder.json').write_text(encoder if isinstance(encoder, str) else json.dumps(encoder))
    (tmp_path / 'vocab.bpe').write_text(merges)
    with pytest.raises(UserError, match=message):
        load_vocabulary(tmp_path)
