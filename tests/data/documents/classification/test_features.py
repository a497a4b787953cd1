"""Hashed n-grams against their definition, text by text, and scaling against scikit-learn's."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.preprocessing import normalize

from llm.data.documents.classification.features import NgramFeatures
from llm.data.documents.deduplication.words import words_of
from llm.errors import UserError

TEXTS = st.lists(st.text(st.sampled_from('ab é.東\n X'), max_size=30), max_size=6)


def expected(features, text):
    """bucket -> value, from the names of n-grams."""
    counts = Counter(bucket for _, bucket in features.strings(text))
    scaled = {
        'count': lambda count: count,
        'log': lambda count: 1 + np.log(count),
        'binary': lambda count: 1.0,
    }[features.term_frequency]
    values = {bucket: scaled(count) for bucket, count in counts.items()}
    norm = {'none': 1, 'mean': sum(values.values()), 'l2': np.sqrt(sum(v * v for v in values.values()))}[features.norm]
    return {bucket: value / norm for bucket, value in sorted(values.items())}


@given(
    TEXTS,
    st.integers(1, 3),
    st.sampled_from([(), (2, 4)]),
    st.sampled_from(['count', 'log', 'binary']),
    st.sampled_from(['l2', 'mean', 'none']),
)
@settings(max_examples=30, deadline=None)
def test_they_are_the_ngrams_of_each_text_alone(texts, words, characters, term_frequency, norm):
    features = NgramFeatures(words, characters, 1 << 10, term_frequency, norm)
    sparse = features(texts)
    assert len(sparse) == len(texts)
    assert (sparse.indices.dtype, sparse.values.dtype, sparse.offsets.dtype) == (np.int32, np.float32, np.int64)
    for i, text in enumerate(texts):
        row = slice(*sparse.offsets[i : i + 2])
        values = expected(features, text)
        assert sparse.indices[row].tolist() == list(values)
        np.testing.assert_allclose(sparse.values[row], list(values.values()), rtol=1e-6)
        assert features([text]).values.tobytes() == sparse.values[row].tobytes()  # no other text changes a bit


def test_names_are_of_words_in_lower_case_and_of_characters_within_words():
    names = [name for name, _ in NgramFeatures(2, (3, 4)).strings('Don’t  STOP: déjà!')]
    assert names[:7] == ['don', 't', 'stop', 'deja', 'don t', 't stop', 'stop deja']
    assert names[7:] == [
        *('~ do~', '~don~', '~on ~', '~ t ~', '~ st~', '~sto~', '~top~', '~op ~', '~ de~', '~dej~', '~eja~', '~ja ~'),
        *('~ don~', '~don ~', '~ sto~', '~stop~', '~top ~', '~ dej~', '~deja~', '~eja ~'),
    ]


def test_words_are_those_of_deduplication_and_characters_have_hashes_of_their_own():
    words = NgramFeatures(1, (), 1 << 26, 'binary', 'none')
    both = NgramFeatures(1, (2, 2), 1 << 26, 'binary', 'none')
    text = 'a b c a longer ab'
    assert len(words([text]).indices) == len(set(words_of([text]).values.tolist())) == 5
    assert len(both([text]).indices) == 5 + len(
        {' a', 'a ', ' b', 'b ', ' c', 'c ', ' l', 'lo', 'on', 'ng', 'ge', 'er'} | {'r ', 'ab'}
    )
    texts = ['one two two', 'three', '']
    ours = NgramFeatures(1, (), 1 << 20, 'count', 'l2')(texts)
    plain = NgramFeatures(1, (), 1 << 20, 'count', 'none')(texts)
    matrix = np.zeros((3, 3), np.float32)
    matrix[0, :2], matrix[1, 2] = plain.values[:2], plain.values[2]
    np.testing.assert_allclose(ours.values, normalize(matrix)[matrix > 0], rtol=1e-6)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'buckets': 1000}, 'no power of two'),
        ({'norm': 'l1'}, 'not known'),
        ({'word_ngrams': 9}, 'not from 0 to 5'),
        ({'character_ngrams': (4, 2)}, 'shortest, longest'),
        ({'word_ngrams': 0}, 'neither'),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        NgramFeatures(**settings)
