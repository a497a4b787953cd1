"""Examples: training rows by one endless index, through shuffling by epoch and mixing of sources.

`examples[i]` is a pure function of i. What stands behind it is a chain of maps: the mixture says which source and which
of its rows in sequence (`MixedExamples`), the epoch's shuffle says which row of the plan that is (`ShuffledExamples`),
and the plan says which tokens (`llm.data.packing.PackedRows`).
"""

import abc
import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llm.data.curricula import CurriculumSchedule
from llm.data.index_maps import EpochShuffle, MixtureSchedule, derive_key
from llm.data.objectives import Example, PostCache, apply_post_cache, record_generator
from llm.errors import UserError


class Records(Protocol):
    """A finite number of rows by number, such as `llm.data.packing.PackedRows`."""

    num_rows: int
    digest: str

    def rows(self, indices: npt.ArrayLike) -> Example: ...


class Examples(abc.ABC):
    """Rows by index. Picklable and pure: rows of any indices, in any order, from any process, are the same.

    Attributes:
        num_examples: how many there are; None is endless.
        digest: stands for the content and the order: equal digests, equal rows.
    """

    num_examples: int | None
    digest: str

    @abc.abstractmethod
    def rows(self, indices: npt.ArrayLike) -> Example:
        """The rows of these indices [n], each array [n, S].

        Raises:
            UserError: an index is beyond the end of the data.
        """

    def __getitem__(self, index: int) -> Example:
        """One row, each array [S]."""
        return {name: array[0] for name, array in self.rows([index]).items()}


class ShuffledExamples(Examples):
    """The records over and over, each epoch in another order, with post-cache functions applied to each."""

    num_examples = None

    def __init__(self, records: Records, seed: int, name: str = '', post_cache: Sequence[PostCache] = ()):
        """`name` sets apart sources of one mixture that have the same seed."""
        self.records, self.post_cache = records, tuple(post_cache)
        self._shuffle = EpochShuffle(records.num_rows, derive_key(seed, 'shuffle', name))
        self._record_seed = derive_key(seed, 'record', name)
        self.digest = _digest(records.digest, self._shuffle.key, _names(post_cache))

    def rows(self, indices: npt.ArrayLike) -> Example:
        epochs, records = self._shuffle.locate(indices)
        return _processed(self.records, self.post_cache, self._record_seed, epochs, records)


class StreamedExamples(Examples):
    """The records in order, so that row b of a batch goes on where row b of the batch before ended.

    The records are cut into as many streams of neighbours as a batch has rows; `positions` run on through a stream. The
    few that are left over are others in each epoch: streams begin at a record of its own, and anew at record 0.

    Args:
        batch_size: rows of a batch: example i is row i mod batch_size of batch i div batch_size.
        seed: of where epochs begin; None for evaluation: from record 0 on, once, and then padding.
    """

    num_examples = None
    post_cache: tuple[PostCache, ...] = ()

    def __init__(self, records: Records, batch_size: int, seed: int | None, name: str = ''):
        self.records, self.batch_size = records, batch_size
        self._key = None if seed is None else derive_key(seed, 'streams', name)
        if seed is not None and records.num_rows < batch_size:
            raise UserError(
                f'{records.num_rows} rows cannot be {batch_size} streams',
                where='DataConfig.order',
                fix='Use a smaller batch_size or sequence_length, or more text.',
            )
        # Of an epoch, or of all.
        self.steps = records.num_rows // batch_size if seed is not None else -(-records.num_rows // batch_size)
        self.digest = _digest(records.digest, 'streams', batch_size, self._key)

    def rows(self, indices: npt.ArrayLike) -> Example:
        steps, streams = np.divmod(np.asarray(indices, np.int64), self.batch_size)
        records = streams * self.steps + steps
        past = np.zeros_like(steps)
        if self._key is None:
            records = np.where(steps < self.steps, records, self.records.num_rows)
        else:
            past, steps = np.divmod(steps, self.steps)
            first = {epoch: derive_key(self._key, int(epoch)) % self.records.num_rows for epoch in np.unique(past)}
            records = streams * self.steps + steps + np.asarray([first[epoch] for epoch in past])
            records %= self.records.num_rows
        batch = self.records.rows(records)
        before = np.minimum(steps, records)[:, None] * batch['positions'].shape[1]
        positions = batch['positions'] + np.where(batch['segment_ids'] > 0, before, 0).astype(np.int32)
        return batch | {'positions': positions}


class FixedExamples(Examples):
    """The records in their order, with post-cache functions that draw the same for each every time: for evaluation.

    As of the records, rows from their number on are padding.
    """

    num_examples = None

    def __init__(self, records: Records, post_cache: Sequence[PostCache] = ()):
        self.records, self.post_cache = records, tuple(post_cache)
        self._record_seed = derive_key(0, 'evaluation record')
        self.digest = _digest(records.digest, _names(post_cache))

    def rows(self, indices: npt.ArrayLike) -> Example:
        records = np.minimum(np.asarray(indices, np.int64), self.records.num_rows)
        return _processed(self.records, self.post_cache, self._record_seed, np.zeros_like(records), records)


class MixedExamples(Examples):
    """Several examples interleaved at rates; each source goes on through its own epochs."""

    def __init__(
        self,
        sources: Sequence[ShuffledExamples | StreamedExamples],
        schedule: MixtureSchedule | CurriculumSchedule,
        names: Sequence[str] = (),
    ):
        self.sources, self.schedule, self.names = tuple(sources), schedule, tuple(names)
        self.num_examples = schedule.length
        self.digest = _digest([source.digest for source in sources], *schedule.identity)

    def rows(self, indices: npt.ArrayLike) -> Example:
        sources, within = self.schedule.locate(indices)
        batch: Example = {}
        for number in np.unique(sources).tolist():
            here = np.flatnonzero(sources == number)
            for name, array in self.sources[number].rows(within[here]).items():
                if name not in batch:
                    batch[name] = np.empty((len(sources), *array.shape[1:]), array.dtype)
                batch[name][here] = array
        return batch


def _processed(
    source: Records, functions: Sequence[PostCache], seed: int, epochs: npt.ArrayLike, records: npt.ArrayLike
) -> Example:
    """Rows after post-cache functions, each with the randomness of its epoch and record.

    A function that says `reads_another` finds the arrays of another row beside the row's own, as `other_<name>`: any
    other with equal chance, by that randomness. Of a single row it is padding.
    """
    batch, total = source.rows(records), source.num_rows
    if not functions:
        return batch
    keys = list(zip(np.asarray(epochs).tolist(), np.asarray(records).tolist(), strict=True))
    generators = [record_generator(seed, epoch, record) for epoch, record in keys]
    if any(getattr(function, 'reads_another', False) for function in functions):
        others = [
            (record + 1 + int(generator.integers(total - 1))) % total if total > 1 else total
            for (_, record), generator in zip(keys, generators, strict=True)
        ]
        batch = batch | {f'other_{name}': array for name, array in source.rows(others).items()}
    examples = [
        apply_post_cache(functions, {name: array[i] for name, array in batch.items()}, generator)
        for i, generator in enumerate(generators)
    ]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _names(functions: Sequence[PostCache]) -> list[str]:
    """What stands for functions in a digest: the repr of a config, the name of a plain function."""
    return [getattr(function, '__qualname__', repr(function)) for function in functions]


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
