"""Personal data and secrets in texts: found by form, confirmed by checksum or numbering plan, masked or removed.

A candidate is found by a regular expression and then confirmed: card numbers by Luhn's sum and an issuer's range, IBANs
by ISO 7064 and their country's length, telephone numbers by libphonenumber's numbering plans, addresses of hosts by
their range and by what stands around them, as versions of programs look the same.
"""

import bisect
import dataclasses
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document, Verdict
from llm.errors import UserError

Kind = Literal['email', 'phone', 'ip', 'card', 'iban', 'secret']
Span = tuple[int, int]
KINDS: tuple[Kind, ...] = ('secret', 'email', 'iban', 'card', 'ip', 'phone')

# Word characters are ASCII's in these patterns: Chinese and Japanese have no space around what is looked for.
_LETTERS = 'a-z0-9\u00c0-\u024f'
_EMAIL = re.compile(
    rf"(?<![{_LETTERS}_.+%/@-])[{_LETTERS}](?:[{_LETTERS}._%+'-]{{0,62}}[{_LETTERS}_%+-])?"
    rf'@(?:[{_LETTERS}](?:[{_LETTERS}-]{{0,61}}[{_LETTERS}])?\.)+(?!(?:png|jpe?g|gif|webp|svg|avif)\b)[a-z]{{2,24}}'
    rf'(?![{_LETTERS}@]|[_-][{_LETTERS}])',
    re.I | re.A,
)
_QUAD = r'(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)'
# Behind one slash it is a version ('Chrome/1.2.3.4'), behind two a host ('http://1.2.3.4').
_IPV4 = re.compile(rf'(?<![\w.:-])(?<![^/]/)(?<!\A/){_QUAD}(?![\w-]|\.\d)', re.A)
_IPV6 = re.compile(
    rf'(?<![\w:.])(?=[0-9a-f]*:[0-9a-f:]*:)(?:[0-9a-f:]{{1,38}}:{_QUAD}|[0-9a-f:]{{3,39}})(?![\w:]|\.\d)', re.I | re.A
)
# Global addresses, and unique local ones, those of a link, and loopback; elsewhere lies what code has: 'a::b'.
_GLOBAL = ipaddress.IPv6Network('2000::/3')
_LOCAL = tuple(map(ipaddress.IPv6Network, ('fc00::/7', 'fe80::/10', '::1/128')))
# A version is announced, or belongs to a name: 'version 1.2.3.4', 'v1.2.3.4', 'Chrome/1.2.3.4', 'release: 1.2.3.4'.
_ANNOUNCED = re.compile(
    r'(?:\b(?:v|ver|version|release[ds]?|build|firmware|update[ds]?|upgrade[ds]?|section|chapter|§|oid|patch)'
    r'[\s.:=(]*(?:to\s|from\s)?$)',
    re.I,
)
_CARD = re.compile(r'(?<![\w.+/-])(?<!\d,)\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)', re.A)
_CARD_GROUPS = re.compile(r'^\d{13,19}$|^\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}(?:\1\d{1,3})?$|^\d{4}([ -])\d{6}\2\d{4,5}$')
# First digits and lengths of the networks (ISO/IEC 7812): Visa, Mastercard, American Express, Discover, Diners, JCB,
# UnionPay, Maestro.
_ISSUERS = re.compile(
    r'4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}'
    r'|6(?:011|5\d\d|4[4-9]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}'
    r'|(?:50|5[6-9]|6\d)\d{10,17}'
)
_IBAN = re.compile(r'(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])', re.A)
# What telephone numbers are written with; a single number of seven digits or more, as in tables, is none by itself.
_PHONE = re.compile(
    r'(?<![A-Za-z\d_.,+/=#$€£%-])(?:\+|00)?\(?\d[\d ()./\u2011-]{5,20}\d(?![A-Za-z\d_%]|[.,]\d|-[A-Za-z\d_])'
)
# Addresses of hosts, versions and numbers of sections; French numbers have five groups of two digits.
_DOTTED = re.compile(r'\d{1,3}(?:\.\d{1,3}){3,}')
_FRENCH = re.compile(r'0\d(?:\.\d\d){4}')
_SINGLE_DIGITS = re.compile(r'(?<!\d)\d(?!\d)')
_DATE = re.compile(r'\b(?:\d{4}[-./]\d{1,2}[-./]\d{1,2}|\d{1,2}[-./]\d{1,2}[-./]\d{2,4})\b')
_SECRETS = re.compile(
    r'(?<![\w-])(?:'
    r'(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}'  # Amazon Web Services
    r'|AIza[\w-]{35}'  # Google
    r'|(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{82})'  # GitHub
    r'|glpat-[\w-]{20,}'  # GitLab
    r'|xox[abposr]-(?:\d+-)*[A-Za-z0-9-]{10,}'  # Slack
    r'|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}'  # Stripe
    r'|sk-(?=[\w-]*\d)(?:proj-|ant-)?[\w-]{32,}'  # OpenAI, Anthropic
    r'|hf_[A-Za-z]{34}'  # Hugging Face
    r'|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}|SG\.[\w-]{22}\.[\w-]{43}'  # npm, PyPI, SendGrid
    r'|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}'  # JSON web tokens
    r')(?![\w-])'
    r'|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{0,65536}?'
    r'(?:-----END (?:[A-Z]+ )*PRIVATE KEY(?: BLOCK)?-----|\Z)',
    re.A,
)
# One of these is in whatever the pattern above finds; looking for them is ten times faster than the pattern.
_MARKS = (
    *('AKIA', 'ASIA', 'ABIA', 'ACCA', 'AIza', 'ghp_', 'gho_', 'ghu_', 'ghs_', 'ghr_', 'github_pat_', 'glpat-', 'xox'),
    *('_live_', '_test_', 'sk-', 'hf_', 'npm_', 'pypi-', 'SG.', 'eyJ', 'PRIVATE KEY'),
)
_ASSIGNED = re.compile(
    r'(?:api[_-]?key|secret|token|passw(?:or)?d|auth[_-]?key|access[_-]?key)'
    r'[\'"]?\s*(?:=|:|=>)\s*[\'"]?(?P<value>[A-Za-z0-9+/_\-.]{16,})',
    re.I,
)
# Bits a character, of letters and digits drawn at random for less than forty characters.
_RANDOM_BITS = 3.2


