"""Documents that are equal: by id, by URL, by their words or by their text. Digests have 128 bits."""

import hashlib
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.sorted_runs import group_sizes, group_starts
from llm.data.documents.deduplication.words import Hashes

# Parameters of URLs that say where a visitor came from and not what is shown.
_TRACKING = re.compile('utm_.*|fbclid|gclid|dclid|msclkid|mc_cid|mc_eid|igshid|yclid|_ga|_gl', re.I | re.S)
_DEFAULT_PORTS = {'http': ':80', 'https': ':443'}

_ESCAPE = re.compile('%[0-9A-Fa-f]{2}')
_UNRESERVED = frozenset('ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~')  # RFC 3986, 2.3


def normalized_url(url: str) -> str:
    """One URL for those that show the same page almost surely; empty for what names no host, as 'n/a' and '#top'.

    Scheme, `www.`, default port, user, fragment, parameters of tracking and a slash at the end are left out; the host
    is in lower case, escapes are unified, and parameters are sorted. Escapes that are not UTF-8 stay different. A
    fragment that is a path, as '#!/news' and '#/news', names a page and stays.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host = (parts.hostname or '').removeprefix('www.').rstrip('.')
        port = f':{parts.port}' if parts.port else ''
        query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True, errors='surrogateescape')
    except ValueError:  # as of an unclosed IPv6 address
        return url.strip()
    if not host:
        return ''
    if port == _DEFAULT_PORTS.get(parts.scheme):
        port = ''
    path = _ESCAPE.sub(_unified, urllib.parse.quote(parts.path, safe="/%!$&'()*+,;=:@")).rstrip('/')
    kept = sorted(item for item in query if not _TRACKING.fullmatch(item[0]))
    shown = f'?{urllib.parse.urlencode(kept, errors="surrogateescape")}' if kept else ''
    return f'{host}{port}{path}{shown}' + (f'#{parts.fragment}' if parts.fragment.startswith(('!', '/')) else '')


def _unified(escape: re.Match[str]) -> str:
    character = chr(int(escape[0][1:], 16))
    return character if character in _UNRESERVED else escape[0].upper()


def id_keys(
    ids: Sequence[str], sources: Sequence[str], among: Literal['source', 'all']
) -> tuple[list[int], list[bytes]]:
    """(which of the documents have an id that is compared, what is compared of each of those).

    Among the documents of a source, an id of digits alone is none: files often count their records anew, and what would
    go is other documents.
    """
    if among == 'all':
        return list(range(len(ids))), [identity.encode() for identity in ids]
    some = [i for i, identity in enumerate(ids) if not identity.isdecimal()]
    return some, [f'{sources[i]}\0{ids[i]}'.encode() for i in some]


def compared(
    config: Deduplication,
    ids: Sequence[str],
    sources: Sequence[str],
    urls: Sequence[str | None],
    texts: Sequence[str],
    words: Hashes,
) -> Iterator[tuple[str, list[int], list[bytes]]]:
    """(rule, which of the documents it compares, what is compared of each of those) of the rules that are on.

    Args:
        words: of the texts.
    """
    if config.ids:
        yield 'id', *id_keys(ids, sources, config.ids)
    if config.urls:
        normalized = [normalized_url(url or '') for url in urls]
        known = [i for i, url in enumerate(normalized) if url]
        yield 'url', known, [normalized[i].encode() for i in known]
    if config.documents:
        values = [text.encode() for text in texts] if config.documents == 'text' else word_bytes(words)
        yield 'document', list(range(len(texts))), values


def digests(values: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """128 bits of each value, as two uint64 [values]."""
    data = np.frombuffer(b''.join([hashlib.blake2b(value, digest_size=16).digest() for value in values]), np.uint64)
    return data[0::2], data[1::2]


def word_bytes(words: Hashes) -> list[bytes]:
    """For each document what its words are, for `digests`."""
    return [words[i].tobytes() for i in range(len(words))]


def equal_to_first(keys: np.ndarray, checks: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(node, smallest of its group) for all documents but the first of every group of equal key and check."""
    order = np.lexsort((nodes, checks, keys))
    keys, checks, nodes = keys[order], checks[order], nodes[order]
    starts = group_starts(keys, checks)
    first = np.repeat(nodes[starts], group_sizes(starts, len(nodes)))
    others = nodes != first
    return nodes[others], first[others]
