"""Texts as hashes of their words and n-grams: one tokenisation of a whole batch, in Arrow and NumPy.

A word is what is left between white space once text is in lower case, punctuation, symbols and control characters are
spaces and accents are gone, as in FineWeb (datatrove, simplify_text). Its numbers become '0', too; here they stay, lest
two sums be one document. Characters of scripts that put no spaces between words are words of their own.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Letters that may have accents or are made of others, marks, and scripts without spaces: what asks for more than is
# done to all texts. Every character that NFD changes is here, lest a word depend on what else is in its text.
_SCRIPTS = r'\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}'
_DECOMPOSED = (
    r'\x{c0}-\x{24f}\x{370}-\x{3ff}\x{400}-\x{45f}\x{476}-\x{4f9}\x{622}-\x{626}\x{6c0}-\x{6d3}\x{929}-\x{934}'
    r'\x{958}-\x{95f}\x{9dc}-\x{9df}\x{a33}-\x{a5e}\x{b5c}-\x{b94}\x{f43}-\x{f69}\x{1b06}-\x{1b12}\x{1e00}-\x{1fff}'
    r'\x{ac00}-\x{d7a3}\x{fb1d}-\x{fb4e}\x{1109a}-\x{110ab}'
)
_NEEDS_CARE = rf'[{_DECOMPOSED}\p{{M}}{_SCRIPTS}]'
_WITHOUT_SPACES = f'([{_SCRIPTS}])'
# In UTF-8 every byte below 128 is a character: a table of bytes does ASCII, and a pattern what is left.
_ASCII = bytes(c if c > 127 or chr(c).isalnum() else ord(' ') for c in range(256))
_OTHER_SEPARATORS = r'[\p{P}\p{S}\x{80}-\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]'
# Characters that are between words whatever stands around them: a text may be cut at them and its words stay.
CUTS = ' \n\t'
# Multipliers of n-gram hashes: odd, of no pattern. Two give two hashes that are independent.
_BASE, _CHECK_BASE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)


@dataclasses.dataclass(frozen=True)
class Hashes:
    """64-bit hashes of a batch of documents, one document after the other.

    Attributes:
        values: uint64 [total]. offsets: int64 [documents + 1]: document i has values[offsets[i]:offsets[i + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def counts(self) -> np.ndarray:
        """int64 [documents]."""
        return np.diff(self.offsets)


def normalized(texts: Sequence[str]) -> Any:
    """The texts as Arrow strings of words with ASCII spaces between them, and perhaps around."""
    import pyarrow
    from pyarrow import compute

    column = compute.utf8_lower(pyarrow.array(texts, pyarrow.large_string()))
    _, offsets, data = column.buffers()
    if data is not None:
        data = pyarrow.py_buffer(data.to_pybytes().translate(_ASCII))
        column = pyarrow.Array.from_buffers(column.type, len(column), [None, offsets, data])
    foreign = compute.invert(compute.string_is_ascii(column))
    if not compute.any(foreign).as_py():
        return column
    column = _replaced(column, foreign, lambda part: compute.replace_substring_regex(part, _OTHER_SEPARATORS, ' '))
    return _replaced(column, compute.match_substring_regex(column, _NEEDS_CARE), _with_care)


def _with_care(column: Any) -> Any:
    from pyarrow import compute

    column = compute.replace_substring_regex(compute.utf8_normalize(column, 'NFD'), r'\p{Mn}+', '')
    return compute.replace_substring_regex(column, _WITHOUT_SPACES, r' \1 ')


def _replaced(column: Any, where: Any, function: Callable[[Any], Any]) -> Any:
    """The column with `function` of those rows where `where` is true."""
    from pyarrow import compute

    if not compute.any(where).as_py():
        return column
    return compute.replace_with_mask(column, where, function(column.filter(where)))


def words_of(texts: Sequence[str]) -> Hashes:
    """The words of each text."""
    words, indices, offsets = split_words(normalized(texts))
    table = word_hashes(words)
    return Hashes(table[indices] if len(table) else table, offsets)


def split_words(column: Any) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Arrow strings at their ASCII white space.

    Returns:
        The different words, '' among them where a text has none; which of them each word is; and [texts + 1], where
        the words of each text begin.
    """
    from pyarrow import compute

    column = compute.ascii_trim_whitespace(column)
    lists = compute.ascii_split_whitespace(column)
    # An empty text is split into one empty word.
    empty = compute.equal(compute.binary_length(column), 0).to_numpy(zero_copy_only=False)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    encoded = lists.values.dictionary_encode()
    indices = encoded.indices.to_numpy()
    if empty.any():
        indices = np.delete(indices, offsets[:-1][empty])
        offsets = np.concatenate([[0], np.cumsum(np.diff(offsets) - empty)])
    return encoded.dictionary.to_pylist(), indices, offsets


def word_hashes(words: Sequence[str]) -> np.ndarray:
    """uint64: the hash of each word."""
    return np.frombuffer(b''.join([_digest(word.encode()) for word in words]), np.uint64)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()


def ngrams(words: Hashes, n: int, *, whole: bool = True, base: np.uint64 = _BASE) -> Hashes:
    """Hashes of all runs of n words of each document, in order.

    Args:
        whole: a document of fewer than n words gives one hash, of all of them; False gives it none.
    """
    starts, counts = words.offsets[:-1], words.counts
    numbers = np.maximum(counts - n + 1, 0)
    hashes = _windows(words.values, n, base)
    short = np.flatnonzero((counts > 0) & (counts < n)) if whole else np.zeros(0, np.int64)
    numbers[short] = 1
    offsets = np.concatenate([[0], np.cumsum(numbers)])
    # Where each n-gram begins among the words.
    positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], numbers)
    padded = np.concatenate([hashes, np.zeros(len(words.values) - len(hashes), np.uint64)])
    values = padded[positions]
    for document in short.tolist():
        values[offsets[document]] = _windows(words[document], int(counts[document]), base)[0]
    return Hashes(values, offsets)


def checks(words: Hashes, n: int) -> np.ndarray:
    """uint32 [total]: for each n-gram that `ngrams` gives without `whole`, a second hash that is independent."""
    return (ngrams(words, n, whole=False, base=_CHECK_BASE).values >> np.uint64(32)).astype(np.uint32)


def _windows(values: np.ndarray, n: int, base: np.uint64) -> np.ndarray:
    """Hash of values[i:i + n] for each i: a polynomial, put together from powers of two, then mixed."""
    result, length = None, 0
    block, size, power = values, 1, int(base)
    rest = n
    while True:
        if rest & 1:
            if result is None:
                result = block
            else:  # the block lies before what there is
                common = len(values) - length - size + 1
                factor = np.uint64(pow(int(base), length, 1 << 64))
                result = block[: max(common, 0)] * factor + result[size : size + max(common, 0)]
            length += size
        rest >>= 1
        if not rest:
            break
        block = block[: max(len(block) - size, 0)] * np.uint64(power) + block[size:]
        size, power = 2 * size, power * power % (1 << 64)
    assert result is not None
    return mixed(result + np.uint64(n))


def mixed(values: np.ndarray) -> np.ndarray:
    """A permutation of 64-bit numbers that makes each bit depend on all (SplitMix64's; Steele et al. 2014)."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def as_sets(hashes: Hashes) -> Hashes:
    """Each document's hashes sorted, each once."""
    owners = np.repeat(np.arange(len(hashes)), hashes.counts)
    values = hashes.values.copy()
    for start, end in zip(hashes.offsets[:-1], hashes.offsets[1:], strict=True):
        values[start:end].sort()
    first = np.ones(len(values), bool)
    first[1:] = (values[1:] != values[:-1]) | (owners[1:] != owners[:-1])
    counts = np.bincount(owners[first], minlength=len(hashes))
    return Hashes(values[first], np.concatenate([[0], np.cumsum(counts)]))


def word_spans(texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """For each word of each text, where the part between white space that it is in begins and ends, in characters.

    Characters of scripts without spaces are parts of their own.
    """
    parts = [[match.span() for match in _parts().finditer(text)] for text in texts]
    flat = [text[start:end] for text, some in zip(texts, parts, strict=True) for start, end in some]
    counts = iter(words_of(flat).counts.tolist())
    return [[part for part in some for _ in range(next(counts))] for some in parts]


@functools.cache
def _parts() -> Any:
    import re

    import pyarrow
    from pyarrow import compute

    # As Arrow has these scripts, a character with the accents behind it: whole texts and parts have the same words.
    codes = np.concatenate([np.arange(0x80, 0xD800), np.arange(0xE000, 0x33480)])
    column = pyarrow.array(list(map(chr, codes.tolist())))
    accents, scripts = (
        compute.match_substring_regex(column, pattern).to_numpy(zero_copy_only=False)
        for pattern in (r'\p{Mn}', f'[{_SCRIPTS}]')
    )
    alone = _ranges(codes[scripts & ~accents])
    return re.compile(f'[{alone}][{_ranges(codes[accents])}]*|[^{CUTS}{alone}]+')


def _ranges(codes: np.ndarray) -> str:
    """Characters as they stand between the brackets of a pattern."""
    runs = np.split(codes, np.flatnonzero(np.diff(codes) > 1) + 1)
    return ''.join(f'{chr(run[0])}-{chr(run[-1])}' for run in runs)
