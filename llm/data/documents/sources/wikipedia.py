"""Articles of MediaWiki XML dumps, such as Wikipedia's."""

import dataclasses
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from llm.data.documents.document import Ignored, Quarantined
from llm.data.documents.sources.files import PACKINGS, FileSource, Item
from llm.data.documents.streams import ChunkFile
from llm.data.sources.files import stream_bytes
from llm.errors import UserError

# Sections at an article's end that are lists of links and sources, not prose.
_LISTS = ('references', 'external links', 'further reading', 'see also', 'notes', 'bibliography', 'sources')
_MEDIA = re.compile(r'^:?(?:file|image|category|media)\s*:', re.I)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wikipedia(FileSource):
    """Pages of the main namespace, their wikitext as plain text; redirects and other namespaces are left out.

    Templates, tables, references and media are removed, links become their text.

    Args:
        licence: of Wikipedia's texts.
        skipped_sections: headings, in lower case, of sections that are left out with what is below them.
    """

    licence: str | None = 'CC-BY-SA-4.0'
    skipped_sections: tuple[str, ...] = _LISTS

    suffixes = tuple(f'.xml{packing}' for packing in PACKINGS)

    def read(self, path: str) -> Iterator[Item]:
        from defusedxml.common import DefusedXmlException
        from defusedxml.ElementTree import ParseError, iterparse

        base, number = None, 0
        try:
            root: Any = None
            for event, element in iterparse(ChunkFile(stream_bytes(path)), events=('start', 'end')):
                root = element if root is None else root
                if event == 'start':
                    continue
                tag = element.tag.rpartition('}')[2]
                if tag == 'base' and element.text:
                    base = element.text.rpartition('/')[0]
                elif tag == 'page':
                    number += 1
                    yield self._page(path, number, element, base)
                    root.clear()  # the tree would grow to the size of the dump
        except (ParseError, DefusedXmlException, EOFError) as error:
            raise UserError(f'is no XML, or is cut short, after page {number} ({error})', where=path) from error

    def _page(self, path: str, number: int, page: Any, base: str | None) -> Item:
        def value(name: str) -> str:
            found = page.find(f'.//{{*}}{name}')
            return (found.text or '') if found is not None else ''

        if value('ns') not in ('', '0'):
            return Ignored(f'page of namespace {value("ns")}')
        if page.find('./{*}redirect') is not None:
            return Ignored('redirect')
        title, wikitext, where = value('title'), value('text'), f'{path}:{number}'
        if (size := len(wikitext.encode(errors='surrogatepass'))) > self.max_document_bytes:
            return Quarantined(where, f'{size:,} bytes, more than max_document_bytes')
        try:
            text = plain_text(wikitext, self.skipped_sections)
        except ImportError:
            raise
        except Exception as error:  # of the parser, on what it was not made for
            return Quarantined(where, f'wikitext cannot be parsed ({type(error).__name__}: {error})')
        url = f'{base}/{urllib.parse.quote(title.replace(" ", "_"))}' if base else None
        fields = {
            'id': f'{self.name}:{value("id") or number}',
            'url': url,
            'date': value('timestamp'),
            'text': f'{title}\n\n{text}',
            'metadata': {'title': title},
        }
        return self.document(f'{self.name}:{where}', fields)


def plain_text(wikitext: str, skipped_sections: tuple[str, ...] = _LISTS) -> str:
    """Wikitext without markup, section by section."""
    import mwparserfromhell

    parts = []
    skipped_below: int | None = None
    for section in mwparserfromhell.parse(wikitext).get_sections(flat=True, include_lead=True):
        headings = section.filter_headings()
        if headings:
            level, title = headings[0].level, str(headings[0].title.strip_code()).strip()
            if skipped_below is not None and level > skipped_below:
                continue
            skipped_below = level if title.lower() in skipped_sections else None
            if skipped_below is not None:
                continue
        for link in section.filter_wikilinks():
            if _MEDIA.match(str(link.title)):
                section.replace(link, '') if link in section.nodes else None
        for tag in section.filter_tags(matches=lambda node: str(node.tag).lower() in ('ref', 'table', 'gallery')):
            if tag in section.nodes:
                section.remove(tag)
        parts.append(section.strip_code(normalize=True, collapse=True).strip())
    return '\n\n'.join(part for part in parts if part)
