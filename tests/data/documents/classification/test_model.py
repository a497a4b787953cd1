"""Classifiers on disk: what is loaded is what was saved, and anything else is refused in one line."""

import dataclasses
import json

import numpy as np
import pytest

from llm.data.documents.classification.features import NgramFeatures
from llm.data.documents.classification.model import LinearClassifier, load
from llm.errors import UserError

TEXTS = ['good words of a book', 'click here to buy', '', '?!']


def classifier(labels=('good', 'bad'), exclusive=True, seed=0):
    features = NgramFeatures(buckets=1 << 12, character_ngrams=(3, 3))
    outputs = 1 if exclusive and len(labels) == 2 else len(labels)
    drawn = np.random.default_rng(seed)
    weights = drawn.normal(0, 3, (features.buckets, outputs)).astype(np.float32)
    return LinearClassifier(features, labels, exclusive, weights, np.float32(drawn.normal(0, 1, outputs)))


@pytest.mark.parametrize('storage', ['float32', 'int8'])
@pytest.mark.parametrize(('labels', 'exclusive'), [('ab', True), ('abc', True), ('abc', False), ('a', False)])
def test_what_is_loaded_is_what_was_saved(tmp_path, labels, exclusive, storage):
    model = classifier(tuple(labels), exclusive).stored(storage)
    model.save(tmp_path, storage)
    loaded = load(str(tmp_path))
    assert (loaded.digest, loaded.labels, loaded.exclusive) == (model.digest, tuple(labels), exclusive)
    probabilities = loaded.probabilities(TEXTS)
    np.testing.assert_array_equal(probabilities, model.probabilities(TEXTS))
    assert np.isnan(probabilities[2:]).all()
    assert ((probabilities[:2] > 0) & (probabilities[:2] < 1)).all()
    if exclusive:
        np.testing.assert_allclose(probabilities[:2].sum(axis=1), 1)
    dense = np.zeros((2, model.features.buckets))
    for row, text in enumerate(TEXTS[:2]):
        sparse = model.features([text])
        dense[row, sparse.indices] = sparse.values
    logits = dense @ model.weights + model.bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) if logits.shape[1] > 1 else None
    if not exclusive or len(labels) == 2:
        expected = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(probabilities[:2, : logits.shape[1]], expected, rtol=1e-6)


def test_eight_bits_move_weights_by_half_a_step_and_round_no_further():
    model = classifier()
    stored = model.stored('int8')
    assert np.abs(stored.weights - model.weights).max() <= np.abs(model.weights).max() / 127 / 2 * (1 + 1e-5)
    assert len(np.unique(stored.weights)) <= 255
    assert stored.stored('int8').digest == stored.digest


def altered(**fields):
    def change(directory):
        path = directory / 'classifier.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def flipped(directory):
    """One bit in the middle of the weights."""
    data = bytearray((directory / 'weights.npz').read_bytes())
    data[len(data) // 2] ^= 4
    (directory / 'weights.npz').write_bytes(data)


def other_weights(directory):
    kept = (directory / 'classifier.json').read_bytes()
    dataclasses.replace(classifier(seed=1)).save(directory, 'float32')
    (directory / 'classifier.json').write_bytes(kept)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda directory: (directory / 'classifier.json').unlink(), 'no classifier.json'),
        (lambda directory: (directory / 'classifier.json').write_text('{'), 'cannot be read'),
        (lambda directory: (directory / 'classifier.json').write_text('[]'), 'format None'),
        (lambda directory: (directory / 'weights.npz').unlink(), 'cannot be read'),
        (lambda directory: (directory / 'weights.npz').write_bytes(b'PK'), 'cannot be read'),
        (flipped, 'cannot be read|digest'),
        (other_weights, 'digest'),
        (altered(format=2), 'format 2; this version reads 1'),
        (altered(tokenisation='0' * 16), 'another way'),
        (altered(labels=['bad', 'good']), 'digest'),
        (altered(labels=['bad']), 'digest'),
        (altered(features={'norm': 'l2'}), 'cannot be read'),
        (altered(digest=7), 'digest'),
    ],
)
def test_what_is_damaged_or_of_another_version_is_refused(tmp_path, damage, message):
    classifier().save(tmp_path, 'float32')
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path))
