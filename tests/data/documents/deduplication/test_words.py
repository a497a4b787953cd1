import itertools
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.documents.deduplication.words import (
    Hashes,
    as_sets,
    checks,
    mixed,
    ngrams,
    normalized,
    word_spans,
    words_of,
)

TEXTS = st.lists(st.text(st.sampled_from('aB é1.,-\n\t\u00a0\u3000東京か\u3099ยิကာ한\u0301ा“'), max_size=40), max_size=6)


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ("It's 1,000.5 o'CLOCK — “Naïve”\u00a0café\n", 'it s 1 000 5 o clock naive cafe'),
        ('東京へ行く abc', '東 京 へ 行 く abc'),
        ('ÅNGSTRÖM\tA\u0301', 'angstrom a'),
        (' .\n ', ''),
        ('', ''),
    ],
)
def test_normal_form(text, words):
    assert normalized([text])[0].as_py().split() == words.split()
    assert words_of([text]).counts.tolist() == [len(words.split())]


@settings(max_examples=20, deadline=None)
@given(TEXTS)
def test_words_of_a_text_do_not_depend_on_its_neighbours_and_lie_where_spans_say(texts):
    together = words_of(texts)
    assert len(together) == len(texts)
    for i, text in enumerate(texts):
        assert together[i].tolist() == words_of([text])[0].tolist()
        spans = word_spans(texts)[i]
        assert len(spans) == len(together[i])
        parts = words_of([text[start:end] for start, end in spans])
        assert all(word in parts[j] for j, word in enumerate(together[i]))


def test_words_of_scripts_without_spaces_have_places_of_their_own():
    assert word_spans(['ab東京, c ยิน']) == [[(0, 2), (2, 3), (3, 4), (6, 7), (8, 10), (10, 11)]]


def test_no_word_depends_on_the_other_words_of_its_text():
    """Of every character that Unicode takes apart: Hangul, Arabic, Cyrillic."""
    characters = [chr(code) for code in range(0x80, sys.maxunicode)]
    words = [f'x{c}y' for c in characters if unicodedata.normalize('NFD', c) != c]
    assert len(words) > 11_172  # syllables of Hangul alone
    alone, beside = words_of(words), words_of([f'{word} café' for word in words])
    for i, word in enumerate(words):
        assert beside[i][:-1].tolist() == alone[i].tolist(), word


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=5), st.integers(1, 7), st.booleans())
def test_ngrams_are_equal_where_their_words_are(documents, n, whole):
    flat = np.array(list(itertools.chain(*documents)), np.uint64)
    words = Hashes(mixed(flat + np.uint64(1)), np.cumsum([0, *map(len, documents)]))
    grams = ngrams(words, n, whole=whole)
    expected = []
    for document, values in zip(documents, (grams[i] for i in range(len(grams))), strict=True):
        tuples = [tuple(document[i : i + n]) for i in range(len(document) - n + 1)]
        if whole and not tuples and document:
            tuples = [tuple(document)]
        assert len(values) == len(tuples)
        expected += tuples
    found = grams.values.tolist()
    assert len(set(zip(expected, found, strict=True))) == len(set(expected)) == len(set(found))
    sets = as_sets(grams)
    assert [sets[i].tolist() for i in range(len(sets))] == [sorted(set(grams[i].tolist())) for i in range(len(grams))]
    if not whole:
        second = checks(words, n)
        assert len(set(zip(expected, second.tolist(), strict=True))) == len(set(expected))
        assert n == 1 or not (second == grams.values >> np.uint64(32)).any()
