import numpy as np
import pytest

from llm.data.documents.deduplication.exact import digests, equal_to_first, normalized_url, word_bytes
from llm.data.documents.deduplication.words import words_of


@pytest.mark.parametrize(
    ('url', 'same'),
    [
        ('HTTP://user@WWW.Example.com:80/a/?utm_source=x#top', 'example.com/a'),
        ('https://example.com:443/a', 'example.com/a'),
        ('http://example.com:8080/a', 'example.com:8080/a'),
        ('https://example.com/a?b=2&a=1&fbclid=9', 'example.com/a?a=1&b=2'),
        ('https://example.com/%7Ea/%e4%b8%ad', 'example.com/~a/%E4%B8%AD'),
        ('https://example.com/A', 'example.com/A'),
        ('https://example.com/a%2Fb', 'example.com/a%2Fb'),
        ('https://example.com/?empty=', 'example.com?empty='),
        ('http://[broken', 'http://[broken'),
        ('https://example.com:port/', 'https://example.com:port/'),
        ('n/a', ''),
        ('#top', ''),
        ('/', ''),
    ],
)
def test_urls_of_one_page(url, same):
    assert normalized_url(url) == same


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('http://a.ru/?city=%CC%EE%F1%EA%E2%E0', 'http://a.ru/?city=%CA%E0%EB%F3%E3%E0'),  # Windows-1251
        ('http://a.org/?_gallery=1', 'http://a.org/?_gallery=2'),
        ('http://a.org/?gclid=x&gclids=1', 'http://a.org/?gclid=x&gclids=2'),
        ('http://a.org/#!/news', 'http://a.org/#!/about'),
        ('http://a.org/app#/news', 'http://a.org/app#/about'),
    ],
)
def test_urls_of_different_pages_stay_different(one, other):
    assert normalized_url(one) != normalized_url(other)


def test_equal_documents_go_for_the_smallest():
    texts = ['A b, c.', 'other', 'a B c', '', 'a b c d', 'a\nb\nc', '!']
    keys, checks = digests(word_bytes(words_of(texts)))
    nodes = np.array([30, 1, 20, 9, 5, 25, 8])
    found, first = equal_to_first(keys, checks, nodes)
    assert sorted(zip(found.tolist(), first.tolist(), strict=True)) == [(9, 8), (25, 20), (30, 20)]
    assert len(equal_to_first(keys, np.arange(7, dtype=np.uint64), nodes)[0]) == 0  # both halves count