@dataclasses.dataclass(frozen=True)
class PersonalData:
    """Masks what it finds, or removes the documents that have too much of it.

    Args:
        kinds: what is looked for: e-mail addresses, telephone numbers, addresses of hosts (IPv4 and IPv6), numbers of
            payment cards, IBANs, keys and tokens of programs.
        mask: what stands in place of a span, with its kind: '<EMAIL>'; None leaves the text as it is.
        most: a document with more spans is removed; None removes none.
        regions: of telephone numbers without a country code, as ISO 3166 codes; empty finds those with one alone.
        private_hosts: whether addresses of private networks and of documentation are masked, too.
    """

    kinds: tuple[Kind, ...] = KINDS
    mask: str | None = '<{kind}>'
    most: int | None = None
    regions: tuple[str, ...] = ('US', 'GB')
    private_hosts: bool = False

    name = 'personal_data'
    rules = ('personal_data',)

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - set(KINDS):
            raise UserError(f'unknown kinds {sorted(unknown)}', where='PersonalData.kinds', fix=f'Use {KINDS}.')
        if self.mask is not None:
            try:
                self.mask.format(kind='EMAIL')
            except (KeyError, IndexError, ValueError) as error:
                raise UserError(f'{self.mask!r} is no mask ({error})', where='PersonalData.mask') from error

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """Of the number of spans."""
        return (Bounds('personal_data', most=self.most),)

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        return [self._judge(document) for document in documents]

    def _judge(self, document: Document) -> Document:
        found = self.find(document.text)
        verdict = Verdict('personal_data', self.bounds[0].keeps(len(found)), len(found))
        if not found:
            return document.judged(verdict)
        counts = dict(Counter(kind for _, _, kind in found))
        metadata = {**document.metadata, 'personal_data': counts}
        if self.mask is None:
            return document.judged(verdict, metadata=metadata)
        parts, end = [], 0
        for start, stop, kind in found:
            parts += [document.text[end:start], self.mask.format(kind=kind.upper())]
            end = stop
        return document.judged(verdict, metadata=metadata, text=''.join([*parts, document.text[end:]]))

    def find(self, text: str) -> list[tuple[int, int, Kind]]:
        """(start, stop, kind) of every span, in order and without overlaps; kinds first in KINDS come first."""
        finders: dict[Kind, Callable[[str], Iterator[Span]]] = {
            'secret': _secrets,
            'email': _emails,
            'iban': _ibans,
            'card': _cards,
            'ip': self._hosts,
            'phone': self._phones,
        }
        taken: list[tuple[int, int, Kind]] = []
        for kind in KINDS:
            if kind in self.kinds:
                found = [
                    (start, stop, kind)
                    for start, stop in finders[kind](text)
                    # Of those in order and without overlaps, the last that begins before it ends.
                    if not (i := bisect.bisect_left(taken, (stop,))) or taken[i - 1][1] <= start
                ]
                taken = sorted([*taken, *found]) if found else taken
        return taken

    def _hosts(self, text: str) -> Iterator[Span]:
        for match in _IPV4.finditer(text):
            address = ipaddress.IPv4Address('.'.join(part.lstrip('0') or '0' for part in match[0].split('.')))
            before = text[max(0, match.start() - 24) : match.start()]
            if (self.private_hosts or address.is_global) and not _ANNOUNCED.search(before):
                yield match.span()
        if '::' not in text and text.count(':') < 7:
            return
        for match in _IPV6.finditer(text):
            try:
                address6 = ipaddress.IPv6Address(match[0])
            except ValueError:
                continue
            if self._is_meant(address6):
                yield match.span()

    def _is_meant(self, address: ipaddress.IPv6Address) -> bool:
        if address.ipv4_mapped:
            return self.private_hosts or address.ipv4_mapped.is_global
        if address in _GLOBAL:
            return self.private_hosts or address.is_global
        return self.private_hosts and any(address in network for network in _LOCAL)

    def _phones(self, text: str) -> Iterator[Span]:
        import phonenumbers

        for match in _PHONE.finditer(text):
            written = match[0]
            digits = sum(character.isdigit() for character in written)
            international = written.startswith(('+', '00'))
            if not 7 <= digits <= 15 or (not international and digits == len(written)) or _DATE.search(written):
                continue
            if len(_SINGLE_DIGITS.findall(written)) > 2:  # a list of numbers
                continue
            if (dotted := _DOTTED.search(written)) and not _FRENCH.fullmatch(dotted[0]):
                continue
            for region in (None,) if written.startswith('+') else self.regions:
                text_of = '+' + written[2:] if written.startswith('00') else written
                try:
                    number = phonenumbers.parse(text_of, None if text_of.startswith('+') else region)
                except phonenumbers.NumberParseException:
                    continue
                if phonenumbers.is_valid_number(number):
                    yield match.span()
                    break


