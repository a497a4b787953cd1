"""Documents from one's own files: plain text, JSON lines and parquet, also compressed."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any, Literal

from llm.data.sources.documents import ReadCounts, Split
from llm.data.sources.files import content_digest, cut_stream, find_files, split_stream, stream_bytes, unreadable
from llm.errors import UserError

SUFFIXES = tuple(
    f'{kind}{packing}' for kind in ('.txt', '.jsonl', '.json') for packing in ('', '.gz', '.zst')
) + ('.parquet',)  # fmt: skip

# Part of every fingerprint: raise it when a change here changes what is read from the same file.
_READER_VERSION = 1
# A plain text longer than this is cut into pieces, so that a lone file gives both splits and any file fits in memory.
_LONG_TEXT_BYTES = 64 * 1024
_PIECE_BYTES = 2 * 1024
_MAX_JOINED_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Text files by globs: .txt, .jsonl and .json (an object a line), each also as .gz and .zst, and .parquet.

    A .txt file is one document, unless `document_separator` is given. One longer than 64 KiB is cut at blank lines or
    lines into pieces of about 2 KiB, each piece goes to its split, and neighbours of one split are joined again, up to
    1 MiB: so a single file of any size gives training documents that are long and a validation split beside them.

    Args:
        files: glob or globs.
        text_field: the field (JSON) or column (parquet) that holds the text.
        document_separator: what stands between the documents of a .txt file, for example '<|endoftext|>'.
        invalid_utf8: what to do with a document that is not valid UTF-8: replace what is invalid by U+FFFD, skip the
            document, or stop with an error. It is counted in any case.
        validation_fraction: the part of the documents, from 0 to 1, chosen for validation by a hash of their content:
            the same text is always in the same split, wherever it stands.
        validation_files: glob or globs of files that are the validation split. None of them is read for training,
            and validation_fraction is then not used.
        split_salt: another salt gives another choice of validation documents.
        max_bad_records: how many records may be left out as bad (not JSON, no text, skipped for invalid UTF-8) in
            a split before reading stops with an error.
        fingerprint_by: what says that a file has changed: its content, or only its path, size and modification time
            (for corpora too large to be read once more at each start).
    """

    files: str | tuple[str, ...]
    text_field: str = 'text'
    document_separator: str | None = None
    invalid_utf8: Literal['replace', 'skip', 'stop'] = 'replace'
    validation_fraction: float = 0.01
    validation_files: str | tuple[str, ...] | None = None
    split_salt: int = 0
    max_bad_records: int = 100
    fingerprint_by: Literal['content', 'modification_time'] = 'content'

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f'validation_fraction = {self.validation_fraction} is not in [0, 1)')
        if self.document_separator == '':
            raise UserError('document_separator is empty', fix='Use None for one document a file')
        if self.max_bad_records < 0:
            raise UserError(f'max_bad_records = {self.max_bad_records} is negative')

    def shards(self, split: Split) -> list['TextFileShard']:
        """One shard a file. Raises UserError for globs that match nothing and for a split that can have no document."""
        held_out = find_files(self.validation_files, SUFFIXES) if self.validation_files is not None else ()
        if split == 'validation':
            if self.validation_files is None and self.validation_fraction == 0:
                raise UserError(
                    'there is no validation split: validation_fraction is 0',
                    fix='Set validation_fraction, or validation_files',
                )
            paths = held_out or find_files(self.files, SUFFIXES)
        else:
            kept_back = {os.path.realpath(path) for path in held_out}
            found = find_files(self.files, SUFFIXES)
            paths = tuple(path for path in found if os.path.realpath(path) not in kept_back)
            if not paths:
                raise UserError('every file is one of validation_files', where=found[0], fix='Give others to train on')
        return [TextFileShard(path, path, split, self) for path in paths]


