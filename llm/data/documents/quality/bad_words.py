"""C4's rule of bad words (Raffel et al. 2020, section 2.2): pages that have one of a list go. The lists are yours."""

import dataclasses
import functools
import re
from collections.abc import Sequence

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document, Verdict
from llm.data.sources.files import file_identity, find_files, stream_bytes

_RULE = 'bad_words'
_SUFFIXES = tuple(f'{kind}{packing}' for kind in ('.txt', '') for packing in ('', '.gz', '.zst', '.bz2'))
# Written without white space between words: what is on the list counts wherever it stands.
_UNSPACED = ('ja', 'th', 'zh')
_WORD = re.compile(r'\w+')


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
        for document in documents:
            count = self._count(document)
            results.append(document.judged(Verdict(_RULE, bounds.keeps(count), count)))
        return results

    def identities(self) -> list[str]:
        """Change where the content of the lists does."""
        return [file_identity(path) for _, pattern in self.lists for path in find_files(pattern, _SUFFIXES)]

    def _count(self, document: Document) -> int | None:
        """Times that words of the lists for a document come up; None without a list."""
        patterns = [pattern for language, pattern in self.lists if language in ('', document.language)]
        if not patterns:
            return None
        text = document.text.lower()
        words, phrases = _entries(tuple(patterns))
        if document.language in _UNSPACED:
            return sum(text.count(entry) for entry in (*words, *phrases))
        count = sum(word in words for word in _WORD.findall(text))
        for phrase in phrases:
            if phrase in text:
                count += len(re.findall(rf'(?<!\w){re.escape(phrase)}(?!\w)', text))
        return count


@functools.cache
def _entries(patterns: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """(those that are one word, the others) of lists, which are read once in a process."""
    entries: set[str] = set()
    for path in (path for pattern in patterns for path in find_files(pattern, _SUFFIXES)):
        lines = b''.join(stream_bytes(path)).decode(errors='replace').splitlines()
        entries |= {line.partition('#')[0].strip().lower() for line in lines}
    entries.discard('')
    words = {entry for entry in entries if _WORD.fullmatch(entry)}
    return frozenset(words), tuple(sorted(entries - words))
