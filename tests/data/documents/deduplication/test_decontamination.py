import json

import numpy as np
import pytest

from llm.data.documents.deduplication.decontamination import (
    CommonNgrams,
    Decontamination,
    EvaluationSet,
    FuzzyMatch,
    Items,
    NgramShare,
    cut_windows,
)
from llm.data.documents.deduplication.words import words_of
from llm.errors import UserError

QUESTION = 'Which of these four planets of the solar system has the largest number of known moons today?'
SHORT = 'Name the capital city of the old kingdom'
NONE = np.zeros(0, np.uint64)


@pytest.fixture
def sets(tmp_path):
    path = tmp_path / 'quiz.jsonl'
    lines = [
        {'question': QUESTION, 'choices': {'text': ['Saturn', 'Mars'], 'n': 2}},
        {'question': SHORT},
        {'question': 'Why?'},
    ]
    path.write_text('\n'.join(map(json.dumps, lines)) + '\n\n')
    return (EvaluationSet(str(path)),)


def test_items_are_strings_of_fields(sets, tmp_path):
    assert next(sets[0].items()) == ('quiz:1', f'{QUESTION}\nSaturn\nMars')
    assert [name for name, _ in EvaluationSet(sets[0].files, 'q', ('question',)).items()] == ['q:1', 'q:2', 'q:3']
    with pytest.raises(UserError, match=r'quiz.jsonl:2: is no JSON object with a field choices'):
        list(EvaluationSet(sets[0].files, fields=('choices',)).items())
    (tmp_path / 'bad.jsonl').write_text('[1]\n')
    with pytest.raises(UserError, match='bad.jsonl:1'):
        list(EvaluationSet(str(tmp_path / 'bad.jsonl')).items())
    (tmp_path / 'bad.jsonl').write_text('')
    with pytest.raises(UserError, match=r'bad.jsonl: an evaluation set has no items'):
        Items(Decontamination((*sets, EvaluationSet(str(tmp_path / 'bad.jsonl')))))


def test_common_ngrams_of_13_words_as_gpt3_takes_them_out(sets):
    """A 13-gram and 200 characters on both sides; pieces of less than 200 characters are left out as well."""
    items = Items(Decontamination(sets))
    before, after = 'x ' * 300, ' y' * 300
    text = f'{before}{QUESTION.upper()} saturn{after}'
    words = words_of([text, 'nothing', QUESTION[:60]])
    assert items.suspects([text], words).tolist() == [0]
    found = items.judge(text, NONE)
    assert found.removed_for is None
    # 17 words of question and one choice hold six n-grams of 13; the second choice is not there.
    assert [hit.text.split()[0] for hit in found.hits] == ['WHICH', 'OF', 'THESE', 'FOUR', 'PLANETS', 'OF']
    assert {(hit.item, hit.rule, hit.value) for hit in found.hits} == {('quiz:1', 'common_ngrams', 1.0)}
    assert all(text[hit.start :].startswith(hit.text) for hit in found.hits)
    assert found.cuts == ((600 - 200, 600 + len(QUESTION) + len(' saturn') + 200),)
    # A shorter item is looked for as a whole, one of fewer than eight words not at all.
    assert [hit.item for hit in items.judge(f'Say: {SHORT}. Why?', NONE).hits] == ['quiz:2']
    assert not items.judge('Name the capital city of the new kingdom. Why?', NONE).hits
    hashes, documents = items.common(words_of([text, SHORT, text]))
    assert documents.tolist().count(0) == 6 and documents.tolist().count(1) == 1 and len(hashes) == 13
    ignored = np.unique(hashes[documents == 0])
    assert not items.judge(text, ignored).hits
    whole = Items(Decontamination(sets, (CommonNgrams(whole_documents=True),))).judge(text, NONE)
    assert whole.removed_for == 'quiz:1' and whole.cuts == ()


def test_documents_of_which_little_or_many_pieces_are_left_go():
    rule = CommonNgrams(window=10, least_piece=50, most_pieces=3)
    assert cut_windows('x' * 1000, [(100, 110), (500, 520)], rule) == ([(90, 120), (490, 530)], False)
    assert cut_windows('x' * 1000, [(60, 110), (160, 170)], rule) == ([(50, 180)], False)
    assert cut_windows('x' * 1000, [(100, 110), (300, 310), (500, 510)], rule)[1]
    assert cut_windows('x' * 70, [(30, 40)], rule) == ([(0, 70)], True)
    assert cut_windows('x', [], rule) == ([], False)


def test_shares_of_ngrams_and_fuzzy_matches(sets):
    share = Items(Decontamination(sets, (NgramShare(share=0.7),)))
    words = QUESTION.split()
    # The first item has 19 words, so twelve 8-grams: nine of them are 75 %, eight are 67 %.
    enough, little = ' '.join(words[:16]), ' '.join(words[:15])
    found = share.judge(f'So: {enough}', NONE)
    assert found.removed_for == 'quiz:1' and {hit.value for hit in found.hits} == {9 / 12} and len(found.hits) == 9
    assert not share.judge(f'So: {little}', NONE).hits
    fuzzy = Items(Decontamination(sets, (FuzzyMatch(threshold=0.5),)))
    edited = QUESTION.replace('today', 'now') + ' Saturn or Mars'
    text = 'Some other paragraph of a page that has nothing to do with it.\n\n' + edited
    assert fuzzy.suspects([text, 'a b c'], words_of([text, 'a b c'])).tolist() == [0]
    (hit,) = fuzzy.judge(text, NONE).hits
    assert (hit.item, hit.start) == ('quiz:1', text.index(edited)) and hit.value == 14 / (17 + 18 - 14)
    with pytest.raises(UserError):
        Decontamination(sets, (NgramShare(), NgramShare(share=0.5)))
