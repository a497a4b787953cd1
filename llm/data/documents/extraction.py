"""Main text of web pages: navigation, boilerplate, comments and notices of cookies are left out."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from llm.data.documents.document import Document, Verdict, valid_text

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

    Args:
        method: 'resiliparse' (Bevendorff et al. 2018; fast), or 'trafilatura' (Barbaresi 2021; ten times slower,
            fewer wrong sentences).
        keep_comments: whether what readers wrote below a page is part of it.
        bullets: whether items of lists keep their bullets and numbers.
    """

    method: Literal['resiliparse', 'trafilatura'] = 'resiliparse'
    keep_comments: bool = False
    bullets: bool = True

    name = 'extraction'
    rules = (EMPTY,)

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        return [self._extract(document) for document in documents]

    def _extract(self, document: Document) -> Document:
        if document.markup is None:
            return document.judged(Verdict(EMPTY, bool(document.text.strip()), len(document.text)))
        extract = {'resiliparse': self._by_resiliparse, 'trafilatura': self._by_trafilatura}[self.method]
        text, _ = valid_text(extract(document.markup))
        return document.judged(Verdict(EMPTY, bool(text.strip()), len(text)), text=text, markup=None)

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
