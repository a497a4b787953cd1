"""Personal data in generated texts, among numbers that look like it."""

import pytest

from llm.data.documents.document import Document
from llm.data.documents.privacy import KINDS, PersonalData
from llm.errors import UserError
from tests.data.documents.personal_texts import precision_and_recall


@pytest.mark.parametrize('kind', KINDS)
def test_precision_and_recall(kind):
    precision, recall = precision_and_recall(PersonalData().find, kind)
    assert precision >= 0.95 and recall >= 0.95


def test_spans_are_masked_and_counted():
    text = 'Ask jane@example.org or bob@example.org, +1 212 555 2368; card 4111 1111 1111 1111.'
    (document,) = PersonalData()([Document('a', text, 's')])
    assert document.text == 'Ask <EMAIL> or <EMAIL>, <PHONE>; card <CARD>.'
    assert document.metadata == {'personal_data': {'email': 2, 'phone': 1, 'card': 1}}
    assert (document.removed_by, document.verdicts[0].value) == (None, 4)
    kept, removed = (PersonalData(mask=None, most=most)([Document('a', text, 's')])[0] for most in (4, 3))
    assert (kept.removed_by, removed.removed_by, removed.text) == (None, 'personal_data', text)
    with pytest.raises(UserError, match='is no mask'):
        PersonalData(mask='<{name}>')


def test_a_text_of_nothing_else_takes_linear_time():
    """Each span was compared with all others: a log of addresses took hours."""
    text = '8.8.4.4 jane@example.org ' * 20_000
    assert len(PersonalData().find(text)) == 40_000
