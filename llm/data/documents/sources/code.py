"""Source code in directories: each file a document, with its programming language and its licence."""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence

from llm.data.documents.document import Ignored, Quarantined, valid_text
from llm.data.documents.sources.files import FileShard, FileSource, InputShard, Item
from llm.data.documents.sources.texts import decoded
from llm.data.sources.files import unreadable
from llm.errors import UserError

_SKIPPED = ('.git', '.hg', '.svn', 'node_modules', '__pycache__', '.venv', 'vendor', 'third_party', 'site-packages')
_LICENCE_FILES = re.compile(r'^(?:licen[cs]e|copying|unlicense)(?:[.-].*)?$', re.I)
_SPDX = re.compile(rb'SPDX-License-Identifier:\s*([\w.+-]+(?:\s+(?:AND|OR|WITH)\s+[\w.+-]+)*)')
# Tags of `identify` that name no language.
_GENERAL = ('file', 'text', 'executable', 'non-executable', 'directory', 'symlink', 'socket', 'binary')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code(FileSource):
    """Files of source trees. A directory that the glob matches is one shard: a repository, as a rule.

    The licence of a file is the SPDX identifier at its top, else that of the nearest LICENSE or COPYING file above it.
    The language, found by its name or its first line, is metadata's 'programming_language'.

    Args:
        files: glob or globs of directories.
        languages: those that are read, as `identify` names them ('python', 'c++'); empty reads all text files.
        skipped: names of directories that are not entered.
    """

    languages: tuple[str, ...] = ()
    skipped: tuple[str, ...] = _SKIPPED

    def shards(self) -> Sequence[InputShard]:
        patterns = (self.files,) if isinstance(self.files, str) else self.files
        found = sorted(
            {path for pattern in patterns for path in glob.glob(os.path.expanduser(pattern), recursive=True)}
        )
        directories = [path.rstrip('/') for path in found if os.path.isdir(path)]
        if not directories:
            raise UserError(f'no directory matches {self.files!r}', where=self.name, fix='Give a glob of directories.')
        real = {os.path.realpath(path): path for path in directories}
        for outer, inner in itertools.pairwise(sorted(real, key=lambda path: path.split('/'))):
            if inner.startswith(f'{outer}/'):
                what = f'lies within {real[outer]!r}, which is given, too: its files would be read twice'
                raise UserError(what, where=real[inner], fix='Narrow the glob.')
        return [CodeShard(path, self) for path in sorted(real.values())]

    def paths(self, directory: str) -> Iterator[str]:
        """Regular files below a directory in a fixed order: no links, and no pipes, at which reading would wait.

        Raises UserError for a directory that cannot be listed: what is in it would be left out in silence.
        """
        for folder, names, files in os.walk(directory, onerror=_refuse):
            names[:] = sorted(name for name in names if name not in self.skipped)
            for path in (os.path.join(folder, name) for name in sorted(files)):
                if os.path.isfile(path) and not os.path.islink(path):
                    yield path

    def read(self, path: str) -> Iterator[Item]:
        from identify import identify

        licences: dict[str, str | None] = {}
        for file in self.paths(path):
            try:
                tags = identify.tags_from_path(file)
                size = os.path.getsize(file)
                if 'text' not in tags:
                    yield Ignored('binary file')
                    continue
                languages = sorted(tags.difference(_GENERAL))
                if self.languages and not set(languages) & set(self.languages):
                    yield Ignored('other programming language')
                    continue
                if size > self.max_document_bytes:
                    yield Quarantined(file, f'{size:,} bytes, more than max_document_bytes')
                    continue
                with open(file, 'rb') as opened:
                    data = opened.read()
                marked = _SPDX.search(data[:4096])
                licence = marked[1].decode() if marked else _licence_above(os.path.dirname(file), path, licences)
            except (OSError, ValueError) as error:
                yield Quarantined(file, f'cannot be read ({error})')
                continue
            name = os.path.relpath(file, path)
            fields = {
                'text': decoded(data),
                'licence': licence,
                'metadata': {'path': valid_text(name)[0], 'programming_language': languages[0] if languages else None},
            }
            yield self.document(f'{self.name}:{file}', fields)


@dataclasses.dataclass(frozen=True)
class CodeShard(FileShard):
    """One source tree."""

    source: Code

    def fingerprint(self) -> str:
        """Of names, sizes and times of all files, and of the settings."""
        try:
            listing = [
                (path, (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in self.source.paths(self.path)
            ]
        except OSError as error:  # gone since it was listed
            raise unreadable(self.path, error) from error
        settings = {field.name: getattr(self.source, field.name) for field in dataclasses.fields(self.source)}
        return hashlib.sha256(json.dumps([listing, settings], sort_keys=True).encode()).hexdigest()


def _refuse(error: OSError) -> None:
    raise unreadable(str(error.filename), error) from error


def _licence_above(directory: str, root: str, known: dict[str, str | None]) -> str | None:
    """SPDX identifier of the licence file in a directory or the nearest above it, up to the root."""
    if directory not in known:
        from identify import identify

        found = None
        for name in sorted(os.listdir(directory)):
            if _LICENCE_FILES.match(name) and found is None and os.path.isfile(path := os.path.join(directory, name)):
                try:
                    found = identify.license_id(path)
                except (OSError, UnicodeDecodeError):
                    found = None
        if found is None and os.path.realpath(directory) != os.path.realpath(root):
            found = _licence_above(os.path.dirname(directory), root, known)
        known[directory] = found
    return known[directory]
