"""Lists of domains and URLs, words in URLs, and an advert blocker's list."""

import gzip

import pytest

from llm.data.documents.document import Document
from llm.data.documents.language import Language
from llm.data.documents.stage import Chain
from llm.data.documents.url_blocking import UrlBlocking
from llm.errors import UserError


def removed(stage, *urls):
    documents = [Document(str(i), '', 's', url=url) for i, url in enumerate(urls)]
    return [document.removed_by for document in stage(documents)]


@pytest.fixture
def lists(tmp_path):
    (tmp_path / 'domains.txt').write_text(
        '# bad ones\nspam.example\n0.0.0.0 more.ads.example www.ads.example # hosts\nsite.example/bad\n'
    )
    return (str(tmp_path / 'domains.txt'),)


def test_another_list_is_another_stage(lists):
    chain = Chain((UrlBlocking(lists), Language()))
    before = chain.identities()
    assert removed(UrlBlocking(lists), 'http://more.example') == [None]
    with open(lists[0], 'a') as file:
        file.write('more.example\n')
    assert len(before) == 1 and chain.identities() != before
    assert removed(UrlBlocking(lists), 'http://more.example') == ['url/list']
    with pytest.raises(UserError, match='nowhere.bin: cannot be read'):
        Language(model='nowhere.bin').identities()


@pytest.mark.parametrize(
    ('url', 'listed'),
    [
        ('https://spam.example/x', True),
        ('http://a.b.SPAM.example:8080/', True),
        ('https://notspam.example/', False),
        ('https://spam.example.org/', False),
        ('//ads.example', True),
        ('https://x.more.ads.example./', True),
        ('https://0.0.0.0/', False),
        ('//site.example/bad', True),
        ('https://site.example:443/bad', True),
        ('https://www.site.example/bad/page?x', True),
        ('https://site.example/badly', False),
        ('https://site.example/', False),
        (None, False),
        ('http://[broken', False),
    ],
)
def test_domains_and_beginnings(lists, url, listed):
    assert removed(UrlBlocking(lists), url) == ['url/list' if listed else None]


def test_words_count_whole():
    stage = UrlBlocking(words=('casino', 'bet'), most_words=1)
    urls = ('http://x.example/casino', 'http://bet.example/Casino-1', 'http://x.example/better-casinos')
    assert removed(stage, *urls) == [None, 'url/words', None]


def test_a_list_of_an_advert_blocker(dev_data, tmp_path):
    text = gzip.decompress((dev_data / 'web' / 'easylist.txt.gz').read_bytes()).decode()
    domain = next(line[2:-1] for line in text.splitlines() if line.startswith('||') and line.endswith('^'))
    stage = UrlBlocking((str(dev_data / 'web' / 'easylist.txt.gz'),))
    urls = (f'https://{domain}/page', f'https://sub.{domain}/', 'https://www.python.org/doc/')
    assert removed(stage, *urls) == ['url/list', 'url/list', None]
