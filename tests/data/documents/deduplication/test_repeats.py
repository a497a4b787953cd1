import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.documents.deduplication.repeats import (
    Repeats,
    lines,
    pieces,
    repeated,
    spans_of,
    united,
    windows,
    without,
)
from llm.data.documents.deduplication.words import word_spans, words_of
from llm.errors import UserError


def cut(texts, unit, length, occurrences=2, keep_first=True):
    """Texts without what is repeated in them."""
    if unit == 'passages':
        units = windows(words_of(texts), length)
    else:
        units = lines(unit, texts, words_of([text[a:b] for text in texts for a, b in pieces(unit, text)]), length)
    order = np.argsort(units.keys)
    nodes, indexes = np.repeat(np.arange(len(texts)), units.counts)[order], units.indexes[order]
    keys, second = units.keys[order], units.checks[order]
    goes = repeated(keys, second, nodes, indexes, occurrences=occurrences, keep_first=keep_first)
    return [
        without(text, spans_of(unit, text, word_spans([text])[0], indexes[goes][nodes[goes] == i].tolist(), length))
        for i, text in enumerate(texts)
    ]


def covered_by_suffixes(documents, length):
    """As Lee et al. find them: of all suffixes sorted, common prefixes of neighbours, where they are long enough."""
    suffixes = sorted(
        (tuple(document[i:]), number, i) for number, document in enumerate(documents) for i in range(len(document))
    )
    covered = [set() for _ in documents]
    for (one, n, i), (other, m, j) in itertools.pairwise(suffixes):
        common = next(
            (k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        if common >= length:
            covered[n] |= set(range(i, i + common))
            covered[m] |= set(range(j, j + common))
    return covered


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from('abc'), max_size=16), min_size=1, max_size=4), st.integers(2, 6))
def test_windows_cover_what_repeated_substrings_cover(documents, length):
    texts = [' '.join(document) for document in documents]
    left = cut(texts, 'passages', length, keep_first=False)
    covered = covered_by_suffixes(documents, length)
    assert [text.split() for text in left] == [
        [word for i, word in enumerate(document) if i not in gone]
        for document, gone in zip(documents, covered, strict=True)
    ]


def test_a_passage_stays_in_the_first_document_and_goes_from_others():
    passage = 'It was the best of times, it was the worst of times'
    texts = [f'One. {passage}.\nEnd', f'Two {passage.upper()}! Three', passage.replace(',', ' -'), 'the worst of times']
    assert cut(texts, 'passages', 5) == [texts[0], 'Two Three', '', texts[3]]
    assert cut(texts, 'passages', 5, occurrences=4) == texts
    assert cut([f'{passage} {passage} end'], 'passages', 12) == [f'{passage} end']


@pytest.mark.parametrize(
    ('unit', 'texts', 'left'),
    [
        (
            'lines',
            ['Home | About us\nfirst\nHome, about us', 'home about US\n\nsecond\n'],
            ['Home | About us\nfirst', 'second'],
        ),
        (
            'paragraphs',
            ['Cookies are\ngood.\n\nOne', 'Two\n \n cookies are good'],
            ['Cookies are\ngood.\n\nOne', 'Two'],
        ),
        ('paragraphs', ['Cookies\nare good', 'good\n\nare cookies'], ['Cookies\nare good', 'good\n\nare cookies']),
    ],
)
def test_lines_and_paragraphs(unit, texts, left):
    assert cut(texts, unit, 2) == left


def test_what_is_left_has_no_gaps():
    assert without('a bb  c', [(2, 4)]) == 'a c'
    assert without('one\ntwo\nthree', [(4, 8)]) == 'one\nthree'
    assert without('abc', [(0, 3)]) == ''
    assert without('one two three', [(2, 9)]) == 'on hree'  # no word is made of two


def test_of_chinese_the_passage_alone_goes():
    """Without spaces in it, the whole paragraph went."""
    passage, before, after = '天地玄黃宇宙洪荒', '日月盈昃', '辰宿列張'
    assert cut([f'{passage}。', f'{before}{passage}{after}'], 'passages', 8) == [f'{passage}。', f'{before} {after}']
    assert united([(4, 6), (0, 2), (2, 3), (5, 9)]) == [(0, 3), (4, 9)]
    with pytest.raises(UserError):
        Repeats(occurrences=1)
