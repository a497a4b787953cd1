"""Documents for tests of the rules of quality: real ones, and some that each rule removes."""

import gzip
import json
from pathlib import Path

from llm.data.documents.document import Document

SENTENCE = 'The cat sat with the dog and looked at all of the birds that have flown to the tree. '
_NOUNS = 'river stone window garden winter letter market bridge candle forest mirror shadow summer ticket'
WORDS = _NOUNS.split(' ')


def documents(texts, **fields):
    return [Document(str(i), text, 'test', **fields) for i, text in enumerate(texts)]


def prose(num_words, seed=0):
    """Sentences without repetition: of ten words each, every word with a number of its own in letters."""
    words = []
    for i in range(num_words):
        number = ''.join(chr(ord('a') + int(digit)) for digit in str(i + 1000 * seed))
        words.append(f'{("the", "of", "and", "to")[i % 4]}' if i % 5 == 0 else f'{WORDS[i % len(WORDS)]}{number}')
    sentences = [' '.join(words[i : i + 10]) for i in range(0, len(words), 10)]
    return '. '.join(sentences) + '.'


def synthetic_texts():
    """Of every rule one or more that it removes, and what is odd."""
    base = prose(200)
    lines = [prose(12, seed) for seed in range(20)]
    return [
        '',
        ' ',
        '\n',
        '\n\n\n',
        'word',
        '.',
        '😀',
        '😀' * 60 + ' 👍🏽 ' * 80,
        'x' * 5000,
        'a ' * 3000,
        base,
        prose(45),
        prose(60),
        'to be ' + 'supercalifragilistic ' * 80,
        'I a o the be ' * 30,
        base + ' #' * 60,
        base + ' ... ' * 60,
        base.replace(' ', ' …', 30),
        '\n'.join(f'- {line}' for line in lines),
        '\n'.join(f'  • {line}' for line in lines[:19]) + '\n' + lines[19],
        '\n'.join(f'{line}...' if i % 2 else line for i, line in enumerate(lines)),
        ' '.join(str(i) for i in range(200)) + base[:300],
        ' '.join(f'{word}{i}' for i in range(20) for word in WORDS),
        '\n'.join(lines[:10] * 2),
        '\n\n'.join(lines[:10] * 2),
        '\n\n'.join([*lines, lines[0]]),
        SENTENCE * 10,
        SENTENCE * 2 + base,
        ' '.join(f'the very same {word}{i}' for i in range(10) for word in WORDS),
        base + ' ' + ' '.join([' '.join(WORDS[:10])] * 8),
        '\n'.join(line.replace('.', '') for line in lines),
        '\n'.join(' '.join(line.split()[:3]) for line in lines),
        '\n'.join(['Read it and weep.', *lines, 'Read it and weep.', 'Read it and weep.', 'Read it and weep.']),
        '\n'.join(word for line in lines for word in line.split()),
        '\n'.join([*lines[:8], 'Please turn Javascript on in your browser.', *lines[8:]]),
        '\n'.join([*lines[:8], 'This is Lorem Ipsum dolor text.', *lines[8:]]),
        '\n'.join([*lines[:8], 'Lorem ipsum', *lines[8:]]),
        '\n'.join([*lines[:8], 'We write { for a bracket.', *lines[8:]]),
        '\n'.join([*lines[:8], 'Here javascript is { not a bracket.', *lines[8:]]),
        '\n'.join([*lines[:8], 'By this you agree to our Privacy Policy.', 'Our site uses cookies too.', *lines[8:]]),
        '\n'.join([*lines[:8], 'y' * 1001 + ' is a long word.', *lines[8:]]),
        '\n'.join(f'{line} [12] and more[citation needed].[3] ' for line in lines),
        '\n'.join(['[1] [2] [3]', *lines[:4]]),
        '\n'.join(['One. Two. Three! "Four?" (Five.) Six', 'e.g. this is no end, Mr. Smith said.']),
        '  \t'.join(lines) + '\r\n\x0b' + '\u2028'.join(lines) + '\x85' + lines[0],
    ]


def real_texts(dev_data, every=1):
    """Pages of the Common Crawl, the Declaration of Human Rights in many languages, articles and a play."""
    texts = []
    for name in ('cc_en_head-0091', 'cc_en_head-0174', 'udhr'):
        with gzip.open(Path(dev_data) / 'web' / f'{name}.jsonl.gz', 'rt', encoding='utf-8') as file:
            own = [json.loads(line)['text'] for line in file]
        texts += own[:: 12 if name == 'udhr' else 1]
    with gzip.open(Path(dev_data) / 'dedup' / 'articles_100.txt.gz', 'rt', encoding='utf-8') as file:
        texts += [line.split(' ', 1)[1] for line in file]
    for name in ('wikitext2_test', 'tinyshakespeare'):
        with gzip.open(Path(dev_data) / 'text' / f'{name}.txt.gz', 'rt', encoding='utf-8') as file:
            text = file.read(120_000)
        texts += [text[i : i + 3000] for i in range(0, len(text), 3000)]
    return texts[::every]
