"""Writing the container of GGUF, version 3, one tensor in memory at a time."""

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.errors import UserError
from llm.interop.gguf.blocks import BlockType, quantize_q8_0
from llm.interop.gguf.format import ARRAY, DEFAULT_ALIGNMENT, MAGIC, STRING

_UINT8, _UINT32, _INT32, _FLOAT32, _BOOL = 0, 4, 5, 6, 7


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to write; `make` gives its numbers in fp32, of this shape."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    make: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) // self.type.numbers * self.type.size

    def encode(self) -> bytes:
        """Its data."""
        numbers = self.make()
        if numbers.shape != self.shape:
            raise ValueError(f'{self.name} has shape {numbers.shape}, not {self.shape}')
        if self.type.dtype is None:
            return quantize_q8_0(numbers).tobytes()
        with np.errstate(over='ignore'):
            cast = np.ascontiguousarray(numbers).astype(self.type.dtype)
        if not np.isfinite(cast.astype(np.float32)).all():
            raise UserError(f'{self.name} has values that {self.type.name} cannot hold', fix="Use 'BF16' or 'F32'.")
        return cast.tobytes()


def write_file(path: str | Path, metadata: Mapping[str, Any], tensors: Sequence[NewTensor]) -> None:
    """Write a file.

    Args:
        metadata: booleans, integers of 32 bits, floats, strings, bytes, and lists of one of the others.

    Raises:
        UserError: a number does not fit the type of its tensor, or the file cannot be written.
    """
    path = Path(path)
    header = [MAGIC, struct.pack('<IQQ', 3, len(tensors), len(metadata))]
    header += [_text(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        place = struct.pack(f'<I{len(dimensions)}QIQ', len(dimensions), *dimensions, tensor.type.code, offset)
        header.append(_text(tensor.name) + place)
        offset += _padded(tensor.num_bytes)
    start = b''.join(header)
    try:
        with path.open('wb') as file:
            file.write(start + bytes(_padded(len(start)) - len(start)))
            for tensor in tensors:
                data = tensor.encode()
                if len(data) != tensor.num_bytes:
                    raise ValueError(f'{tensor.name} has {len(data)} bytes, not {tensor.num_bytes}')
                file.write(data + bytes(_padded(len(data)) - len(data)))
    except OSError as error:
        raise UserError(f'cannot write ({error.strerror})', where=str(path), fix='Check the path and space.') from error


def _padded(length: int) -> int:
    return -(-length // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack('<Q', len(content)) + content


def _value(value: Any) -> bytes:
    if isinstance(value, bytes):
        return struct.pack('<IIQ', ARRAY, _UINT8, len(value)) + value
    if isinstance(value, list | tuple):
        kind = _type(value[0]) if value else STRING
        kind = _INT32 if kind == _UINT32 else kind  # as llama.cpp wants lists
        return struct.pack('<IIQ', ARRAY, kind, len(value)) + b''.join(_content(each, kind) for each in value)
    kind = _type(value)
    return struct.pack('<I', kind) + _content(value, kind)


def _type(value: Any) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _INT32 if value < 0 else _UINT32
    return _FLOAT32 if isinstance(value, float) else STRING


def _content(value: Any, kind: int) -> bytes:
    if kind == STRING:
        return _text(value)
    return struct.pack({_BOOL: '<?', _INT32: '<i', _UINT32: '<I', _FLOAT32: '<f'}[kind], value)
