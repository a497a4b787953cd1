"""Rows of pairs, for embeddings."""

import numpy as np
import pytest

from llm.data.labelled import LabelledExample, LabelledFiles, PairRows, read_labelled
from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError

BYTES = ByteVocabulary()


def _rows(*examples, length=8):
    return PairRows(
        [LabelledExample(texts, label, f'file:{i}') for i, (texts, label) in enumerate(examples)], BYTES, length
    )


def test_each_side_has_its_arrays_and_a_text_alone_is_paired_with_itself():
    rows = _rows((('ab', 'c', 'defghijk'), ''), (('x', 'y', 'z'), ''))
    batch = rows.rows([0, 2])  # the second is padding
    start = BYTES.eos_id if BYTES.bos_id is None else BYTES.bos_id
    for side, text in (('', 'ab'), ('positive_', 'c'), ('negative_', 'defghi')):
        tokens = [start, *BYTES.encode(text), BYTES.eos_id]
        np.testing.assert_array_equal(batch[f'{side}inputs'][0, : len(tokens)], tokens)
        np.testing.assert_array_equal(
            batch[f'{side}segment_ids'], [[1] * len(tokens) + [0] * (8 - len(tokens)), [0] * 8]
        )
        np.testing.assert_array_equal(batch[f'{side}positions'][0, : len(tokens)], np.arange(len(tokens)))
    np.testing.assert_array_equal(batch['loss_weights'].sum(1), [1, 0])
    assert (rows.cut, rows.scores) == (1, None)
    alone = _rows((('ab',), '')).rows([0])
    np.testing.assert_array_equal(alone['inputs'], alone['positive_inputs'])
    assert 'negative_inputs' not in alone
    np.testing.assert_array_equal(_rows((('a', 'b'), '2.5'), (('a', 'c'), '0')).scores, [2.5, 0])


@pytest.mark.parametrize(
    ('examples', 'message'),
    [
        ([(('a', ' '), '')], 'file:0: a text of a pair is empty'),
        ([(('a', 'b'), '1'), (('a', 'b'), 'high')], "file:1: the label 'high' is not a number"),
        ([(('a', 'b'), '1'), (('a', 'b'), 'nan')], "file:1: the label 'nan' is not a number"),
        ([(('a', 'b'), '1'), (('a', 'b'), '')], "file:1: the label '' is not a number"),
    ],
)
def test_what_is_wrong_is_named(examples, message):
    with pytest.raises(UserError, match=message):
        _rows(*examples)


def test_templates_of_pairs_and_negatives(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"q": "x", "p": "y", "n": "z", "score": null}\n')
    (example,) = read_labelled(LabelledFiles(str(path), '{q}', '{p}', None, '{n}'), 'embedding')
    assert (example.texts, example.label) == (('x', 'y', 'z'), '')
    for config, task, message in (
        (LabelledFiles(str(path), '{q}', '{p}', '{score}'), 'embedding', 'score is neither text nor a number'),
        (LabelledFiles(str(path), '{q}', None, None, '{n}'), 'embedding', 'a negative is for an embedding of pairs'),
        (LabelledFiles(str(path), '{q}', '{p}', '{p}', '{n}'), 'regression', 'a negative is for an embedding of pairs'),
        (LabelledFiles(str(path), '{q}', '{p}', None), 'classification', 'classification needs labels'),
    ):
        with pytest.raises(UserError, match=message):
            read_labelled(config, task)
