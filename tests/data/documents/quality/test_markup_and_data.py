"""StarCoder's rules for XML, HTML, JSON and YAML, on both sides of their thresholds."""

import gzip
from html.parser import HTMLParser

import pytest

from llm.data.documents.document import Document
from llm.data.documents.quality.markup_and_data import MarkupAndData

XML = '<?xml version="1.0"?>'
PAGE = '<html><style>p {}</style><script>x</script><!-- y --><p>'


@pytest.mark.parametrize(
    ('path', 'language', 'text', 'removed_by'),
    [
        ('a.cs', 'c#', ' ' * 86 + XML, 'starcoder/xml'),
        ('a.cs', 'c#', ' ' * 87 + XML, None),
        ('a.xsl', 'xml', XML, None),
        ('a.ipynb', 'json', 'x', None),
        ('notes', None, XML, None),
        ('a.html', 'html', PAGE + 'a' * 100, None),
        ('a.html', 'html', PAGE + 'a' * 99, 'starcoder/html_text'),
        ('a.html', 'html', f'{PAGE}{"&lt;" * 100}', None),
        ('a.html', 'html', PAGE + 'a' * 100 + f'<p x="{"y" * 400}">', 'starcoder/html_share'),
        ('a.json', 'json', 'x' * 50, None),
        ('a.json', 'json', 'x' * 49, 'starcoder/data_size'),
        ('a.yml', 'yaml', 'x' * 5000, None),
        ('a.yml', 'yaml', 'x' * 5001, 'starcoder/data_size'),
        ('a.py', 'python', 'x', None),
    ],
)
def test_files_that_are_hardly_code_go(path, language, text, removed_by):
    document = Document('a', text, 's', metadata={'path': path, 'programming_language': language})
    (judged,) = MarkupAndData()([document])
    assert judged.removed_by == removed_by
    everything = MarkupAndData(remove_xml=False, min_html_share=0, min_html_text=0, min_data=0, max_data=10**9)
    assert everything([document])[0].removed_by is None


class Text(HTMLParser):
    """The text of a page as Beautiful Soup takes it from this parser: without what is in scripts and styles."""

    def __init__(self):
        super().__init__()
        self.hidden, self.characters = 0, 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in ('script', 'style')

    def handle_endtag(self, tag):
        self.hidden -= tag in ('script', 'style')

    def handle_data(self, data):
        self.characters += 0 if self.hidden else len(data)


def test_visible_text_is_that_of_pythons_parser(dev_data):
    for path in sorted((dev_data / 'web' / 'articles' / 'html').glob('*'))[::9]:
        markup = gzip.decompress(path.read_bytes()).decode(errors='replace')
        parser = Text()
        parser.feed(markup)
        parser.close()
        (judged,) = MarkupAndData()([Document('a', markup, 's', metadata={'programming_language': 'html'})])
        assert judged.verdicts[2].value == parser.characters
