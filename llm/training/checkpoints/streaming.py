"""Arrays that are never whole in memory, written piece by piece as they are made: models that no host can hold.

They lie on disk as all arrays of a checkpoint do, in chunks of a few hundred megabytes along the first axis, and are
restored onto any mesh like others.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

# Bytes of a piece, unless one entry along the first axis has more.
PIECE_BYTES = 2**28


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedArray:
    """An array to save, made while it is written.

    Attributes:
        shape, dtype.
        read: gives the entries from start to stop along the first axis (all of a scalar), of this dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.size * self.dtype.itemsize

    @property
    def piece(self) -> int:
        """Entries along the first axis that are made at a time."""
        entry = self.nbytes // max(1, self.shape[0])
        return max(1, min(self.shape[0], PIECE_BYTES // max(1, entry)))


@functools.cache
def register_streamed_arrays() -> None:
    """Have Orbax save StreamedArray; it is imported here."""
    import orbax.checkpoint as ocp
    import tensorstore as ts

    class Handler(ocp.type_handlers.NumpyHandler):
        """Saves them as Orbax saves NumPy arrays, but for how the data is handed over."""

        def __init__(self) -> None:
            super().__init__(deepcopy_host_arrays=False)

        def typestr(self) -> str:
            return 'llm.StreamedArray'

        async def _open_and_write(self, value: Any, tspec: dict[str, Any], ts_context: Any) -> None:
            tspec = _chunked(tspec, (value.piece, *value.shape[1:]))
            store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
            # Waits, rather than letting the loop begin on the next array, so that one piece is in memory at a time.
            for start in range(0, value.shape[0], value.piece):
                stop = min(start + value.piece, value.shape[0])
                store[start:stop].write(value.read(start, stop)).result()

    ocp.type_handlers.register_type_handler(StreamedArray, Handler())


def _chunked(tspec: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    """The specification with chunks of `shape`."""
    if 'base' in tspec:
        return {**tspec, 'base': _chunked(tspec['base'], shape)}
    text = json.dumps(tspec)
    copy: dict[str, Any] = json.loads(text)
    copy['metadata']['chunk_grid']['configuration']['chunk_shape'] = list(shape)
    for codec in copy['metadata'].get('codecs', ()):
        if codec['name'] == 'sharding_indexed':
            codec['configuration']['chunk_shape'] = list(shape)
    return copy
