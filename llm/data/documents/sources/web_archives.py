"""Web archives: WARC files with pages as they were fetched, and WET files with text that was extracted from them."""

import dataclasses
import io
import re
import zlib
from collections.abc import Iterator
from typing import Any

from llm.data.documents.document import Document, Ignored, Quarantined
from llm.data.documents.sources.files import PACKINGS, FileSource, Item
from llm.data.documents.sources.texts import decoded
from llm.data.documents.streams import ChunkFile
from llm.data.sources.files import UnreadableFile, stream_bytes
from llm.errors import UserError

_PAGES = ('text/html', 'application/xhtml+xml')
_TEXTS = ('text/plain',)
_HEADER = b'WARC/1.'
# A broken record costs a second reading of the file up to it: after so many the rest of the file is given up.
_MAX_BREAKS = 100
_COVERS = 'its length covers the record behind it'
# A record within the content of another: one that was hidden, or a page about web archives.
_INNER = re.compile(rb'\r\n\r\nWARC/1\.\d\r\n((?:[^\r\n]+\r\n)+)\r\n')
_CHUNK = re.compile(rb'[0-9A-Fa-f]{1,8}[ \t]*(?:;[^\r\n]*)?\r?\n')
_LENGTH = re.compile(rb'^Content-Length:\s*(\d{1,18})\s*$', re.I | re.M)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warc(FileSource):
    """Records of WARC and WET files (ISO 28500): responses with status 200 that are HTML or plain text, resources, and
    conversions. Records of other kinds are counted and left out.

    A record whose length is false is quarantined together with what it hides, and reading goes on at the next record.
    """

    suffixes = tuple(f'{kind}{packing}' for kind in ('.warc', '.wet') for packing in PACKINGS)

    def read(self, path: str) -> Iterator[Item]:
        start = end = 0
        for _ in range(_MAX_BREAKS):
            stream = ChunkFile(stream_bytes(path), skip=start)
            # What came last is held back until its successor is found where its length says.
            held: list[Item] = []
            try:
                for position, behind, item in self._records(path, stream):
                    yield from held
                    held, start, end = [item], position, behind
                yield from held
                return
            except OSError as error:
                if isinstance(error.__cause__, UserError) or error.errno is not None:
                    raise
                identity = held[0].id if held and isinstance(held[0], (Document, Quarantined)) else None
                reason = f'a record of false length, or none at all, near byte {start:,} ({error})'
                yield Quarantined(f'{path}:{identity or start}', reason, identity)
                found = _next_record(path, start + 1)
            except UnreadableFile:
                raise
            except UserError as error:  # compressed data is damaged, perhaps far behind a record of false length
                yield from held
                whole = held and end <= stream.position
                # Its end is not exact where header lines have other white space than is usual.
                found = _next_record(path, max(start + 1, end - 64) if whole else start + 1)
                if found is None or not held:
                    yield Quarantined(f'{path}:{start}', error.what)
            if found is None:
                return
            start = found
        yield Quarantined(path, f'more than {_MAX_BREAKS} records of false length: what is left was not read')

    def _records(self, path: str, stream: ChunkFile) -> Iterator[tuple[int, int, Item]]:
        """(where it begins in the decompressed file, where it ends by its length, the item) of each record."""
        from fastwarc.warc import ArchiveIterator

        end = 0
        for record in ArchiveIterator(stream, parse_http=True, auto_decode='none'):
            end = record.stream_pos + _size(record)  # the position counts from the file's beginning, as `tell` does
            item = self._item(path, record)
            yield record.stream_pos, end, item
            if isinstance(item, Quarantined) and item.reason == _COVERS:
                raise OSError(_COVERS)
        if end > stream.position:
            raise OSError('the file ends before it')

    def _item(self, path: str, record: Any) -> Item:
        from fastwarc.warc import WarcRecordType

        if record.record_type not in (WarcRecordType.response, WarcRecordType.resource, WarcRecordType.conversion):
            return Ignored(f'{record.headers.get("WARC-Type", "unknown")} record')
        status = record.http_headers.status_code if record.http_headers is not None else 200
        if status != 200:
            return Ignored(f'status {status}')
        media = (record.http_content_type or '').lower() or record.headers.get('Content-Type', '').partition(';')[
            0
        ].strip().lower()
        if media not in (*_PAGES, *_TEXTS):
            return Ignored(f'media type {media or "unknown"}')
        identity = (record.record_id or '').strip('<>') or None
        url = record.headers.get('WARC-Target-URI', '').strip('<>') or None
        where = f'{path}:{identity}'
        data = _payload(record, self.max_document_bytes)
        if isinstance(data, str):
            return Quarantined(where, data, identity)
        text = decoded(data, record.http_charset)
        date = record.record_date.isoformat() if record.record_date else None
        fields = {'id': identity, 'url': url, 'date': date, 'markup' if media in _PAGES else 'text': text}
        return self.document(f'{self.name}:{path}:{record.stream_pos}', fields)


