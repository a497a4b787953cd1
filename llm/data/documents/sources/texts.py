"""One document a file: web pages, plain texts and books."""

import dataclasses
import re
from collections.abc import Iterator

from llm.data.documents.document import Quarantined
from llm.data.documents.sources.files import PACKINGS, FileSource, Item
from llm.data.documents.streams import bounded_content
from llm.data.sources.files import stream_bytes

_GUTENBERG_START = re.compile(r'\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG EBOOK.*?\*\*\*', re.S | re.I)
_GUTENBERG_END = re.compile(r'\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG EBOOK', re.I)

_MARKS = {b'\xef\xbb\xbf': 'utf-8', b'\xfe\xff': 'utf-16-be', b'\xff\xfe': 'utf-16-le'}
# Escapes of ISO-2022-JP, which is ASCII by its bytes.
_JAPANESE = re.compile(rb'\x1b\$[@B]')


def decoded(data: bytes, encoding: str | None = None) -> str:
    """Bytes as text: by a byte order mark, else by the encoding that is said, else UTF-8, else by a guess.

    A wrong encoding never fails: what it cannot read becomes U+FFFD.
    """
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

    if (mark := next((mark for mark in _MARKS if data.startswith(mark)), None)) is not None:
        encoding = _MARKS[mark]
    elif encoding is None:
        try:
            if not _JAPANESE.search(data):
                return data.decode()
        except UnicodeDecodeError:
            pass
        encoding = detect_encoding(data, from_html_meta=True)
    try:
        # As browsers have it: ISO 8859-1 is Windows-1252, GB 2312 is GBK.
        name = encoding or 'utf-8'
        return bytes_to_str(data, map_encoding_to_html5(name, fallback_utf8=False) or name, errors='replace')
    except (LookupError, UnicodeError):  # a name of no encoding
        return data.decode(errors='replace')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Whole(FileSource):
    def contents(self, path: str) -> Iterator[bytes | Quarantined]:
        """The file's bytes, or that they are too many."""
        data = bounded_content(stream_bytes(path), self.max_document_bytes)
        yield data if isinstance(data, bytes) else Quarantined(path, f'{data:,} bytes, more than max_document_bytes')


@dataclasses.dataclass(frozen=True, kw_only=True)
class HtmlFiles(_Whole):
    """Web pages, each a file; `Extraction` finds their text."""

    suffixes = tuple(f'{kind}{packing}' for kind in ('.html', '.htm', '.xhtml') for packing in PACKINGS)

    def read(self, path: str) -> Iterator[Item]:
        for data in self.contents(path):
            if isinstance(data, Quarantined):
                yield data
            else:
                yield self.document(f'{self.name}:{path}', {'markup': decoded(data)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainTexts(_Whole):
    """Plain texts and books, each a file. What Project Gutenberg says before and after a book is left out.

    Args:
        encoding: of all files; None finds it for each.
    """

    encoding: str | None = None

    suffixes = tuple(f'{kind}{packing}' for kind in ('.txt', '.md', '.text') for packing in PACKINGS)

    def read(self, path: str) -> Iterator[Item]:
        for data in self.contents(path):
            if isinstance(data, Quarantined):
                yield data
            else:
                yield self.document(f'{self.name}:{path}', {'text': _without_frame(decoded(data, self.encoding))})


def _without_frame(text: str) -> str:
    if start := _GUTENBERG_START.search(text):
        text = text[start.end() :]
        if end := _GUTENBERG_END.search(text):
            text = text[: end.start()]
    return text
