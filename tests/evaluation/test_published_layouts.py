"""The layouts in which sets of multiple choice are published."""

import json

import pytest

from llm.evaluation.multiple_choice import MultipleChoiceSet

LISTED = [{'label': 'A', 'text': 'x'}, {'label': 'B', 'text': 'y'}]


@pytest.mark.parametrize(
    'record',
    [
        {'ctx': 'Q', 'endings': ['x', 'y'], 'label': 1},
        {'ctx': 'Q', 'endings': ['x', 'y'], 'label': '1'},  # on Hugging Face
        {'question': {'stem': 'Q', 'choices': LISTED}, 'answerKey': 'B'},
        {'question_stem': 'Q', 'choices': {'text': ['x', 'y'], 'label': ['A', 'B']}, 'answerKey': 'B'},
        {'question': 'Q', 'choices': {'text': ['x', 'y'], 'label': ['1', '2']}, 'answerKey': '2'},
    ],
)
def test_they_are_read_by_the_default_names(tmp_path, record):
    (tmp_path / 'set.jsonl').write_text(json.dumps(record))
    (item,) = MultipleChoiceSet('set', str(tmp_path / 'set.jsonl')).items()
    assert (item.context, item.choices, item.answer) == ('Q\nAnswer: ', ('x', 'y'), 1)
