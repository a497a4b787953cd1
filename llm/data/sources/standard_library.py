"""Real text that every machine has: the Python source files of the standard library, about 11 MB."""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llm.data.sources.documents import ReadCounts, Split
from llm.data.sources.files import unreadable
from llm.errors import UserError

# Part of every fingerprint: raise it when a change here changes what is read from the same files.
_READER_VERSION = 1
_TEST_FOLDERS = ('test', 'tests', 'idle_test')
# Files that share this part of their shingles are near-duplicates. In CPython 3.11 the families (character maps,
# codecs, bz2 and lzma, the msvc compilers) have neighbours at 0.2 and above, and no unrelated files reach 0.1.
_NEAR_DUPLICATE_SIMILARITY = 0.2
_SHINGLE_LINES = 3


@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The .py files of `sys.stdlib_module_names` of the running interpreter, one document a file.

    Left out: tests, `encodings/cp*` and `_sysconfigdata*` (tables), empty files, exact duplicates. Near-duplicates
    stand on one side of the split. No module is imported; site-packages and the order of the file system play no part.

    Args:
        validation_fraction: the part of the files, from 0 to 1, chosen for validation by a hash of their path (a
            family of near-duplicates goes by its first path in alphabetical order).
        split_salt: another salt gives another choice.
    """

    validation_fraction: float = 0.05
    split_salt: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise UserError(f'validation_fraction = {self.validation_fraction} is not between 0 and 1')

    def shards(self, split: Split) -> list['StandardLibraryShard']:
        """One shard. Raises UserError where the interpreter has no library source files."""
        root = library_folder()
        chosen = tuple(sorted(path for path, side in self._sides().items() if side == split))
        return [StandardLibraryShard(f'standard_library/{split}', root, chosen)]

    def train_bytes(self) -> bytes:
        """The training documents one after another, in UTF-8."""
        return self._concatenated('train')

    def validation_bytes(self) -> bytes:
        """The validation documents one after another, in UTF-8."""
        return self._concatenated('validation')

    def corpus_digest(self) -> str:
        """SHA-256 in hex of every path, its split and its content: what a result on this corpus is comparable by."""
        digest = hashlib.sha256()
        texts = _library_texts(library_folder())
        for path, side in sorted(self._sides().items()):
            digest.update(f'{path}\0{side}\0{hashlib.sha256(texts[path].encode()).hexdigest()}\n'.encode())
        return digest.hexdigest()

    def _concatenated(self, split: Split) -> bytes:
        (shard,) = self.shards(split)
        return b''.join(text.encode() for text in shard.documents(ReadCounts()))

    def _sides(self) -> dict[str, Split]:
        """The split of every file, by path. Neither split is empty: the library has hundreds of families."""
        return {path: self._side(family[0]) for family in near_duplicate_families(library_folder()) for path in family}

    def _side(self, path: str) -> Literal['train', 'validation']:
        digest = hashlib.sha256(f'{self.split_salt}:{path}'.encode()).digest()
        share = int.from_bytes(digest[:8], 'big') / 2**64
        return 'validation' if share < self.validation_fraction else 'train'


@dataclasses.dataclass(frozen=True)
class StandardLibraryShard:
    """The library's files of one split: `paths` relative to `root`, in order."""

    name: str
    root: str
    paths: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 of the documents' contents in order."""
        texts = _library_texts(self.root)
        contents = [hashlib.sha256(texts[path].encode()).hexdigest() for path in self.paths]
        return hashlib.sha256(json.dumps(['standard_library', _READER_VERSION, contents]).encode()).hexdigest()

    def documents(self, counts: ReadCounts) -> Iterator[str]:
        """The files' texts in the order of their paths."""
        texts = _library_texts(self.root)
        for path in self.paths:
            counts.add_document(len(texts[path].encode()))
            yield texts[path]


def library_folder() -> str:
    """Where the running interpreter keeps its library; inside a virtual environment, that of its base."""
    return sysconfig.get_path('stdlib')


@functools.lru_cache(maxsize=2)
def _library_texts(root: str) -> dict[str, str]:
    """The text of every file that belongs to the corpus, by its path relative to `root`, in the order of the paths."""
    texts: dict[str, str] = {}
    seen: set[str] = set()
    for path in sorted(_library_files(Path(root)), key=lambda path: path.relative_to(root).as_posix()):
        text = _read_source(path)
        if text and not text.isspace() and text not in seen:
            seen.add(text)
            texts[path.relative_to(root).as_posix()] = text
    if not texts:
        raise UserError(
            'the interpreter has no library source files here',
            where=root,
            fix='Use a usual build of Python (not one with a zipped library), or TextFiles with files of your own',
        )
    return texts


def _library_files(root: Path) -> Iterator[Path]:
    for module in sys.stdlib_module_names:
        single, package = root / f'{module}.py', root / module
        for path in [single] if single.is_file() else package.rglob('*.py') if package.is_dir() else []:
            folders = path.relative_to(root).parts[:-1]
            is_test = any(folder in _TEST_FOLDERS for folder in folders) or path.name.startswith('test_')
            is_table = (folders == ('encodings',) and path.name.startswith('cp')) or '_sysconfigdata' in path.name
            if not is_test and not is_table and 'site-packages' not in folders:
                yield path


def _read_source(path: Path) -> str:
    """The text of a source file as it stands: its own encoding, its own line ends."""
    try:
        with path.open('rb') as file:
            encoding, _ = tokenize.detect_encoding(file.readline)
        return path.read_bytes().decode(encoding)
    except OSError as error:
        raise unreadable(str(path), error) from error


@functools.lru_cache(maxsize=2)
def near_duplicate_families(root: str) -> tuple[tuple[str, ...], ...]:
    """The corpus's files under `root` in families, each sorted; most have one member.

    Two files are near-duplicates when the Jaccard similarity of their sets of three consecutive non-blank lines is at
    least 0.2; families are the connected components. All pairs are compared exactly, through an index by shingle.
    """
    shingles = {path: _shingles(text) for path, text in _library_texts(root).items()}
    holders: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for path, own in shingles.items():
        for shingle in own:
            holders[shingle].append(path)
    shared = collections.Counter(
        pair for paths in holders.values() if len(paths) > 1 for pair in itertools.combinations(paths, 2)
    )
    family = {path: path for path in shingles}

    def first(path: str) -> str:
        while family[path] != path:
            path = family[path]
        return path

    for (left, right), common in shared.items():
        if common >= _NEAR_DUPLICATE_SIMILARITY * (len(shingles[left]) + len(shingles[right]) - common):
            one, other = sorted((first(left), first(right)))
            family[other] = one
    members: dict[str, list[str]] = collections.defaultdict(list)
    for path in sorted(shingles):
        members[first(path)].append(path)
    return tuple(tuple(paths) for _, paths in sorted(members.items()))


def _shingles(text: str) -> set[tuple[str, ...]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {tuple(lines[i : i + _SHINGLE_LINES]) for i in range(max(1, len(lines) - _SHINGLE_LINES + 1))}