@dataclasses.dataclass(frozen=True)
class TextFileShard:
    """One file of a `TextFiles`, read for one split."""

    name: str
    path: str
    split: Split
    source: TextFiles

    def fingerprint(self) -> str:
        """SHA-256 of the file (or of its path, size and time) and of the settings that decide what is read from it."""
        if self.source.fingerprint_by == 'content':
            identity = content_digest(self.path).hex()
        else:
            try:
                stat = os.stat(self.path)
            except OSError as error:
                raise unreadable(self.path, error) from error
            identity = f'{os.path.abspath(self.path)}:{stat.st_size}:{stat.st_mtime_ns}'
        by_hash = self.source.validation_files is None
        settings = {
            'reader': _READER_VERSION,
            'content': identity,
            'kind': _kind(self.path),
            'text_field': self.source.text_field if _kind(self.path) != 'txt' else None,
            'document_separator': self.source.document_separator if _kind(self.path) == 'txt' else None,
            'invalid_utf8': self.source.invalid_utf8,
            'split': [self.split, self.source.validation_fraction, self.source.split_salt] if by_hash else None,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def documents(self, counts: ReadCounts) -> Iterator[str]:
        """The file's documents of this split, in the file's order. Raises UserError as `Shard.documents` says."""
        counts.max_bad_records = self.source.max_bad_records
        kind = _kind(self.path)
        if kind == 'txt' and self.source.document_separator is None:
            yield from self._plain_text(counts)
            return
        texts = {'txt': self._separated_texts, 'json': self._json_texts, 'parquet': self._parquet_texts}[kind](counts)
        for text in texts:
            yield from self._give(text, self._side(text), counts)

    def _side(self, text: str) -> Split | None:
        """The split that a text belongs to; an empty one belongs to none."""
        if not text or text.isspace():
            return None
        if self.source.validation_files is not None:
            return self.split
        key = f'validation split {self.source.split_salt}'.encode()
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        share = int.from_bytes(digest, 'big') / 2**64
        return 'validation' if share < self.source.validation_fraction else 'train'

    def _give(self, text: str, side: Split | None, counts: ReadCounts) -> Iterator[str]:
        """The text if it is of this split; `side` is None for an empty text."""
        if side is None:
            counts.empty += 1
        elif side != self.split:
            counts.other_split += 1
        else:
            counts.add_document(len(text.encode()))
            yield text

    def _valid(self, data: bytes | str, record: int, counts: ReadCounts) -> str | None:
        """Data as a string that UTF-8 can encode; None when the document is to be skipped."""
        try:
            if isinstance(data, bytes):
                return data.decode()
            if not data.isascii():
                data.encode()  # JSON can spell a lone surrogate, "\\ud800", which no UTF-8 can
            return data
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            if self.source.invalid_utf8 == 'stop':
                raise UserError(
                    f'invalid UTF-8 ({error.reason})',
                    where=f'{self.path}:{record}',
                    fix="Mend the file, or set invalid_utf8 to 'replace' or 'skip'",
                ) from error
        skip = self.source.invalid_utf8 == 'skip'
        counts.add_invalid_utf8(self.path, record, skipped=skip)
        if skip:
            return None
        # Through UTF-16 a pair of surrogates becomes its character and a lone one U+FFFD.
        return (
            data.decode(errors='replace')
            if isinstance(data, bytes)
            else data.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')
        )

    def _plain_text(self, counts: ReadCounts) -> Iterator[str]:
        chunks = stream_bytes(self.path)
        start = b''
        for chunk in chunks:
            start += chunk
            if len(start) > _LONG_TEXT_BYTES:
                break
        if len(start) <= _LONG_TEXT_BYTES:
            text = self._valid(start, 1, counts)
            if text is not None:
                yield from self._give(text, self._side(text), counts)
            return
        pieces = self._pieces(itertools.chain([start], chunks), counts)
        for (_, side), run in itertools.groupby(pieces, key=lambda piece: piece[:2]):
            joined: list[str] = []
            length = 0
            for _, _, text in run:
                joined.append(text)
                length += len(text)
                if length >= _MAX_JOINED_BYTES:
                    yield from self._give(''.join(joined), side, counts)
                    joined, length = [], 0
            if joined:
                yield from self._give(''.join(joined), side, counts)

    def _pieces(self, chunks: Iterator[bytes], counts: ReadCounts) -> Iterator[tuple[int, Split | None, str]]:
        """(stretch, split, text) of the pieces of a long text; a stretch ends where a piece is skipped."""
        line, stretch = 1, 0
        side: Split | None = None
        for piece in cut_stream(chunks, _PIECE_BYTES):
            text = self._valid(piece, line, counts)
            line += piece.count(b'\n')
            if text is None:
                stretch += 1
            else:
                side = self._side(text) or side  # a blank piece stays with the one before it
                yield stretch, side, text

    def _separated_texts(self, counts: ReadCounts) -> Iterator[str]:
        assert self.source.document_separator is not None
        records = split_stream(stream_bytes(self.path), self.source.document_separator.encode())
        for number, record in enumerate(records, start=1):
            text = self._valid(record, number, counts)
            if text is not None:
                yield text

    def _json_texts(self, counts: ReadCounts) -> Iterator[str]:
        for number, line in enumerate(split_stream(stream_bytes(self.path), b'\n'), start=1):
            if line.isspace() or not line:
                continue
            decoded = self._valid(line, number, counts)
            if decoded is None:
                continue
            try:
                record = json.loads(decoded)
            except (ValueError, RecursionError) as error:
                counts.add_skipped(self.path, number, f'not a line of JSON ({error})')
                continue
            del decoded
            reason = self._missing_text(record)
            if reason:
                counts.add_skipped(self.path, number, reason)
                continue
            text = self._valid(record.pop(self.source.text_field), number, counts)
            if text is not None:
                yield text

    def _missing_text(self, record: Any) -> str:
        """Why a JSON record has no text, or '' when it has."""
        field = self.source.text_field
        if not isinstance(record, dict):
            return f'a JSON {type(record).__name__}, not an object'
        if field not in record:
            return f'no field {field!r} (text_field); it has {", ".join(map(repr, list(record)[:8])) or "none"}'
        if not isinstance(record[field], str):
            return f'field {field!r} is {json.dumps(record[field])[:40]}, not a string'
        return ''

    def _parquet_texts(self, counts: ReadCounts) -> Iterator[str]:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                self._check_column(file.schema_arrow)
                for batch in file.iter_batches(batch_size=64, columns=[self.source.text_field]):
                    column = batch.column(0)
                    if pyarrow.types.is_dictionary(column.type):
                        column = column.dictionary_decode()
                    # As bytes: pyarrow does not check UTF-8 when it reads a string column.
                    for value in column.cast(pyarrow.large_binary()).to_pylist():
                        number += 1
                        if value is None:
                            counts.add_skipped(self.path, number, f'column {self.source.text_field!r} is null')
                            continue
                        text = self._valid(value, number, counts)
                        if text is not None:
                            yield text
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(self.path, error) from error
            raise UserError(  # a broken page or footer comes as an OSError without errno
                f'parquet data is corrupt or cut short after row {number}: {error}',
                where=self.path,
                fix='Fetch or write the file again',
            ) from error

    def _check_column(self, schema: Any) -> None:
        import pyarrow

        field = self.source.text_field
        if field not in schema.names:
            names = ', '.join(map(repr, schema.names[:12]))
            raise UserError(f'no column {field!r}', where=self.path, fix=f'Set text_field to one of {names}')
        kind = schema.field(field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        texts = (
            pyarrow.string(),
            pyarrow.large_string(),
            pyarrow.binary(),
            pyarrow.large_binary(),
            pyarrow.string_view(),
        )
        if kind not in texts:
            raise UserError(
                f'column {field!r} holds {kind}, not strings', where=self.path, fix='Set text_field to another'
            )


def _kind(path: str) -> Literal['txt', 'json', 'parquet']:
    if path.endswith('.parquet'):
        return 'parquet'
    return 'txt' if path.endswith(('.txt', '.txt.gz', '.txt.zst')) else 'json'