def _size(record: Any) -> int:
    """Bytes of a record as it stands in the file, its header's lines counted without extra white space."""
    header = sum(len(name.encode()) + len(value.encode()) + 4 for name, value in record.headers.items())
    try:
        return header + len('WARC/1.0\r\n\r\n') + int(record.headers.get('Content-Length', '0'))
    except ValueError:
        return header


def _payload(record: Any, longest: int) -> bytes | str:
    """The content of a record, or what is wrong with it."""
    expected = record.content_length
    if expected > longest:
        return f'{expected:,} bytes, more than max_document_bytes'
    data: bytes = record.reader.read(longest + 1)
    if _hides_record(data):
        return _COVERS
    if not data and expected:
        return f'is empty where {expected:,} bytes were to be'
    headers = record.http_headers
    if headers is not None:
        try:
            if 'chunked' in (headers.get('Transfer-Encoding') or '').lower():
                data = _unpacked('chunked', data, longest)
            for name in reversed((headers.get('Content-Encoding') or '').lower().split(',')):
                data = _unpacked(name.strip(), data, longest)
        except (OSError, zlib.error) as error:  # the server's fault, and no other record's
            return f'content that cannot be decoded ({error})'
    return data if len(data) <= longest else f'more than {longest:,} bytes, which is max_document_bytes'


def _unpacked(encoding: str, data: bytes, longest: int) -> bytes:
    """Content as it was before a server packed it, up to a byte more than `longest`.

    What is not packed, whatever its header says, stays as it is: many crawlers unpack and keep the header.
    """
    from fastwarc.stream_io import BrotliReader, ChunkedReader, GzipReader, ZstdReader

    if encoding in ('', 'identity'):
        return data
    if encoding == 'deflate':
        try:
            return zlib.decompressobj().decompress(data, longest + 1)
        except zlib.error:  # without zlib's frame, as some servers have it
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, longest + 1)
    readers = {
        'chunked': (ChunkedReader, _CHUNK.match(data)),
        'gzip': (GzipReader, data.startswith(b'\x1f\x8b')),
        'x-gzip': (GzipReader, data.startswith(b'\x1f\x8b')),
        'zstd': (ZstdReader, data.startswith(b'\x28\xb5\x2f\xfd')),
        'br': (BrotliReader, True),
    }
    if encoding not in readers:
        raise OSError(f'unknown encoding {encoding!r}')
    reader, packed = readers[encoding]
    content: bytes = reader(io.BytesIO(data)).read(longest + 1) if packed else data
    return content


def _hides_record(data: bytes) -> bool:
    """Whether content that ends where a record begins holds a record that ends there, too."""
    if b'\r\n\r\n' + _HEADER not in data:
        return False
    for match in _INNER.finditer(data):
        length = _LENGTH.search(match[1])
        if length is not None:
            end = match.end() + int(length[1])
            if len(data) - 8 <= end <= len(data) + 8 and not data[end:].strip(b'\r\n'):
                return True
    return False


def _readable(stream: ChunkFile) -> bytes:
    """The next bytes, none where compressed data is damaged."""
    try:
        return stream.read(1 << 18)
    except UnreadableFile:
        raise
    except UserError:
        return b''


def _next_record(path: str, start: int) -> int | None:
    """Where the first record at or behind `start` begins, in bytes of the decompressed file; None behind damage."""
    try:
        stream = ChunkFile(stream_bytes(path), skip=start)
    except UnreadableFile:
        raise
    except UserError:
        return None
    seam, position = b'', stream.position
    while chunk := _readable(stream):
        window = seam + chunk
        found = window.find(b'\n' + _HEADER)
        if found >= 0:
            return position - len(seam) + found + 1
        position += len(chunk)
        seam = window[-len(_HEADER) :]
    return None
