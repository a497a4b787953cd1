"""Reading the container of GGUF: every claim of the header is checked against the file before memory is spent.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: a magic, a version, counts, metadata of keys and typed
values, for each tensor its name, dimensions (the fastest first), type and place, then the data, aligned.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import UserError
from llm.interop.gguf.blocks import BY_CODE, BlockType

MAGIC = b'GGUF'
VERSIONS = (2, 3)
ALIGNMENT_KEY = 'general.alignment'
DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_KEY_BYTES = 1 << 16
# Codes of the types of metadata: numbers as struct writes them, and the two that are not numbers.
NUMBERS = {0: 'B', 1: 'b', 2: 'H', 3: 'h', 4: 'I', 5: 'i', 6: 'f', 7: '?', 10: 'Q', 11: 'q', 12: 'd'}
STRING, ARRAY = 8, 9
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8
_SMALLEST_ENTRY = 8 + 4 + 1


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: where it is, not its data.

    Attributes:
        file, name.
        shape: the slowest dimension first, as in NumPy.
        type: of its blocks.
        start: of its data in the file, in bytes.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    type: BlockType
    start: int

    @property
    def dtype(self) -> np.dtype:
        """Of its elements as `read` gives them."""
        return np.dtype(np.float32) if self.type.dtype is None else self.type.dtype

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) // self.type.numbers * self.type.size

    def read(self) -> np.ndarray:
        """The tensor: mapped into memory, or fp32 where it is quantized."""
        try:
            data = np.memmap(self.file, np.uint8, 'r', self.start, (self.num_bytes,))
        except (OSError, ValueError) as error:
            raise UserError(f'cannot be read ({error})', where=str(self.file), fix='Check the file.') from error
        return self.type.decode(data, self.shape)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The header of a file. `metadata` holds numbers, strings, booleans and lists by key."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: str | Path) -> GgufFile:
    """Metadata and tensors of a file.

    Raises:
        UserError: the file cannot be read, is cut short, or its header is not in order: a count or length that the file
            has no room for, text that is not UTF-8, a name twice, an unknown type, data outside the file or of two
            tensors in one place.
    """
    path = Path(path).expanduser()
    try:
        with path.open('rb') as file:
            if file.seek(0, 2) < 24:
                raise _broken(path, 'the file is too short for a GGUF')
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return _Reader(path, view).read()
    except OSError as error:
        raise UserError(f'cannot be read ({error.strerror})', where=str(path), fix='Check the path.') from error


class _Reader:
    def __init__(self, path: Path, view: Any) -> None:
        self.path, self.view, self.size, self.at = path, view, len(view), 0

    def read(self) -> GgufFile:
        if self.take(4) != MAGIC:
            raise _broken(self.path, 'this is no GGUF file')
        version = self.number('I')
        if version not in VERSIONS:
            raise _broken(self.path, f'it is of version {version}, and 2 and 3 can be read')
        num_tensors, num_entries = self.number('Q'), self.number('Q')
        if num_tensors * _SMALLEST_TENSOR + num_entries * _SMALLEST_ENTRY > self.size:
            raise _broken(self.path, f'it has no room for {num_tensors:,} tensors and {num_entries:,} entries')
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.text(_MAX_KEY_BYTES)
            if key in metadata:
                raise _broken(self.path, f'the key {key!r:.80} stands twice')
            metadata[key] = self.value(self.number('I'), key, nested=False)
        infos = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _broken(self.path, f'{ALIGNMENT_KEY} is {alignment!r:.40}')
        data = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end = data
        for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
            tensor = GgufTensor(self.path, name, shape, kind, data + offset)
            if name in tensors:
                raise _broken(self.path, f'the tensor {name!r:.80} stands twice')
            if offset % alignment or tensor.start < end:
                raise _broken(self.path, f'the data of {name!r:.80} overlaps others or is not aligned')
            end = tensor.start + tensor.num_bytes
            if end > self.size:
                raise _broken(self.path, f'the data of {name!r:.80} ends at {end:,}, the file at {self.size:,}')
            tensors[name] = tensor
        order = [info[0] for info in infos]
        return GgufFile(self.path, metadata, {name: tensors[name] for name in order})

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _broken(self.path, f'the header goes on after its end: {count:,} bytes more at {self.at:,}')
        self.at += count
        return self.view[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        packed = struct.Struct(f'<{kind}')
        return packed.unpack(self.take(packed.size))[0]

    def text(self, limit: int | None = None) -> str:
        length = self.number('Q')
        if limit is not None and length > limit:
            raise _broken(self.path, f'a name has {length:,} bytes')
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise _broken(self.path, f'text before byte {self.at:,} is not UTF-8') from error

    def value(self, kind: int, key: str, *, nested: bool) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY or nested:
            raise _broken(self.path, f'{key!r:.80} has the unknown type {kind}')
        of, count = self.number('I'), self.number('Q')
        if of in NUMBERS:
            size = struct.calcsize(f'<{NUMBERS[of]}')
            if count > (self.size - self.at) // size:
                raise _broken(self.path, f'{key!r:.80} has no room for {count:,} numbers')
            return np.frombuffer(self.take(count * size), f'<{np.dtype(NUMBERS[of]).str[1:]}').tolist()
        if count > (self.size - self.at) // 8:
            raise _broken(self.path, f'{key!r:.80} has no room for {count:,} values')
        return [self.value(of, key, nested=True) for _ in range(count)]

    def tensor(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name, rank = self.text(_MAX_KEY_BYTES), self.number('I')
        if rank > _MAX_DIMENSIONS:
            raise _broken(self.path, f'{name!r:.80} has {rank} dimensions')
        shape = tuple(self.number('Q') for _ in range(rank))[::-1]
        code, offset = self.number('I'), self.number('Q')
        if code not in BY_CODE:
            known = ', '.join(each.name for each in BY_CODE.values())
            raise UserError(
                f'{name!r:.80} is of type {code}', where=str(self.path), fix=f'Types that can be read: {known}.'
            )
        kind = BY_CODE[code]
        if not math.prod(shape) or math.prod(shape) > self.size * 8 or shape[-1] % kind.numbers if shape else True:
            raise _broken(self.path, f'{name!r:.80} is {kind.name} of shape {list(shape)}')
        return name, shape, kind, offset


def _broken(path: Path, what: str) -> UserError:
    return UserError(what, where=str(path), fix='Get the file again: this one is damaged, or was made to do harm.')
