"""Reading safetensors files: every claim of the header is checked before anything is read.

A file is eight bytes with the length of the header, the header, a JSON object of names to dtype, shape and place, and
the data, without gaps (https://github.com/huggingface/safetensors, "Format"). A large checkpoint is several files and
`model.safetensors.index.json`, which says where each tensor is. `open_checkpoint` reads headers alone.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llm.errors import UserError

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
# The reference implementation's limit.
MAXIMUM_HEADER_BYTES = 100_000_000
_METADATA = '__metadata__'

# The dtypes that parameters have, and bytes of an element of all others, which buffers may have.
DTYPES: dict[str, np.dtype] = {
    'F64': np.dtype('<f8'),
    'F32': np.dtype('<f4'),
    'F16': np.dtype('<f2'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
}
_OTHER_SIZES = {
    'BOOL': 1,
    'U8': 1,
    'I8': 1,
    'F8_E5M2': 1,
    'F8_E4M3': 1,
    'F8_E8M0': 1,
    'I16': 2,
    'U16': 2,
    'I32': 4,
    'U32': 4,
    'I64': 8,
    'U64': 8,
    'C64': 8,
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: where it is, not its data.

    Attributes:
        file: that holds it. name, shape.
        code: its dtype as the format names it, 'BF16'.
        start: of its data in the file, in bytes.
    """

    file: Path
    name: str
    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> np.dtype:
        """Of its elements. Raises KeyError where parameters cannot be of that type."""
        return DTYPES[self.code]

    def read(self) -> np.ndarray:
        """The tensor mapped into memory: only what is looked at is read, and let go with the array."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        try:
            return np.memmap(self.file, self.dtype, 'r', self.start, self.shape)
        except (OSError, ValueError) as error:
            raise UserError(f'cannot be read ({error})', where=str(self.file), fix='Check the file.') from error


def open_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint in a directory, one file or several with an index, by name.

    Raises:
        UserError: there is no such checkpoint (a pickle is never loaded), a file is not what it claims to be, or index
            and files do not agree.
    """
    index = directory / INDEX
    if index.is_file():
        return _open_sharded(directory, index)
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    pickles = sorted(path.name for pattern in ('*.bin', '*.pt', '*.pth', '*.ckpt') for path in directory.glob(pattern))
    if pickles:
        raise UserError(
            f'{pickles[0]} is a pickle, which can run any program when it is loaded, and there is no {SINGLE}',
            where=str(directory),
            fix="Get the model's safetensors files, or convert it where it is trusted: "
            "transformers' save_pretrained writes them.",
        )
    raise UserError(f'there is no {SINGLE} and no {INDEX}', where=str(directory), fix='Check the path.')


def _open_sharded(directory: Path, index: Path) -> dict[str, StoredTensor]:
    content = read_json(index)
    places = content.get('weight_map') if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise _broken(index, 'it has no weight_map of names to files')
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not file.endswith('.safetensors'):
            raise _broken(index, f'{file!r} is no name of a safetensors file in this directory')
        for name, tensor in read_header(directory / file).items():
            if places.get(name) != file:
                raise _broken(index, f'it does not say that {name} is in {file}')
            found[name] = tensor
    missing = [name for name in places if name not in found]
    if missing:
        raise _broken(index, f'{missing[0]} is not in {places[missing[0]]}, where it should be')
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, in the order of their data.

    Raises:
        UserError: the file is missing, cut short, or its header is not in order.
    """
    try:
        with path.open('rb') as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), 'little')
            if size < 8 or length > min(size - 8, MAXIMUM_HEADER_BYTES):
                raise _broken(path, f'a header of {length:,} bytes does not fit a file of {size:,}')
            text = file.read(length)
    except OSError as error:
        raise UserError(f'cannot be read ({error.strerror})', where=str(path), fix='Check the path.') from error
    header = _parse(text, path)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, f'{_METADATA} is not an object of strings')
    tensors = sorted(_entries(header, path, 8 + length), key=lambda entry: (entry[1], entry[2]))
    end = 8 + length
    for tensor, start, stop in tensors:
        if start != end:
            raise _broken(
                path, f'the data of {tensor.name} {"overlaps" if start < end else "leaves a gap after"} others'
            )
        end = stop
    if end != size:
        raise _broken(path, f'the file has {size:,} bytes, the header says {end:,}')
    return {tensor.name: tensor for tensor, _, _ in tensors}


def _entries(header: dict[str, Any], path: Path, data: int) -> Iterator[tuple[StoredTensor, int, int]]:
    """Each tensor with the place of its data in the file."""
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {'dtype', 'shape', 'data_offsets'}:
            raise _broken(path, f'{name!r} does not have dtype, shape and data_offsets')
        dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
        if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in _OTHER_SIZES):
            raise _broken(path, f'{name!r} has the unknown dtype {dtype!r}')
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise _broken(path, f'{name!r} has shape {shape!r:.80} and data_offsets {offsets!r:.80}')
        size = math.prod(shape) * (DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_SIZES[dtype])
        if offsets[1] - offsets[0] != size:
            raise _broken(path, f'{name!r} needs {size:,} bytes and has {offsets[1] - offsets[0]:,}')
        start, stop = (data + offset for offset in offsets)
        yield StoredTensor(path, name, dtype, tuple(shape), start), start, stop


def _counts(values: Any) -> bool:
    # Sizes beyond any disk would only make later products and messages long.
    return isinstance(values, list) and len(values) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in values)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises UserError where it cannot be read or is not JSON."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f'cannot be read ({error.strerror})', where=str(path), fix='Check the path.') from error
    return _parse(text, path)


def _parse(text: bytes, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise ValueError('a name stands twice')
        return content

    try:
        content = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f'it is not JSON ({error!s:.80})') from error
    if not isinstance(content, dict):
        raise _broken(path, 'it is no JSON object')
    return content


def _broken(path: Path, what: str) -> UserError:
    return UserError(what, where=str(path), fix='Get the file again: this one is damaged, or was made to do harm.')
