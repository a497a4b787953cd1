"""Streams of bytes with bounds: lines no longer than a limit, and a file object over chunks."""

import io
from collections.abc import Iterator


def bounded_lines(chunks: Iterator[bytes], longest: int) -> Iterator[bytes | int]:
    """Lines without their ends; of one longer than `longest` bytes its length alone, and no more than that is held."""
    pending: list[bytes] = []
    length = 0
    for chunk in chunks:
        *ended, rest = chunk.split(b'\n')
        for part in ended:
            length += len(part)
            yield length if length > longest else b''.join([*pending, part])
            pending, length = [], 0
        length += len(rest)
        if length > longest:
            pending = []
        elif rest:
            pending.append(rest)
    if length:
        yield length if length > longest else b''.join(pending)


def bounded_content(chunks: Iterator[bytes], longest: int) -> bytes | int:
    """All of a stream; if it is longer than `longest` bytes its length alone, read to its end in bounded memory."""
    parts: list[bytes] = []
    length = 0
    for chunk in chunks:
        length += len(chunk)
        if length <= longest:
            parts.append(chunk)
        else:
            parts = []
    return length if length > longest else b''.join(parts)


class ChunkFile(io.RawIOBase):
    """A readable file object over chunks of bytes, which counts what has been read.

    Args:
        skip: bytes at the beginning that are left out.
    """

    def __init__(self, chunks: Iterator[bytes], skip: int = 0):
        self._chunks, self._chunk, self._used, self.position = chunks, b'', 0, 0
        while self.position < skip:
            if not self.read(min(skip - self.position, 1 << 18)):
                break

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes, fewer where a chunk ends; all that is left if it is negative."""
        if size is None or size < 0:
            data = self._chunk[self._used :] + b''.join(self._chunks)
            self._chunk, self._used = b'', 0
        else:
            while self._used == len(self._chunk):
                self._chunk, self._used = next(self._chunks, None) or b'', 0
                if not self._chunk:
                    return b''
            data = self._chunk[self._used : self._used + size]
            self._used += len(data)
        self.position += len(data)
        return data

    def tell(self) -> int:
        return self.position
