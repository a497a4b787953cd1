"""StarCoder's rules for files that are hardly code (Li et al. 2023, section 3.3): XML, HTML, JSON and YAML."""

import dataclasses
import html
import re
from collections.abc import Sequence

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document, Verdict

_XML, _SHARE, _TEXT, _SIZE = (f'starcoder/{rule}' for rule in ('xml', 'html_share', 'html_text', 'data_size'))
# Comments, scripts, styles and tags.
_HIDDEN = re.compile(r'<!--.*?(?:-->|\Z)|<(script|style)\b.*?(?:</\1\s*>|\Z)|<[/!?a-z][^>]*>?', re.S | re.I)
_XML_HEADER, _HEADER_CHARACTERS = '<?xml version=', 100


@dataclasses.dataclass(frozen=True)
class MarkupAndData:
    """Judges files by metadata's 'programming_language', which the source `Code` sets; others have no figures and stay,
    and so do XSLT, which is XML by its nature, and notebooks.

    Args:
        remove_xml: files with an XML declaration in their first 100 characters.
        min_html_share, min_html_text: of HTML, the visible text as a share of the file, and its characters.
        min_data, max_data: characters of a JSON or YAML file.
    """

    remove_xml: bool = True
    min_html_share: float = 0.2
    min_html_text: int = 100
    min_data: int = 50
    max_data: int = 5000

    name = 'markup_and_data'
    rules = (_XML, _SHARE, _TEXT, _SIZE)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        return (
            Bounds(_XML, most=0 if self.remove_xml else None),
            Bounds(_SHARE, self.min_html_share),
            Bounds(_TEXT, self.min_html_text),
            Bounds(_SIZE, self.min_data, self.max_data),
        )

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        return [document.judged(*self._verdicts(document)) for document in documents]

    def _verdicts(self, document: Document) -> tuple[Verdict, ...]:
        language, text = document.metadata.get('programming_language'), document.text
        # These count as XML and JSON, and are judged by none of the rules.
        if str(document.metadata.get('path')).endswith(('.xsl', '.xslt', '.ipynb')):
            language = None
        xml = language is not None and _XML_HEADER in text[:_HEADER_CHARACTERS]
        share = visible = size = None
        if language == 'html':
            visible = _visible(text)
            share = visible / max(len(text), 1)
        elif language in ('json', 'yaml'):
            size = len(text)
        values = (float(xml), share, visible, size)
        return tuple(
            Verdict(bounds.rule, bounds.keeps(value), value) for bounds, value in zip(self.bounds, values, strict=True)
        )


def _visible(markup: str) -> int:
    """Characters of all text of a page, with its white space, as bigcode-dataset's filter counts them."""
    return len(html.unescape(_HIDDEN.sub('', markup)))
