"""Extraction, normalisation and language of documents."""

import gzip
import json
import random
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.data.documents.document import Document, Quarantined, Verdict
from llm.data.documents.extraction import Extraction
from llm.data.documents.language import Language
from llm.data.documents.nesting import flattened
from llm.data.documents.normalization import Normalization
from llm.data.documents.sources import Wikipedia
from llm.data.documents.stage import Chain
from llm.errors import UserError
from tests.data.documents.articles import f1, read_pages


@pytest.mark.parametrize(('method', 'least'), [('resiliparse', 0.92), ('trafilatura', 0.95)])
def test_articles_are_found_in_their_pages(dev_data, method, least):
    pages, truth = read_pages(dev_data)
    texts = []
    for page in pages:
        (document,) = Extraction(method)([Document('a', '', 'articles', markup=page)])
        texts.append(document.text)
    assert f1(texts, truth) >= least


PAGE = """<html><head><title>T</title><style>p {}</style></head><body><nav><a href="/">Home</a></nav>
<div id="cookie-banner">We use cookies</div><article><h1>Head</h1><p>First &amp; foremost.</p>
</article><script>alert(1)</script><footer>Copyright</footer></body></html>"""


def test_only_the_main_text_of_a_page_is_left():
    (document,) = Extraction()([Document('a', '', 's', markup=PAGE)])
    assert re.sub(r'\s+', ' ', document.text) == 'Head First & foremost.'
    assert (document.markup, document.verdicts) == (None, (Verdict('extraction/empty', True, len(document.text)),))
    empty, text = Extraction()([Document('a', '', 's', markup='<nav>x</nav>'), Document('b', 'as it is', 's')])
    assert (empty.removed_by, text.text, text.removed_by) == ('extraction/empty', 'as it is', None)


def test_all_text_of_a_page_is_what_it_shows():
    (document,) = Extraction('all_text')([Document('a', '', 's', markup=PAGE)])
    assert re.sub(r'\s+', ' ', document.text) == 'Home We use cookies Head First & foremost. Copyright'


@pytest.mark.parametrize('markup', ['', '\0', '<' * 10_000, '<div>' * 3000 + 'deep', '<p>' + 'a' * 10**6, '&#xD800;'])
def test_broken_pages_are_read(markup):
    (document,) = Extraction()([Document('a', '', 's', markup=markup)])
    document.text.encode()


def test_nesting_is_bounded_and_the_text_stays(monkeypatch):
    """Without it, each of these takes minutes to hours, or all memory."""
    from resiliparse.parse.html import HTMLTree, traverse_dom

    def depth(markup):
        depths = []
        traverse_dom(HTMLTree.parse(markup).document, lambda context: depths.append(context.depth))
        return max(depths)

    for page in ('<div>' * 100_000 + 'deep', '<div></b>' * 20_000 + 'deep', '<p><b id=%d>' * 9000 % (*range(9000),)):
        (document,) = Extraction()([Document('a', '', 's', markup=f'{page}<p>end')])
        assert document.text.split()[-1] == 'end' and document.metadata == {'flattened': True}
    assert len(Extraction()([Document('a', '', 's', markup='<ol><li>a' * 5000)])[0].text) < 500_000  # indentation
    monkeypatch.setattr('llm.data.documents.nesting._FEW_TAGS', 0)
    monkeypatch.setattr('llm.data.documents.nesting._FEW_OPENING', 0)
    monkeypatch.setattr('llm.data.documents.nesting.MAX_DEPTH', 30)
    names = ('a', 'b', 'p', 'div', 'span', 'ul', 'li', 'table', 'tr', 'td', 'form', 'h1', 'button', 'dl', 'dd', 'br')
    for seed in range(40):
        draw = random.Random(seed)
        some = draw.sample(names, 5)
        tags = [f'<{draw.choice(("", "", "", "/"))}{draw.choice(some)} id={i}>{i}\n' for i in range(400)]
        markup = ''.join(tags)
        flat = flattened(markup)
        assert depth(flat) < 30 + 25, seed
        assert re.sub('<[^>]*>', '', flat) == re.sub('<[^>]*>', '', markup)
        shallow = ''.join(tags[:20])
        assert flattened(shallow) == shallow


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('schÃ¶n', 'schön'),
        ('â€œquotedâ€\x9d', '“quoted”'),
        ('naïve café — Ä Â', 'naïve café — Ä Â'),
        ('AT&amp;T &lt;b&gt; &unknown; R&D;', 'AT&T <b> &unknown; R&D;'),
        ('a\r\nb\u2028c\td  e \n\n\n\n f ', 'a\nb\nc d e\n\nf'),
        ('\u200bzero\ufeff \x00nul\xad', 'zero nul'),
        ('Title\x0bby X\x0cnext', 'Title\nby X\nnext'),
        ('e\u0301', '\xe9'),
        ('👩\u200d👩\u200d👧', '👩\u200d👩\u200d👧'),
    ],
)
def test_normalised_text(text, expected):
    assert Normalization().normalize(text) == expected


