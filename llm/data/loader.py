"""The loader: the global batch of a step, placed on the mesh, made ahead by threads.

Row r of step s is example s * B + r. So the data position of a run is its step and nothing else: a resumed run goes on
exactly, and a run on another mesh or number of hosts sees the same batches.
"""

import concurrent.futures
import math
from typing import Any, Protocol

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding, PartitionSpec

from llm.data.objectives import Example
from llm.errors import UserError
from llm.parallel.sharding import names


class Rows(Protocol):
    """Rows by index, each array [n, S], such as Examples and PackedRows."""

    digest: str

    def rows(self, indices: npt.ArrayLike) -> Example: ...


def host_rows(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of a global batch that one host builds when hosts divide it evenly: contiguous, in order of hosts.

    Raises:
        UserError: the hosts cannot divide the batch.
    """
    if batch_size % process_count:
        raise UserError(
            f'a global batch of {batch_size} rows cannot be divided over {process_count} hosts',
            fix=f'Use a batch size that is a multiple of {process_count}.',
        )
    each = batch_size // process_count
    return range(process_index * each, (process_index + 1) * each)


def local_batch(examples: Rows, step: int, batch_size: int, rows: range) -> Example:
    """Some rows of the global batch of a step, each array [len(rows), S]."""
    return examples.rows(step * batch_size + np.arange(rows.start, rows.stop))


class Loader:
    """Global batches by step: `batch(step)` is the same whatever was asked for before.

    Asking for consecutive steps is fast, because the following ones are made meanwhile.
    """

    def __init__(
        self,
        examples: Rows,
        batch_size: int,
        sharding: NamedSharding,
        *,
        prefetch: int = 2,
        threads: int = 1,
    ):
        """A loader for this host.

        Args:
            examples: training examples, or the rows of an evaluation set (beyond the last they are padding).
            batch_size: B, rows of the global batch.
            sharding: where an array [B, S] of the batch lives. Each host builds just the rows of its devices.
            prefetch: batches made ahead; 0 makes each when it is asked for.
            threads: that make them. One is enough for language modelling; slow post-cache functions may want more.

        Raises:
            UserError: the mesh cannot divide the batch or the sequence.
        """
        self.examples, self.batch_size, self.sharding = examples, batch_size, sharding
        self._check_divisible(0, batch_size, 'a global batch of {size} rows', 'Use a batch size')
        self.local_rows = self._addressable_rows()
        self._depth, self._threads = prefetch, threads
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._ahead: dict[int, concurrent.futures.Future[dict[str, jax.Array]]] = {}

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The global batch of `step` (from 0): arrays [B, S] on the mesh.

        Raises:
            UserError: the data ends before it.
        """
        wanted = self._ahead.pop(step, None)
        if wanted is None or step + 1 not in self._ahead:  # a jump: what was made ahead is for somewhere else
            self._forget()
        if self._depth:
            wanted = wanted or self._submit(step)
            for later in range(step + 1, step + 1 + self._depth):
                if later not in self._ahead and self._exists(later):
                    self._ahead[later] = self._submit(later)
        return wanted.result() if wanted else self._make(step)

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of the data: the next step, and a digest to notice other data when resuming."""
        return {'step': step, 'batch_size': self.batch_size, 'digest': self.examples.digest}

    def close(self) -> None:
        """Stop making batches ahead. The loader can still be used."""
        self._forget()
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> 'Loader':
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make(self, step: int) -> dict[str, jax.Array]:
        local = local_batch(self.examples, step, self.batch_size, self.local_rows)
        return {name: self._place(array) for name, array in local.items()}

    def _place(self, local: np.ndarray) -> jax.Array:
        shape = (self.batch_size, *local.shape[1:])
        if len(shape) > 1:
            self._check_divisible(1, shape[1], 'rows of {size} tokens', 'Use a sequence length')

        # By index and not by process, because a mesh may give a host rows that another has too (tensor or pipeline
        # axis across hosts).
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first, last, _ = index[0].indices(self.batch_size)
            return local[(slice(first - self.local_rows.start, last - self.local_rows.start), *index[1:])]

        return jax.make_array_from_callback(shape, self.sharding, part)

    def _exists(self, step: int) -> bool:
        last = getattr(self.examples, 'num_examples', None)
        return last is None or (step + 1) * self.batch_size <= last

    def _submit(self, step: int) -> concurrent.futures.Future[dict[str, jax.Array]]:
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, thread_name_prefix='loader')
        return self._pool.submit(self._make, step)

    def _forget(self) -> None:
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def _addressable_rows(self) -> range:
        """The smallest range of rows that holds all rows of this host's devices."""
        by_row = NamedSharding(self.sharding.mesh, PartitionSpec(*self.sharding.spec[:1]))
        indices = by_row.addressable_devices_indices_map((self.batch_size,)).values()
        bounds = [index[0].indices(self.batch_size) for index in indices if index is not None]
        return range(min(first for first, _, _ in bounds), max(last for _, last, _ in bounds))

    def _check_divisible(self, dimension: int, size: int, what: str, fix: str) -> None:
        entry = self.sharding.spec[dimension] if dimension < len(self.sharding.spec) else None
        axes = names(entry)
        parts = math.prod(self.sharding.mesh.shape[axis] for axis in axes)
        if size % parts:
            over = ', '.join(f'{axis}={self.sharding.mesh.shape[axis]}' for axis in axes)
            raise UserError(
                f'{what.format(size=size)} cannot be divided over the mesh axes {over}',
                fix=f'{fix} that is a multiple of {parts}, or other mesh sizes.',
            )
