"""Personal data in generated texts, among numbers that look like it."""

import random
import string

import pytest

from llm.data.documents.document import Document
from llm.data.documents.privacy import KINDS, PersonalData
from llm.errors import UserError

WORDS = ('report', 'of', 'last', 'week', 'shows', 'that', 'we', 'met', 'at', 'noon', 'and', 'wrote', 'about', 'it')


def with_luhn(draw, prefix, length):
    digits = prefix + ''.join(draw.choice(string.digits) for _ in range(length - len(prefix) - 1))
    total = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(reversed(digits)))
    return digits + str(-total % 10)


def iban(draw, country, account):
    account = ''.join(draw.choice(string.digits) if c == 'n' else draw.choice(string.ascii_uppercase) for c in account)
    number = int(''.join(str(int(c, 36)) for c in f'{account}{country}00'))
    return f'{country}{98 - number % 97:02}{account}'


def grouped(text, size=4, by=' '):
    return by.join(text[i : i + size] for i in range(0, len(text), size))


def letters(draw, alphabet, count):
    return ''.join(draw.choice(alphabet) for _ in range(count))


def positive(draw, kind):
    """One span of a kind, in one of the ways that people write it."""
    alphanumeric = string.ascii_letters + string.digits

    def digit(count):
        return letters(draw, string.digits, count)

    if kind == 'email':
        name = draw.choice(['jane.doe', 'j_doe+list', 'info', "o'neil", 'x1', 'Max.Mustermann-42'])
        return f'{name}@{draw.choice(["example.org", "mail.example.co.uk", "uni-bonn.de", "a.museum"])}'
    if kind == 'phone':
        exchange, last = draw.choice('23456789') + letters(draw, '023456789', 2), digit(4)
        area = draw.choice(['212', '415', '617', '503', '312'])
        return draw.choice([
            f'({area}) {exchange}-{last}', f'{area}-{exchange}-{last}', f'+1 {area} {exchange} {last}',
            f'+1-{area}-{exchange}-{last}', f'{area}.{exchange}.{last}', f'+44 20 7{digit(3)} {digit(4)}',
            f'020 7{digit(3)} {digit(4)}', f'+49 30 {draw.choice("23456789")}{digit(6)}',
            f'+33 1 4{digit(1)} {digit(2)} {digit(2)} {digit(2)}', f'0044 20 7{digit(3)} {digit(4)}',
        ])  # fmt: skip
    if kind == 'ip':
        octets = (draw.choice([8, 23, 52, 81, 134, 185, 213]), *(draw.randint(1, 254) for _ in range(3)))
        groups = [f'{draw.randrange(1, 1 << 16):x}' for _ in range(6)]
        return draw.choice(['.'.join(map(str, octets)), f'2a00:1450:{":".join(groups)}', f'2001:4860::{groups[0]}'])
    if kind == 'card':
        number = with_luhn(
            draw, *draw.choice([('4', 16), ('51', 16), ('55', 16), ('6011', 16), ('37', 15), ('36', 14)])
        )
        if len(number) == 16:
            return draw.choice([number, grouped(number), grouped(number, by='-')])
        return number
    if kind == 'iban':
        number = iban(draw, *draw.choice([('DE', 'n' * 18), ('GB', 'aaaa' + 'n' * 14), ('NL', 'aaaa' + 'n' * 10)]))
        return draw.choice([number, grouped(number)])
    return draw.choice([
        'AKIA' + letters(draw, string.ascii_uppercase + '234567', 16), 'ghp_' + letters(draw, alphanumeric, 36),
        'AIza' + letters(draw, alphanumeric, 35), 'sk-proj-' + letters(draw, alphanumeric, 40),
        'hf_' + letters(draw, string.ascii_letters, 34), 'xoxb-123456789012-' + letters(draw, alphanumeric, 24),
        f'-----BEGIN RSA PRIVATE KEY-----\n{letters(draw, alphanumeric, 64)}\n-----END RSA PRIVATE KEY-----',
    ])  # fmt: skip


def negative(draw):
    """What looks like a span and is none: versions, dates, hashes, part numbers, amounts."""

    def digit(count):
        return letters(draw, string.digits, count)

    octets = '.'.join(str(draw.randint(0, 255)) for _ in range(4))
    number = with_luhn(draw, '4', 16)
    wrong = number[:-1] + str((int(number[-1]) + 1) % 10)
    hexadecimal = letters(draw, '0123456789abcdef', 64)
    day, month = draw.randint(10, 28), f'0{draw.randint(1, 9)}'
    return draw.choice([
        f'version {octets}', f'v{octets}', f'Chrome/{octets}', f'release {octets}', f'1.{octets}',
        '10.0.0.12', '192.168.1.7', f'20{digit(2)}-{month}-{day}', f'{day}.{month}.20{digit(2)}',
        f'20{digit(2)}-11-03 14:{day}:07', f'1{digit(2)},{digit(3)},{digit(3)}', f'${digit(3)}.{digit(2)}',
        hexadecimal[:40], hexadecimal[:32], f'sha256:{hexadecimal}', f'PN-{digit(4)}-{digit(6)}',
        f'{letters(draw, string.ascii_uppercase, 2)}-{digit(3)}-{digit(4)}', f'SKU {digit(8)}', wrong,
        f'order {digit(10)}', f'ISBN 978-{digit(1)}-{digit(3)}-{digit(5)}-{digit(1)}', f'pages {digit(3)}-{digit(3)}',
        'user@localhost', '@handle', 'a@b', '3:45:12', f'{digit(2)}:{digit(2)}:{digit(2)}:ab:cd:ef',
        f'1990-{digit(4)}', f'DE{digit(2)} {digit(4)} street', 'std::vector', f'{digit(5)}-{digit(4)}',
        f'3.14159{digit(8)}', 'token: your_token_goes_here',
    ])  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_precision_and_recall(kind):
    draw = random.Random(f'{kind} 0')
    right = wrong = missed = 0
    for _ in range(400):
        spans, text = [], ''
        for _ in range(3):
            text += ' '.join(draw.choices(WORDS, k=draw.randint(2, 5))) + ' '
            if draw.random() < 0.5:
                span = positive(draw, kind)
                spans.append((len(text), len(text) + len(span), kind))
            else:
                span = negative(draw)
            text += span + draw.choice(['. ', ', ', ' ', '\n'])
        found = PersonalData().find(text)
        right += len(set(found) & set(spans))
        wrong += len(set(found) - set(spans))
        missed += len(set(spans) - set(found))
    assert right / (right + wrong) >= 0.95
    assert right / (right + missed) >= 0.95


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