def test_what_normalisation_can_do_besides():
    text = '“Ｆｕｌｌ” ❤️ ok'
    assert Normalization(unicode_form='NFKC', quotes=True, lower_case=True).normalize(text) == '"full" ❤️ ok'
    assert Normalization(emoji='name').normalize(text) == '“Ｆｕｌｌ” :red_heart: ok'
    assert Normalization(emoji='remove').normalize(text) == '“Ｆｕｌｌ” ok'
    lower = Normalization(lower_case=True).normalize('\u0130\u05a7')  # i and a dot, which stands behind the other mark
    assert lower == 'i\u05a7\u0307'
    code = 'if x:\n\treturn  1\n'
    assert Normalization(white_space=False).normalize(code) == code


@given(
    st.text(alphabet=st.one_of(st.characters(codec='utf-8'), st.sampled_from('&;#x0aÃ¶â€™ \r\n\t\u2028')), max_size=60)
)
def test_a_second_time_changes_nothing_that_matters(text):
    once = Normalization(entities=False).normalize(text)
    assert Normalization(repair=False, entities=False).normalize(once) == once
    assert not re.search('[\0-\x08\x0b-\x1f\x7f-\x9f]|  |\n\n\n', once)


def test_languages_of_the_declaration_of_human_rights(dev_data):
    wanted = ('de', 'sw', 'ja', 'ar', 'fa', 'ko', 'pl', 'sv', 'uk', 'vi')
    with gzip.open(dev_data / 'web' / 'udhr.jsonl.gz') as file:
        rows = [json.loads(line) for line in file]
    documents = [Document(row['code'], row['text'], row['bcp47'].split('-')[0]) for row in rows]
    documents = [document for document in documents if document.source in wanted]
    assert {document.source for document in documents} == set(wanted)
    judged = Language(languages=('de', 'sw'), thresholds=(('sw', 1.0),))(documents)
    for document in judged:
        assert document.language == document.source
        expected = document.language == 'de' or (document.language == 'sw' and document.language_confidence == 1)
        assert (document.removed_by is None) == expected
    with pytest.raises(UserError, match=r'threshold = 2 is not from 0 to 1'):
        Language(threshold=2)
    with pytest.raises(UserError, match=r"py3langid knows no language 'german', 'EN'\. .*, de, .*, en, "):
        Chain((Language(languages=('de', 'german'), thresholds=(('EN', 0.5),)),))(documents[:1], ['f:1'])


def test_one_bad_document_of_a_batch_is_quarantined_alone():
    documents = [Document('a', 'text', 's'), Document('b', None, 's'), Document('c', 'more', 's')]
    first, second, third = Chain((Normalization(),))(documents, ['f:1', 'f:2', 'f:3'])
    assert (first.text, third.text) == ('text', 'more')
    assert isinstance(second, Quarantined)
    assert (second.where, second.id, second.stage, second.reason[:14]) == (
        'f:2', 'b', 'normalization', 'AttributeError',
    )  # fmt: skip


def test_a_missing_package_stops_the_run_and_is_no_fault_of_documents(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'ftfy', None)
    with pytest.raises(UserError, match=r'ftfy is not installed.*llm-jax\[documents\]'):
        Chain((Normalization(),))([Document('a', 'schÃ¶n', 's')], ['a'])
    monkeypatch.setitem(sys.modules, 'mwparserfromhell', None)
    (tmp_path / 'a.xml').write_text('<mediawiki><page><title>T</title><text>t</text></page></mediawiki>')
    (shard,) = Wikipedia(files=str(tmp_path / 'a.xml'), name='w').shards()
    with pytest.raises(UserError, match='mwparserfromhell is not installed'):
        list(shard.read())
