"""Writing safetensors files, sharded, one tensor in memory at a time."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llm.errors import UserError
from llm.interop.safetensors import DTYPES, INDEX, SINGLE

# The reference implementation aligns data to this many bytes.
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to write.

    Attributes:
        name, shape.
        dtype: as the format names it, 'BF16'.
        make: gives its data, of this shape and dtype; whole, or in pieces along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray | Iterator[np.ndarray]]

    @property
    def size(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_checkpoint(directory: Path, tensors: Sequence[NewTensor], shard_bytes: int) -> None:
    """Write the tensors in order to files of at most `shard_bytes` (or one tensor) each, with an index if several.

    Raises:
        UserError: the directory cannot be written, or the disk is full.
    """
    shards: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(each.size for each in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    places: dict[str, str] = {}
    try:
        for number, shard in enumerate(shards, start=1):
            name = SINGLE if len(shards) == 1 else f'model-{number:05}-of-{len(shards):05}.safetensors'
            _write(directory / name, shard)
            places |= {tensor.name: name for tensor in shard}
        if len(shards) > 1:
            total = sum(tensor.size for tensor in tensors)
            index = {'metadata': {'total_size': total}, 'weight_map': places}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
    except OSError as error:
        raise UserError(
            f'cannot write ({error.strerror})', where=str(directory), fix='Check permissions and free space.'
        ) from error


def _write(path: Path, tensors: Iterable[NewTensor]) -> None:
    header: dict[str, object] = {'__metadata__': {'format': 'pt'}}
    tensors = list(tensors)
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            'dtype': tensor.dtype,
            'shape': list(tensor.shape),
            'data_offsets': [end, end + tensor.size],
        }
        end += tensor.size
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % _ALIGNMENT)
    with path.open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for tensor in tensors:
            made, written = tensor.make(), 0
            for data in [made] if isinstance(made, np.ndarray) else made:
                shape = tensor.shape if data is made else (*data.shape[:1], *tensor.shape[1:])
                if data.shape != shape or data.dtype != DTYPES[tensor.dtype]:
                    raise ValueError(f'{tensor.name} is {data.dtype}{data.shape}, not {tensor.dtype}{tensor.shape}')
                # bfloat16 is no type of the buffer protocol.
                written += file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
            if written != tensor.size:
                raise ValueError(f'{tensor.name} has {written} bytes, not {tensor.size}')
