"""The parameters of an exported program: one safetensors file, which ONNX graphs point into and JAX programs are given.

Our own names and shapes, layers stacked; written a layer at a time, so that nothing is whole in memory.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llm.errors import UserError
from llm.interop.safetensors import SINGLE, StoredTensor, open_checkpoint
from llm.interop.safetensors_writing import NewTensor, write_checkpoint
from llm.models.low_rank import ReadPiece

FILE = SINGLE
_CODES = {'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
# Of an array at a time, in bytes; a piece is at least one entry along the first axis.
_PIECE_BYTES = 64_000_000


def write_parameters(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], read: ReadPiece
) -> dict[str, StoredTensor]:
    """Write all parameters to one file, and say where each is.

    Args:
        shapes, dtypes: by path. read: gives a slice of a parameter.

    Raises:
        UserError: a value does not fit its dtype, or the directory cannot be written.
    """
    tensors = [
        NewTensor(path, shape, _CODES[dtypes[path]], functools.partial(pieces, path, shape, dtypes[path], read))
        for path, shape in shapes.items()
    ]
    write_checkpoint(directory, tensors, shard_bytes=2**63)
    return open_checkpoint(directory)


def pieces(path: str, shape: tuple[int, ...], dtype: str, read: ReadPiece) -> Iterator[np.ndarray]:
    """The parameter in order, cast, some entries of its first axis at a time."""
    target: Any = np.dtype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype)
    entry = max(1, int(np.prod(shape[1:], dtype=np.int64)) * target.itemsize)
    step = max(1, _PIECE_BYTES // entry)
    for start in range(0, shape[0], step):
        values = read(path, (slice(start, min(start + step, shape[0])),))
        with np.errstate(over='ignore'):
            cast = np.asarray(values).astype(target)
        if target == np.float16 and not np.isfinite(cast).all():
            raise UserError(f'parameter {path} has values that float16 cannot hold', fix="Use dtype 'bfloat16'.")
        yield cast
