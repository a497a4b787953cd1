"""Documents that are equal: by id, by URL, by their words or by their text. Digests have 128 bits."""

import hashlib
import re
import urllib.parse

import numpy as np

from llm.data.documents.deduplication.sorted_runs import group_sizes, group_starts
from llm.data.documents.deduplication.words import Hashes

# Parameters of URLs that say where a visitor came from and not what is shown.
_TRACKING = ('utm_', 'fbclid', 'gclid', 'dclid', 'msclkid', 'mc_cid', 'mc_eid', 'igshid', 'yclid', '_ga')
_DEFAULT_PORTS = {'http': ':80', 'https': ':443'}

_ESCAPE = re.compile('%[0-9A-Fa-f]{2}')
_UNRESERVED = frozenset('ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~')  # RFC 3986, 2.3


def normalized_url(url: str) -> str:
    """One URL for those that show the same page almost surely; empty for what names no host, as 'n/a' and '#top'.

    Scheme, `www.`, default port, user, fragment, parameters of tracking and a slash at the end are left out; the host
    is in lower case, escapes are unified, and parameters are sorted.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host = (parts.hostname or '').removeprefix('www.').rstrip('.')
        port = f':{parts.port}' if parts.port else ''
        query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    except ValueError:  # as of an unclosed IPv6 address
        return url.strip()
    if not host:
        return ''
    if port == _DEFAULT_PORTS.get(parts.scheme):
        port = ''
    path = _ESCAPE.sub(_unified, urllib.parse.quote(parts.path, safe="/%!$&'()*+,;=:@")).rstrip('/')
    kept = sorted(item for item in query if not item[0].lower().startswith(_TRACKING))
    return f'{host}{port}{path}' + (f'?{urllib.parse.urlencode(kept)}' if kept else '')


def _unified(escape: re.Match[str]) -> str:
    character = chr(int(escape[0][1:], 16))
    return character if character in _UNRESERVED else escape[0].upper()


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
