"""Documents removed by where they are from: lists of domains and URLs, words in URLs, lists of advert blockers."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document, Verdict, domain_of
from llm.data.sources.files import file_identity, file_states, find_files, stream_bytes
from llm.errors import UserError

_LIST, _WORDS = 'url/list', 'url/words'
_SUFFIXES = tuple(f'{kind}{packing}' for kind in ('.txt', '') for packing in ('', '.gz', '.zst', '.bz2'))


@dataclasses.dataclass(frozen=True)
class UrlBlocking:
    """Removes documents whose URL is on a list, or has too many of the words given. Documents without a URL stay.

    Args:
        lists: files or globs. A line is a domain, which stands for all below it ('example.org', or as hosts files have
            it '0.0.0.0 example.org other.org'), or the beginning of a URL ('example.org/path'); '#' begins a comment.
            A file that begins with '[Adblock' is read as an advert blocker's list, by Brave's engine.
        words: of these in a URL, `most_words` may stand (RefinedWeb's soft words, Penedo et al. 2023, appendix G.1).
        most_words: see above.
    """

    lists: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    most_words: int = 0

    name = 'url'
    rules = (_LIST, _WORDS)

    def __post_init__(self) -> None:
        if self.most_words < 0:
            raise UserError(f'most_words = {self.most_words} is negative', where='UrlBlocking')

    @property
    def _bound(self) -> Bounds:
        return Bounds(_WORDS, most=self.most_words)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """Of the number of words."""
        return (self._bound,)

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        paths = self._paths()
        listed = _matcher(paths, file_states(paths))
        return [
            document.judged(
                Verdict(_LIST, not (document.url and listed(document.url))), self._words_of(document.url or '')
            )
            for document in documents
        ]

    def identities(self) -> list[str]:
        """Change where the content of the lists does."""
        return [file_identity(path) for path in self._paths()]

    def _paths(self) -> tuple[str, ...]:
        return find_files(self.lists, _SUFFIXES) if self.lists else ()

    def _words_of(self, url: str) -> Verdict:
        parts = re.split(r'[^a-z0-9]+', url.lower())
        count = sum(parts.count(word.lower()) for word in self.words)
        return Verdict(_WORDS, self._bound.keeps(count), count)


@functools.lru_cache(maxsize=8)
def _matcher(paths: tuple[str, ...], states: tuple[Any, ...]) -> Callable[[str], bool]:
    """Whether a URL is on one of the lists; they are read once in a process while they stay."""
    del states
    domains: set[str] = set()
    beginnings: set[str] = set()
    rules: list[str] = []
    for path in paths:
        text = b''.join(stream_bytes(path)).decode(errors='replace')
        if text.startswith('[Adblock'):
            rules += text.splitlines()
            continue
        for line in text.splitlines():
            words = line.partition('#')[0].split()
            for word in words[1:] or words:  # the first of several is the address that hosts files give names
                entry = _bare(word)
                (beginnings if '/' in entry.rstrip('/') else domains).add(entry.rstrip('/.'))
    engine = _advert_engine(tuple(rules)) if rules else None

    def listed(url: str) -> bool:
        host = domain_of(url if '//' in url else f'//{url}') or ''
        labels = host.rstrip('.').split('.')
        if any('.'.join(labels[i:]) in domains for i in range(len(labels))):
            return True
        steps = re.split('([/?#])', _bare(url))
        if beginnings and any(''.join(steps[:i]).rstrip('/') in beginnings for i in range(1, len(steps) + 1)):
            return True
        return engine is not None and engine(url)

    return listed


def _bare(url: str) -> str:
    """A URL in lower case, without scheme, port and leading 'www.'."""
    url = url.lower()
    url = url.partition('://')[2] if '://' in url else url.removeprefix('//')
    return re.sub(r'^([^/?#:]*):\d*(?=[/?#]|$)', r'\1', url.removeprefix('www.'))


def _advert_engine(rules: tuple[str, ...]) -> Callable[[str], bool]:
    try:
        import adblock
    except ImportError as error:
        raise UserError(
            'a list of an advert blocker needs the package adblock',
            where='UrlBlocking.lists',
            fix='Install the extra [documents].',
        ) from error
    filters = adblock.FilterSet()
    filters.add_filters(list(rules))
    engine = adblock.Engine(filters)
    return lambda url: bool(engine.check_network_urls(url, url, 'document').matched)
