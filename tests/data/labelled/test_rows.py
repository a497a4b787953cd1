"""Rows of labelled examples: where answers are read, what is cut, and what padding is."""

import numpy as np
import pytest

from llm.data.labelled import LabelledExample, LabelledRows
from llm.data.vocabularies import VocabularyConfig
from llm.data.vocabularies.training import train_on_sample
from llm.errors import UserError

BYTES = train_on_sample(VocabularyConfig(kind='bytes'), [])


def _rows(task, *examples, length=12, labels=(), **settings):
    made = [LabelledExample(texts, label, f'file:{i}') for i, (texts, label) in enumerate(examples)]
    return LabelledRows(made, BYTES, task, length, labels, **settings)


def _ids(text):
    return BYTES.encode(text)


def _start():
    return BYTES.eos_id if BYTES.bos_id is None else BYTES.bos_id


def _end():
    return BYTES.bos_id if BYTES.eos_id is None else BYTES.eos_id


@pytest.mark.parametrize(('read_at', 'position'), [('last', 7), ('first', 0)])
def test_a_class_is_read_at_one_token(read_at, position):
    row = _rows('classification', (('ab', 'cde'), 'y'), labels=('x', 'y'), read_at=read_at).rows([0])
    tokens = [_start(), *_ids('ab'), _end(), *_ids('cde'), _end()]
    np.testing.assert_array_equal(row['inputs'][0, :8], tokens)
    np.testing.assert_array_equal(np.flatnonzero(row['loss_weights'][0]), [position])
    assert row['targets'][0, position] == 1
    np.testing.assert_array_equal(row['segment_ids'][0], [1] * 8 + [0] * 4)
    np.testing.assert_array_equal(row['positions'][0, :8], np.arange(8))


def test_numbers():
    row = _rows('regression', (('ab',), '2.5')).rows([0])
    assert row['targets'].dtype == np.float32
    assert row['targets'][0, 3] == 2.5


@pytest.mark.parametrize(('read_at', 'positions'), [('last', [2, 6]), ('first', [1, 3])])
def test_tags_are_read_at_one_token_of_each_word(read_at, positions):
    row = _rows('tagging', (('ab', 'cde'), ('O', 'B')), labels=('B', 'O'), read_at=read_at).rows([0])
    np.testing.assert_array_equal(np.flatnonzero(row['loss_weights'][0]), positions)
    np.testing.assert_array_equal(row['targets'][0, positions], [1, 0])
    np.testing.assert_array_equal(row['inputs'][0, :8], [_start(), *_ids('ab cde'), _end()])


def test_an_answer_is_predicted_and_its_prompt_is_not():
    row = _rows('generation', (('ab',), 'cd')).rows([0])
    np.testing.assert_array_equal(row['inputs'][0, :5], [_start(), *_ids('abcd')])
    np.testing.assert_array_equal(row['loss_weights'][0], [0, 0, 1, 1, 1] + [0] * 7)
    np.testing.assert_array_equal(row['targets'][0, 2:5], [*_ids('cd'), _end()])


def test_what_is_too_long_is_cut_and_counted():
    pair = _rows('classification', (('abcdefghij', 'xyz'), 'a'), (('a',), 'a'), labels=('a',))
    assert pair.cut == 1
    np.testing.assert_array_equal(
        pair.rows([0])['inputs'][0], [_start(), *_ids('abcdef'), _end(), *_ids('xyz'), _end()]
    )
    answer = _rows('generation', (('abcdefghij',), 'vwxyz'))
    row = answer.rows([0])
    np.testing.assert_array_equal(row['inputs'][0], _ids('defghijvwxyz'))
    np.testing.assert_array_equal(row['targets'][0, 6:], [*_ids('vwxyz'), _end()])
    endless = _rows('generation', (('ab',), 'c' * 40)).rows([0])
    assert endless['loss_weights'].sum() == 12


def test_beyond_the_last_example_is_padding():
    row = _rows('classification', (('ab',), 'a'), labels=('a',)).rows([0, 1, 7])
    assert row['loss_weights'][1:].sum() == 0
    assert row['segment_ids'][1:].sum() == 0


def test_an_unknown_label_is_named():
    with pytest.raises(UserError, match=r"file:0: the label 'z' does not occur.*There is x, y"):
        _rows('classification', (('a',), 'z'), labels=('x', 'y'))
    with pytest.raises(UserError, match="'many' is not a number"):
        _rows('regression', (('a',), 'many'))


def test_equal_digests_are_equal_rows():
    def digest(label, **settings):
        return _rows('classification', (('ab',), label), labels=('x', 'y'), **settings).digest

    assert digest('x') == digest('x')
    assert len({digest('x'), digest('y'), digest('x', length=13), digest('x', read_at='first')}) == 4


def test_an_encoder_reads_the_text_and_a_decoder_the_answer():
    row = _rows('generation', (('ab', 'c'), 'de'), target_length=4).rows([0])
    np.testing.assert_array_equal(row['encoder_inputs'][0, :5], [*_ids('ab'), _end(), *_ids('c'), _end()])
    np.testing.assert_array_equal(row['encoder_segment_ids'][0], [1] * 5 + [0] * 7)
    np.testing.assert_array_equal(row['inputs'][0], [BYTES.pad_id, *_ids('de'), BYTES.pad_id])
    np.testing.assert_array_equal(row['targets'][0], [*_ids('de'), _end(), 0])
    np.testing.assert_array_equal(row['loss_weights'][0], [1, 1, 1, 0])


def test_the_second_text_of_a_pair_has_its_own_type():
    rows = _rows('classification', (('ab', 'cde'), 'y'), (('ab',), 'y'), labels=('y',), token_types=True).rows([0, 1])
    np.testing.assert_array_equal(rows['token_types'], [[0] * 4 + [1] * 4 + [0] * 4, [0] * 12])


@pytest.mark.parametrize('label', ['nan', 'inf', 'high', ''])
def test_numbers_are_finite(label):
    with pytest.raises(UserError, match='is not a number'):
        _rows('regression', (('ab',), label))
