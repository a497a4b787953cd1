"""Main text of web pages: navigation, boilerplate, comments and notices of cookies are left out."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from llm.data.documents.document import Document, Verdict, valid_text
from llm.data.documents.nesting import flattened

# Consent banners by the class and id names of the usual managers; resiliparse knows general boilerplate.
_CONSENT = (
    '[id*="cookie" i]',
    '[class*="cookie" i]',
    '[id*="consent" i]',
    '[class*="consent" i]',
    '#onetrust-banner-sdk',
    '[id*="gdpr" i]',
    '[class*="gdpr" i]',
)
EMPTY = 'extraction/empty'


@dataclasses.dataclass(frozen=True)
class Extraction:
    """Text of a document's `markup`; documents without markup pass as they are.

    Elements nested too deeply are flattened first (see `nesting`), and metadata's 'flattened' says so.

    Args:
        method: 'resiliparse' (Bevendorff et al. 2018; fast), or 'trafilatura' (Barbaresi 2021; ten times slower,
            fewer wrong sentences); or 'all_text': all that a page shows, menus and notices too, without tags, scripts
            and styles, much as in Common Crawl's WET files: something to compare the others with.
        keep_comments: whether what readers wrote below a page is part of it; all_text always keeps that.
        bullets: whether items of lists keep their bullets and numbers.
    """

    method: Literal['resiliparse', 'trafilatura', 'all_text'] = 'resiliparse'
    keep_comments: bool = False
    bullets: bool = True

    name = 'extraction'
    rules = (EMPTY,)

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        return [self._extract(document) for document in documents]

    def _extract(self, document: Document) -> Document:
        if document.markup is None:
            return document.judged(Verdict(EMPTY, bool(document.text.strip()), len(document.text)))
        extract = {
            'resiliparse': self._by_resiliparse,
            'trafilatura': self._by_trafilatura,
            'all_text': self._all_text,
        }[self.method]
        markup = flattened(document.markup)
        text, _ = valid_text(extract(markup))
        metadata = document.metadata if markup is document.markup else {**document.metadata, 'flattened': True}
        verdict = Verdict(EMPTY, bool(text.strip()), len(text))
        return document.judged(verdict, text=text, markup=None, metadata=metadata)

    def _by_resiliparse(self, markup: str) -> str:
        from resiliparse.extract.html2text import extract_plain_text

        return extract_plain_text(
            markup,
            preserve_formatting=True,
            main_content=True,
            list_bullets=self.bullets,
            alt_texts=False,
            comments=self.keep_comments,
            post_meta=False,
            skip_elements=_CONSENT,
        )

    def _by_trafilatura(self, markup: str) -> str:
        import trafilatura

        return trafilatura.extract(markup, include_comments=self.keep_comments, favor_precision=True) or ''

    def _all_text(self, markup: str) -> str:
        from resiliparse.extract.html2text import extract_plain_text

        return extract_plain_text(
            markup,
            preserve_formatting=True,
            main_content=False,
            list_bullets=self.bullets,
            alt_texts=False,
            comments=True,
            post_meta=True,
        )
