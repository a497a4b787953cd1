"""Generated texts with personal data of one kind, among what looks like it and is none; and what was found of it."""

import random
import string
from collections.abc import Callable, Iterable

Span = tuple[int, int, str]

WORDS = ('report', 'of', 'last', 'week', 'shows', 'that', 'we', 'met', 'at', 'noon', 'and', 'wrote', 'about', 'it')


def with_luhn(draw: random.Random, prefix: str, length: int) -> str:
    digits = prefix + ''.join(draw.choice(string.digits) for _ in range(length - len(prefix) - 1))
    total = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(reversed(digits)))
    return digits + str(-total % 10)


def iban(draw: random.Random, country: str, account: str) -> str:
    account = ''.join(draw.choice(string.digits) if c == 'n' else draw.choice(string.ascii_uppercase) for c in account)
    number = int(''.join(str(int(c, 36)) for c in f'{account}{country}00'))
    return f'{country}{98 - number % 97:02}{account}'


def grouped(text: str, size: int = 4, by: str = ' ') -> str:
    return by.join(text[i : i + size] for i in range(0, len(text), size))


def letters(draw: random.Random, alphabet: str, count: int) -> str:
    return ''.join(draw.choice(alphabet) for _ in range(count))


def positive(draw: random.Random, kind: str) -> str:
    """One span of a kind, in one of the ways that people write it."""
    alphanumeric = string.ascii_letters + string.digits

    def digit(count: int) -> str:
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


def negative(draw: random.Random) -> str:
    """What looks like a span and is none: versions, dates, hashes, part numbers, amounts."""

    def digit(count: int) -> str:
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
        f'3.14159{digit(8)}', 'token: your_token_goes_here', 'logo@2x.png', 'react@17.0.2', '1 2 3 4 5 6 7 8 9 10',
        'sk-learn-is-a-library-for-learning-machines', f'IMEI {with_luhn(draw, "49015420323", 15)}', '255.255.255.0',
        f'{hexadecimal[:8]}-{hexadecimal[8:12]}-4{hexadecimal[12:15]}-a{hexadecimal[15:18]}-{hexadecimal[18:30]}',
        f'doi:10.{digit(4)}/{digit(6)}', f'{draw.randint(10, 89)}.{digit(4)}, -{draw.randint(10, 179)}.{digit(4)}',
    ])  # fmt: skip


def text_with_spans(draw: random.Random, kind: str) -> tuple[str, list[Span]]:
    """(a text with three spans, [(start, end, kind)] of those that are personal data)."""
    spans: list[Span] = []
    text = ''
    for _ in range(3):
        text += ' '.join(draw.choices(WORDS, k=draw.randint(2, 5))) + ' '
        if draw.random() < 0.5:
            span = positive(draw, kind)
            spans.append((len(text), len(text) + len(span), kind))
        else:
            span = negative(draw)
        text += span + draw.choice(['. ', ', ', ' ', '\n'])
    return text, spans


def precision_and_recall(
    find: Callable[[str], Iterable[Span]], kind: str, count: int = 400, seed: int = 0
) -> tuple[float, float]:
    """Of the spans that `find` gives for generated texts, exact ones alone being right."""
    draw = random.Random(f'{kind} {seed}')
    right = wrong = missed = 0
    for _ in range(count):
        text, spans = text_with_spans(draw, kind)
        found = set(find(text))
        right += len(found & set(spans))
        wrong += len(found - set(spans))
        missed += len(set(spans) - found)
    return right / (right + wrong), right / (right + missed)
