"""Hash tables of n-grams in NumPy: open addressing with linear probing, for whole arrays of keys at once.

An n-gram is known by the place of its first n - 1 tokens in the table of these, and its last token. So keys are exact,
and a place is found only where the context is there, as in every model with back-off. Tables are plain arrays that
processes map into memory and share.
"""

import numpy as np

from llm.data.documents.ngram_models.tokens import BITS

# log10 of the probability of the last token given the others, and of what the n-gram gives away as a context.
ENTRY = np.dtype([('key', 'u8'), ('probability', 'f4'), ('backoff', 'f4')])
UNIGRAM = np.dtype([('probability', 'f4'), ('backoff', 'f4')])
_EMPTY = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
# Places for each entry: fewer make chains longer, more take memory.
_ROOM = 2.0
# Key is context << BITS | token, so there are contexts for this many places.
MAX_PLACES = 1 << 32


def keys_of(contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """uint64: the keys of n-grams.

    Args:
        contexts: places of all tokens but the last. tokens: ids of the last.
    """
    return (contexts.astype(np.uint64) << np.uint64(BITS)) | tokens.astype(np.uint64)


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(contexts, tokens), int64: the inverse of `keys_of`."""
    return (keys >> np.uint64(BITS)).astype(np.int64), (keys & np.uint64((1 << BITS) - 1)).astype(np.int64)


def build_table(keys: np.ndarray, probabilities: np.ndarray, backoffs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the table, the place of each n-gram in it). Keys must be different; raises ValueError where they are not."""
    table = np.zeros(max(8, int(len(keys) * _ROOM)), ENTRY)
    assert len(table) < MAX_PLACES
    column = table['key']
    column[:] = _EMPTY
    places = _first_places(keys, len(table)).astype(np.int64)
    left = np.arange(len(keys))
    while len(left):
        wanted = places[left]
        free = column[wanted] == _EMPTY
        some, there = left[free], wanted[free]
        column[there] = keys[some]  # of several that want one place, the last has it
        won = column[there] == keys[some]
        if len(np.unique(there[won])) < won.sum():
            raise ValueError('an n-gram is there twice')
        left = np.concatenate([left[~free], some[~won]])
        if (column[places[left]] == keys[left]).any():
            raise ValueError('an n-gram is there twice')
        places[left] = (places[left] + 1) % len(table)
    table['probability'][places], table['backoff'][places] = probabilities, backoffs
    return table, places


def find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place of each key, -1 where it is not there; the entries at those that are, in order)."""
    places = _first_places(keys, len(table)).astype(np.int64)
    # A complex number of 16 bytes is what NumPy gathers fastest; it is only copied.
    raw = table.view(np.complex128)
    entries = raw.take(places).view(ENTRY)
    found = entries['key']
    right = found == keys
    left = np.flatnonzero(~right & (found != _EMPTY))
    missing = ~right
    while len(left):
        there = places[left] + 1
        there[there == len(table)] = 0
        places[left] = there
        some = raw.take(there).view(ENTRY)
        hit = some['key'] == keys[left]
        missing[left[hit]] = False
        entries[left[hit]] = some[hit]
        left = left[~hit & (some['key'] != _EMPTY)]
    places[missing] = -1
    return places, entries[~missing]


def _first_places(keys: np.ndarray, size: int) -> np.ndarray:
    """uint64: where the search for each key begins."""
    mixed = keys * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD1342543DE82EF95)
    mixed >>= np.uint64(32)
    mixed *= np.uint64(size)
    mixed >>= np.uint64(32)
    return mixed
