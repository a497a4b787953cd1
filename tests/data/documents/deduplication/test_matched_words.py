import itertools
import random

import numpy as np
import pytest

from llm.data.documents.deduplication.decontamination import Decontamination, EvaluationSet, Items
from llm.data.documents.deduplication.matched_words import MatchedWords, matched
from llm.errors import UserError

NONE = np.zeros(0, np.uint64)


def by_definition(document, item, rule):
    """Every run at every place, of every length."""
    found = set()
    for i, j in itertools.product(range(len(item)), range(len(document))):
        for length in range(rule.words, min(len(item) - i, len(document) - j) + 1):
            same = [item[i + k] == document[j + k] for k in range(length)]
            head = all(same[: rule.exact]) if rule.differing else True
            if head and same[-1] and same.count(False) <= rule.differing:
                found |= {i + k for k in range(length) if same[k]}
    return [i in found for i in range(len(item))]


@pytest.mark.parametrize(
    'rule', [MatchedWords(5, 2, 3), MatchedWords(4, 0, 2), MatchedWords(3, 1, 3), MatchedWords(6, 3, 1)]
)
def test_matches_are_those_of_the_definition(rule):
    matched_some = 0
    for seed in range(150):
        draw = random.Random(seed)
        document = np.array(draw.choices(range(draw.choice((2, 3, 6))), k=draw.randint(0, 24)), np.uint64)
        item = np.array(draw.choices(range(4), k=draw.randint(rule.words, 16)), np.uint64)
        if seed % 3 == 0 and len(document) > 12:  # an item that was copied, with mistakes
            item = document[2:12].copy()
            item[draw.randrange(10)] = 9
        runs, found = matched(document, item, rule)
        assert found.tolist() == by_definition(document.tolist(), item.tolist(), rule), seed
        assert all(length >= rule.words for length in runs.values()) and bool(runs) == found.any()
        matched_some += 0 < found.sum() < len(item)
    assert matched_some > 10


def test_as_llama_2_calls_an_item_dirty(tmp_path):
    words = [f'word{i}' for i in range(30)]
    (tmp_path / 'quiz.jsonl').write_text(f'{{"question": "{" ".join(words)}"}}')
    items = Items(Decontamination((EvaluationSet(str(tmp_path / 'quiz.jsonl')),), (MatchedWords(),)))

    def judge(changed, count=30):
        text = ' '.join('other' if i in changed else word for i, word in enumerate(words[:count]))
        assert items.suspects([text, 'nothing'], items._words).tolist() in ([0], [])
        return items.judge(f'before {text} after', NONE)

    (hit,) = judge({12, 15, 20, 25}).hits  # four differ, in one run
    assert hit.text.split()[0] == 'word0' and hit.text.split()[-1] == 'word29' and hit.value == 26 / 30
    assert judge({12, 15, 20, 25}).removed_for == 'quiz:1'
    assert not judge({12, 14, 16, 18, 20}).hits  # with the fifth the run ends: 16 words of 30
    assert judge(set(), 24).hits[0].value == 24 / 30 and not judge(set(), 23).hits
    assert not judge({5, 14, 23}).hits  # no ten words in a row
    # Two runs, each exact, with words between them that are not the item's.
    both = items.judge(' '.join([*words[:15], 'x', *words[15:]]), NONE)
    assert [(hit.text.split()[0], hit.value) for hit in both.hits] == [('word0', 1.0), ('word15', 1.0)]
    llama_3 = MatchedWords(words=8, differing=0, share=0.5, exact=8)
    strict = Items(Decontamination((EvaluationSet(str(tmp_path / 'quiz.jsonl')),), (llama_3,)))
    assert strict.judge(' '.join(words[:15]), NONE).removed_for == 'quiz:1'
    assert not strict.judge(' '.join([*words[:7], 'x', *words[8:15], 'x', *words[16:23]]), NONE).hits
    with pytest.raises(UserError, match='MatchedWords: exact must be'):
        MatchedWords(words=5)
