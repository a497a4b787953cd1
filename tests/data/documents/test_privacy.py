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


@pytest.mark.parametrize(
    ('text', 'found'),
    [
        ('联系邮箱abc@example.com谢谢', ['abc@example.com']),
        ('an müller@example.de, info@bücher.example', ['müller@example.de', 'info@bücher.example']),
        ('me@example.com_ or me@example.com-', ['me@example.com'] * 2),
        ('卡号4111111111111111，电话+8613800138000。', ['4111111111111111', '+8613800138000']),
        ('Bob,4111111111111111,12/25,123', ['4111111111111111']),
        ('密钥AKIAIOSFODNN7EXAMPLE。', ['AKIAIOSFODNN7EXAMPLE']),
        ('http://8.8.8.8/x and Chrome/8.8.8.8', ['8.8.8.8']),
        ('::ffff:8.8.8.8, ::ffff:10.0.0.1', ['::ffff:8.8.8.8']),
        ('std::a::b, dead::beef and ab::cd', []),
        ('الإصدار ١.٢.٣.٤ و ８.８.８.８', []),
        ('12,4111111111111111 and 0.4111111111111111', []),
    ],
)
def test_spans_beside_other_scripts_and_in_other_forms(text, found):
    assert [text[start:stop] for start, stop, _ in PersonalData().find(text)] == found


@pytest.mark.parametrize('kind', ['RSA PRIVATE KEY', 'OPENSSH PRIVATE KEY', 'PGP PRIVATE KEY BLOCK'])
def test_a_long_private_key_is_masked_as_a_whole(kind):
    text = f'key:\n-----BEGIN {kind}-----\n' + 'Abc9/+\n' * 2000 + f'-----END {kind}-----\nend'
    (document,) = PersonalData()([Document('a', text, 's')])
    assert document.text == 'key:\n<SECRET>\nend'


def test_local_addresses_on_request():
    text = 'fe80::1 fd12:3456::1 ::1 192.168.0.1 ::ffff:10.0.0.1 a::b'
    assert not PersonalData().find(text)
    found = PersonalData(private_hosts=True).find(text)
    assert [text[start:stop] for start, stop, _ in found] == text.split()[:-1]


def test_a_text_of_nothing_else_takes_linear_time():
    """Each span was compared with all others: a log of addresses took hours."""
    text = '8.8.4.4 jane@example.org ' * 20_000
    assert len(PersonalData().find(text)) == 40_000
