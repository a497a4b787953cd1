"""C4's rule of bad words (Raffel et al. 2020, section 2.2): pages that have one of a list go. The lists are yours."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document, Verdict
from llm.data.sources.files import file_identity, file_states, find_files, stream_bytes

_RULE = 'bad_words'
_SUFFIXES = tuple(f'{kind}{packing}' for kind in ('.txt', '') for packing in ('', '.gz', '.zst', '.bz2'))
# Written without white space between words: what is on the list counts wherever it stands.
_UNSPACED = ('ja', 'th', 'zh')
_WORD = re.compile(r'\w+')
_List = tuple[tuple[str, ...], tuple[Any, ...]]  # files and their states


@dataclasses.dataclass(frozen=True)
class BadWords:
    """Removes documents that have words or phrases of a list, as datatrove's C4BadWordsFilter finds them.

    C4 took the lists of github.com/LDNOOBW, a file a language. Such lists also remove pages on health and on minorities
    (Dodge et al. 2021), so the figure is in the ledger, and `most` can allow some.

    Args:
        lists: (language, file or glob) pairs: a word or phrase a line, in any case; '#' begins a comment. A language of
            '' is for all documents, also those whose language is not known; documents without a list stay.
        most: times that words of the list may come up.
    """

    lists: tuple[tuple[str, str], ...]
    most: int = 0

    name = 'bad_words'
    rules = (_RULE,)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        return (Bounds(_RULE, most=self.most),)

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        results = []
        (bounds,) = self.bounds
        lists = [(language, (paths, file_states(paths))) for language, paths in self._paths()]
        for document in documents:
            count = _count(document, tuple(some for language, some in lists if language in ('', document.language)))
            results.append(document.judged(Verdict(_RULE, bounds.keeps(count), count)))
        return results

    def identities(self) -> list[str]:
        """Change where the content of the lists does."""
        return [file_identity(path) for _, paths in self._paths() for path in paths]

    def _paths(self) -> list[tuple[str, tuple[str, ...]]]:
        """(language, files)"""
        return [(language, find_files(pattern, _SUFFIXES)) for language, pattern in self.lists]


def _count(document: Document, lists: tuple[_List, ...]) -> int | None:
    """Times that words of the lists come up; None without a list."""
    if not lists:
        return None
    text = document.text.lower()
    words, phrases = _entries(lists)
    if document.language in _UNSPACED:
        return sum(text.count(entry) for entry in (*words, *phrases))
    count = sum(word in words for word in _WORD.findall(text))
    for phrase in phrases:
        if phrase in text:
            count += len(re.findall(rf'(?<!\w){re.escape(phrase)}(?!\w)', text))
    return count


@functools.lru_cache(maxsize=64)
def _entries(lists: tuple[_List, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """(those that are one word, the others) of lists, which are read once in a process while they stay."""
    entries: set[str] = set()
    for path in (path for paths, _ in lists for path in paths):
        lines = b''.join(stream_bytes(path)).decode(errors='replace').splitlines()
        entries |= {line.partition('#')[0].strip().lower() for line in lines}
    entries.discard('')
    words = {entry for entry in entries if _WORD.fullmatch(entry)}
    return frozenset(words), tuple(sorted(entries - words))
