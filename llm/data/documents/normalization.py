"""Normalisation of text: encoding repaired, one Unicode form, plain white space, no control characters."""

import dataclasses
import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

from llm.data.documents.document import Document

# Everything of category Cc but tab and line feed (line ends are unified first), soft hyphens, byte order marks and the
# marks of direction that pages leave behind. Joiners stay: scripts and emoji need them.
_CONTROLS = re.compile('[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]')
_LINE_ENDS = re.compile('\r\n?|\u2028|\u2029|\x85|\x0b|\x0c')
_SPACES = re.compile('[^\\S\n]+')
_AROUND_LINE_ENDS = re.compile(' ?\n ?')
_BLANK_LINES = re.compile('\n{3,}')
_ENTITY = re.compile('&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});')
_QUOTES = str.maketrans(
    {
        **dict.fromkeys('\u2018\u2019\u201a\u201b\u2032', "'"),
        **dict.fromkeys('\u201c\u201d\u201e\u201f\u2033\xab\xbb', '"'),
    }
)
# Two characters that stand where UTF-8 was read as Windows-1252 or Latin-1: what ftfy would repair has one of them.
_MOJIBAKE = re.compile(
    '[\xc2-\xf4\u0152\u0160\u017d\u0192\u02c6\u2020-\u2122][\x80-\xbf\u0152-\u0192\u02c6-\u02dc\u2013-\u2122]|\ufffd'
)


@dataclasses.dataclass(frozen=True)
class Normalization:
    """Rewrites every document's text in the same way. What it gives is left as it is by a second time.

    References of HTML that were escaped twice ('&amp;lt;') are the exception, each time undoes one; so is what was
    decoded wrongly and has references, controls or emoji in or beside it, which a second time may mend.

    Args:
        repair: text that was decoded wrongly ('schÃ¶n') is mended by ftfy (Speer 2019) where it shows signs of that.
        unicode_form: NFC, NFKC (also unites ligatures and full-width letters), or None.
        entities: character references of HTML that were left in the text ('&amp;') become their characters.
        white_space: runs of spaces and tabs become one space, three and more line ends two, and line ends one kind;
            False leaves spaces and tabs, as code needs.
        emoji: 'keep', 'name' (':red heart:', by Unicode's own names) or 'remove'.
        quotes: whether curly and angle quotes become straight ones.
        lower_case: whether the text is put in lower case.
    """

    repair: bool = True
    unicode_form: Literal['NFC', 'NFKC'] | None = 'NFC'
    entities: bool = True
    white_space: bool = True
    emoji: Literal['keep', 'name', 'remove'] = 'keep'
    quotes: bool = False
    lower_case: bool = False

    name = 'normalization'
    rules: tuple[str, ...] = ()

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        return [dataclasses.replace(document, text=self.normalize(document.text)) for document in documents]

    def normalize(self, text: str) -> str:
        """The text as every document's text becomes."""
        if self.repair and not text.isascii() and _MOJIBAKE.search(text):
            import ftfy

            text = ftfy.fix_encoding(text)
        if self.entities and '&' in text:
            text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
        text = _LINE_ENDS.sub('\n', text)
        if self.emoji != 'keep' and not text.isascii():
            text = _with_emoji(text, self.emoji)
        text = _CONTROLS.sub('', text)
        if self.unicode_form and not unicodedata.is_normalized(self.unicode_form, text):
            text = unicodedata.normalize(self.unicode_form, text)
        if self.quotes:
            text = text.translate(_QUOTES)
        if self.lower_case:
            text = text.lower()
            text = unicodedata.normalize(self.unicode_form, text) if self.unicode_form else text
        if self.white_space:
            text = _BLANK_LINES.sub('\n\n', _AROUND_LINE_ENDS.sub('\n', _SPACES.sub(' ', text))).strip()
        return text


def _with_emoji(text: str, how: Literal['name', 'remove']) -> str:
    import emoji

    return emoji.demojize(text, delimiters=(':', ':')) if how == 'name' else emoji.replace_emoji(text, '')
