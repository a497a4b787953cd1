"""The parameters of a checkpoint read slice by slice, without a mesh, by a host that may not be able to hold them."""

import functools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm.errors import UserError
from llm.training.checkpoints.restoring import ARRAYS, PARAMETERS, newest_whole, steps_at


class StoredParameters:
    """The parameters of a checkpoint on disk, verified; one process reads them.

    Args:
        path: a run directory, its `checkpoints` folder (the newest whole checkpoint is taken), or one checkpoint.

        step: of which checkpoint; None for the newest that is whole.

    Attributes:
        step, metadata: of the checkpoint.
        arrays: dtype and shape of each by name, 'layers/0/mixer/query'.

    Raises:
        UserError: there is no whole checkpoint.
    """

    def __init__(self, path: str | Path, step: int | None = None) -> None:
        directory, steps = steps_at(path)
        if step is not None and step not in steps:
            raise UserError(
                f'there is no checkpoint of step {step}', where=str(directory), fix=f'There are those of {steps}.'
            )
        found = newest_whole(directory, steps if step is None else [step])
        self.step, self.metadata, self._path = found.step, found.content['metadata'], found.path
        self.arrays: dict[str, tuple[str, tuple[int, ...]]] = {
            name.removeprefix(f'{PARAMETERS}/'): (dtype, tuple(shape))
            for name, (dtype, shape) in found.content['arrays'].items()
            if name.startswith(f'{PARAMETERS}/')
        }

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _open(self, name: str) -> Any:
        import tensorstore as ts

        base = {'driver': 'file', 'path': f'{self._path / ARRAYS}/'}
        path = f'{PARAMETERS}.{name.replace("/", ".")}/'
        return ts.open({'driver': 'zarr3', 'kvstore': {'driver': 'ocdbt', 'base': base, 'path': path}}).result()

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        """A slice of an array; whole chunks are read."""
        dtype, shape = self.arrays[name]
        if not math.prod(shape):
            return np.zeros(shape, jnp.dtype(dtype))[index]
        return np.asarray(self._open(name)[index].read().result())