def _emails(text: str) -> Iterator[Span]:
    if '@' in text:
        for match in _EMAIL.finditer(text):
            if '..' not in match[0]:
                yield match.span()


def _ibans(text: str) -> Iterator[Span]:
    from stdnum import iban

    for match in _IBAN.finditer(text):
        # The groups behind may be words or another number: the longest part that is an IBAN counts.
        parts = match[0]
        while len(parts) >= 15:
            if iban.is_valid(parts):
                yield match.start(), match.start() + len(parts)
                break
            parts = parts[:-1].rstrip()


def _cards(text: str) -> Iterator[Span]:
    from stdnum import luhn

    for match in _CARD.finditer(text):
        digits = re.sub(r'[ -]', '', match[0])
        if _CARD_GROUPS.match(match[0]) and _ISSUERS.fullmatch(digits) and luhn.is_valid(digits):
            yield match.span()


def _secrets(text: str) -> Iterator[Span]:
    if any(mark in text for mark in _MARKS):
        for match in _SECRETS.finditer(text):
            yield match.span()
    lowered = text.lower()
    if not any(word in lowered for word in ('key', 'secret', 'token', 'passw')):
        return
    for match in _ASSIGNED.finditer(text):
        value = match['value']
        if re.search(r'\d', value) and re.search(r'[A-Za-z]', value) and _bits(value) >= _RANDOM_BITS:
            yield match.span('value')


def _bits(value: str) -> float:
    """Entropy of the characters of a string, in bits a character."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
