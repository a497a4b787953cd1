"""Files on disk or by URL: finding them by globs, streaming their decompressed bytes, cutting the stream into records.

Memory stays bounded by one record and one chunk, whatever the size of a file.
"""

import bz2
import functools
import glob
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any, Protocol, cast

import zstandard

from llm.errors import UserError

# Compressed bytes read at a time. Few of zstandard, which makes thirty thousand of one; the output of the others can be
# bounded.
_INPUT_BYTES = {'.gz': 16 * 1024, '.zst': 512, '.bz2': 16 * 1024}
_OUTPUT_BYTES = 1 << 20
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'


def find_files(patterns: str | tuple[str, ...], suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """The files that the globs match (`**` crosses folders, `~` is the home folder), sorted, each once.

    A URL (gs://, s3://, https://) is left to fsspec, which needs its driver of that store.

    Raises UserError for a glob that matches no file, a directory, and a file whose suffix is not one of `suffixes`:
    leaving such a file out in silence could lose half of a corpus.
    """
    found: dict[str, str] = {}
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        for path in _match(pattern, suffixes):
            if not path.endswith(suffixes):
                named = path in (pattern, os.path.expanduser(pattern))
                raise UserError(
                    'is of a kind that is not read here'
                    if named
                    else f'{pattern!r} matches a file of a kind that is not read',
                    where=path,
                    fix=f'{"What" if named else "Narrow the glob; what"} is read ends in {", ".join(suffixes)}',
                )
            found.setdefault(path if is_url(path) else os.path.realpath(path), path)
    if not found:
        raise UserError('no files are given', fix='Set files to a glob such as "my_texts/*.txt"')
    return tuple(sorted(found.values()))


def _match(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    if is_url(pattern):
        return _match_url(pattern)
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        names = glob.glob(os.path.join(glob.escape(expanded), '*'))
        there = [suffix for suffix in suffixes if any(name.endswith(suffix) for name in names)]
        example = os.path.join(pattern, f'*{(there or suffixes)[0]}')
        raise UserError('is a directory', where=pattern, fix=f'Give a glob: {example!r}')
    if os.path.exists(expanded):  # also for names that contain *, ? or [
        return [expanded]
    matches = sorted(path for path in glob.glob(expanded, recursive=True) if not os.path.isdir(path))
    if not matches:
        raise UserError(f'no file matches {pattern!r}', fix=f'Check the path; the current folder is {os.getcwd()}')
    return matches


def is_url(path: str) -> bool:
    """Whether a path is for fsspec to open."""
    return '://' in path


def _match_url(pattern: str) -> list[str]:
    import fsspec

    try:
        files, _, _ = fsspec.get_fs_token_paths(pattern)
        if not glob.has_magic(pattern.partition('://')[2]):
            return [pattern]
        matches = [files.unstrip_protocol(path) for path in sorted(files.glob(pattern)) if not files.isdir(path)]
    except (OSError, ImportError, ValueError) as error:
        fix = 'Install the driver' if isinstance(error, ImportError) else 'Check the URL and your access'
        raise UserError(f'cannot be listed ({error})', where=pattern, fix=fix) from error
    if not matches:
        raise UserError(f'no file matches {pattern!r}', fix='Check the URL')
    return matches


def open_binary(path: str) -> IO[bytes]:
    """A file or URL for reading bytes."""
    if not is_url(path):
        return open(path, 'rb')
    import fsspec

    return cast(IO[bytes], fsspec.open(path, 'rb').open())


class UnreadableFile(UserError):
    """A file that the system or a store does not let us read, now or ever; what is wrong with its content is none."""


def unwritable(directory: str | os.PathLike[str], error: OSError, kept: str) -> UserError:
    """The error for a directory that cannot be written; `kept` is what is not lost."""
    return UserError(
        f'cannot be written ({os.strerror(error.errno) if error.errno else error})',
        where=str(directory),
        fix=f'Free some space or check permissions, and start again: finished {kept} are kept.',
    )


def unreadable(path: str, error: OSError) -> UnreadableFile:
    """The error for a file that the system does not let us read."""
    what = f'cannot be read ({error.strerror or error or type(error).__name__})'
    return UnreadableFile(what, where=path, fix='Check that it exists and its mode')


def file_identity(path: str) -> str:
    """Changes when a file's content does: its SHA-256, or of a URL what its store says of the object."""
    if not is_url(path):
        return content_digest(path).hex()
    import fsspec

    files, _, (inner,) = fsspec.get_fs_token_paths(path)
    try:
        return str(files.ukey(inner))
    except OSError as error:
        raise unreadable(path, error) from error


def file_state(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """(size, modification time, inode), for caches of what a file holds: another one is read again. Raises OSError."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def file_states(paths: Iterable[str]) -> tuple[tuple[int, int, int] | None, ...]:
    """`file_state` of each, None of URLs. Raises UserError where one is not there."""
    try:
        return tuple(None if is_url(path) else file_state(path) for path in paths)
    except OSError as error:
        raise unreadable(str(error.filename), error) from error


@functools.lru_cache(maxsize=4096)
def _digest(path: str, state: tuple[int, int, int]) -> bytes:
    del state
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').digest()


def content_digest(path: str) -> bytes:
    """SHA-256 of a file's content, read once in a process while its size and modification time stay."""
    try:
        return _digest(path, file_state(path))
    except OSError as error:
        raise unreadable(path, error) from error


def stream_bytes(path: str) -> Iterator[bytes]:
    """The decompressed content in non-empty chunks, without a leading byte order mark.

    Raises UserError when the file cannot be read, or when its gzip, zstandard or bzip2 data is corrupt or ends early.
    """
    chunks = _stream_compressed(path)
    start = b''
    for chunk in chunks:
        start += chunk
        if len(start) >= len(_BYTE_ORDER_MARK):
            break
    start = start.removeprefix(_BYTE_ORDER_MARK)
    if start:
        yield start
    yield from chunks


class _Decompressor(Protocol):
    """What the decompression objects of zlib, zstandard and bz2 have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


_Zlib = type(zlib.decompressobj())


class _CorruptBzip2(Exception):
    pass


def _new_decompressor(path: str) -> _Decompressor | None:
    if path.endswith('.gz'):
        return zlib.decompressobj(wbits=31)
    if path.endswith('.zst'):
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
    if path.endswith('.bz2'):
        return bz2.BZ2Decompressor()
    return None


def _outputs(member: Any, data: bytes) -> Iterator[bytes]:
    """What a decompressor makes of `data`, in bounded pieces that are not empty."""
    while True:
        if isinstance(member, bz2.BZ2Decompressor):
            try:
                output, data = member.decompress(data, _OUTPUT_BYTES), b''
            except OSError as error:  # bz2 has no error of its own; all others are of the file
                raise _CorruptBzip2(error) from error
            ended = member.eof or member.needs_input
        elif isinstance(member, _Zlib):
            output = member.decompress(data, _OUTPUT_BYTES)
            data = member.unconsumed_tail
            ended = member.eof or (not data and len(output) < _OUTPUT_BYTES)
        else:
            output, ended = member.decompress(data), True
        if output:
            yield output
        if ended:
            return


def _read(file: IO[bytes], size: int) -> bytes:
    try:
        return file.read(size)
    except OSError:
        raise
    except Exception as error:  # drivers of stores have errors of their own, as aiohttp for a connection that is lost
        raise OSError(f'{type(error).__name__}: {error}') from error


def _stream_compressed(path: str) -> Iterator[bytes]:
    read = written = 0
    try:
        with open_binary(path) as file:
            if _new_decompressor(path) is None:
                while chunk := _read(file, 1 << 18):
                    yield chunk
                return
            member: _Decompressor | None = None
            empty = True
            while data := _read(file, _INPUT_BYTES[os.path.splitext(path)[1]]):
                empty = False
                while data:
                    member = member or _new_decompressor(path)
                    assert member is not None
                    for output in _outputs(member, data):
                        written += len(output)
                        yield output
                    data = b''
                    if member.eof:  # files may be concatenated, and gzip files padded with zeros
                        data = member.unused_data.lstrip(b'\0') if path.endswith('.gz') else member.unused_data
                        member = None
                read = file.tell()
            if empty or member is not None:
                raise UserError(
                    f'compressed data ends early, at byte {read} ({written} bytes of content before it)',
                    where=path,
                    fix='Fetch or write the file again',
                )
    except OSError as error:
        raise unreadable(path, error) from error
    except (zlib.error, zstandard.ZstdError, _CorruptBzip2) as error:
        raise UserError(
            f'compressed data is corrupt after byte {read} ({written} bytes of content before it): {error}',
            where=path,
            fix='Fetch or write the file again',
        ) from error


def split_stream(chunks: Iterator[bytes], separator: bytes) -> Iterator[bytes]:
    """The records between separators, which are left out; an empty record at the end is none."""
    pending: list[bytes] = []  # parts of a record not yet ended, joined once: linear in the record's length
    overlap = len(separator) - 1
    for chunk in chunks:
        if overlap and pending:
            # A separator may lie across two chunks: look for it in the seam together with the new chunk.
            chunk = pending.pop() + chunk  # noqa: PLW2901
        *ended, rest = chunk.split(separator)
        for record in ended:
            pending.append(record)
            yield b''.join(pending)
            pending.clear()
        if overlap and len(rest) > overlap:
            pending += [rest[:-overlap], rest[-overlap:]]
        elif rest:
            pending.append(rest)
    if pending:
        yield b''.join(pending)


def cut_stream(chunks: Iterator[bytes], length: int) -> Iterator[bytes]:
    """Pieces of between `length` and twice `length` bytes (the last may be shorter) that joined are the stream.

    A piece ends after a blank line where one is in reach, else after a line, else after a space, else inside a word
    but never inside a UTF-8 character. Where it ends depends on the content alone, not on the chunks.
    """
    buffer = b''
    for chunk in chunks:
        buffer += chunk
        position = 0
        while len(buffer) - position > 2 * length:
            end = _piece_end(buffer, position + length, position + 2 * length)
            yield buffer[position:end]
            position = end
        buffer = buffer[position:]
    if buffer:
        yield buffer


def _piece_end(buffer: bytes, low: int, high: int) -> int:
    for boundary in (b'\n\n', b'\n', b' '):
        found = buffer.find(boundary, low - len(boundary), high)
        if found >= 0:
            return found + len(boundary)
    for end in range(high, high - 4, -1):
        if buffer[end] & 0xC0 != 0x80:  # the first byte of a character
            return end
    return high  # not UTF-8
