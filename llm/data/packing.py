"""Packing: which pieces of which documents make up each row, planned once, and the rows that follow from the plan.

A plan lists, row by row, spans of the token cache. Every stored token is in exactly one span, so it is a target exactly
once an epoch. Two modes:

- 'concatenate': documents one after the other in a fixed seeded order, cut every S tokens. No padding but in the last
  row; a document is cut wherever a row ends.
- 'best_fit': only documents longer than S are cut, into pieces of S and a rest. Pieces are put into rows by best-fit
  decreasing (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3): little padding.

The plan does not change between epochs; the order of rows does (`llm.data.examples`). So in 'concatenate' the
neighbours of a document stay the same through a run, which attention cannot see unless it crosses documents.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llm.data.index_maps import Permutation, derive_key
from llm.data.token_cache import TokenCache
from llm.data.token_cache_building import disk_errors
from llm.errors import UserError

PackingMode = Literal['concatenate', 'best_fit']
IndexArray = npt.NDArray[np.int64]
Batch = dict[str, npt.NDArray[Any]]

_PLAN_VERSION = 1
# start: first target, in the cache's numbering; length: targets; context: how many of them, at the beginning, carry no
# loss because another span has them; opens: whether the document begins here, so that its first input is the boundary.
_SPAN = np.dtype([('start', '<i8'), ('length', '<i4'), ('context', '<i4'), ('opens', '?')])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Spans by row: row r is spans[row_starts[r] : row_starts[r + 1]], together at most S targets.

    Attributes:
        spans: [number of spans] of _SPAN.
        row_starts: [num_rows + 1] int64.
        digest: stands for the cache and all settings that the plan follows from.
    """

    spans: npt.NDArray[Any]
    row_starts: IndexArray
    digest: str

    @property
    def num_rows(self) -> int:
        """How many rows one epoch has."""
        return len(self.row_starts) - 1


def training_plan(
    cache: TokenCache, sequence_length: int, mode: PackingMode, seed: int, room: IndexArray | None = None
) -> Plan:
    """The plan of one epoch; computed at first use and kept beside the cache.

    Args:
        sequence_length: S, targets in a row.
        seed: of the order of documents, which decides who shares a row with whom.
        room: what a piece of so many tokens, from 0 on, takes of a row's S, where that is not its length; the last is
            the longest piece. For 'best_fit' alone.
    """
    settings = {'mode': mode, 'sequence_length': sequence_length, 'seed': seed, **_identity(room)}

    def compute() -> tuple[npt.NDArray[Any], IndexArray]:
        ends = cache.document_ends()
        lengths = np.diff(ends, prepend=0)
        order = Permutation(len(ends), derive_key(seed, 'document order'))(np.arange(len(ends)))
        if mode == 'concatenate':
            return _concatenate((ends - lengths)[order], lengths[order], sequence_length)
        longest = sequence_length if room is None else len(room) - 1
        return _best_fit(_windows((ends - lengths)[order], lengths[order], longest, 0), sequence_length, room)

    return _stored(cache, settings, compute)


def _identity(room: IndexArray | None) -> dict[str, str]:
    """What a plan's digest holds of it."""
    return {} if room is None else {'room': hashlib.sha256(room.astype('<i8').tobytes()).hexdigest()}


def evaluation_plan(
    cache: TokenCache,
    sequence_length: int,
    stride: int | None = None,
    max_documents: int | None = None,
    room: IndexArray | None = None,
) -> tuple[Plan, int]:
    """(plan, bytes of text in it): every token of every document carries loss exactly once, documents apart.

    Args:
        sequence_length: S.
        stride: how far the window moves over a document longer than S: every window after the first repeats
            S - stride tokens as context. None is S: no repetition.
        max_documents: evaluate only a fixed random choice of so many documents; None for all.
        room: see `training_plan`; without a stride alone.
    """
    if stride is not None and not 1 <= stride <= sequence_length:
        raise UserError(
            f'an evaluation stride of {stride} is not between 1 and the sequence length {sequence_length}',
            fix='Set DataConfig.evaluation_stride to fewer tokens, or None.',
        )
    context = 0 if stride is None else sequence_length - stride
    documents = np.arange(cache.num_documents)
    if max_documents is not None and max_documents < cache.num_documents:
        chosen = Permutation(cache.num_documents, derive_key('evaluation documents'))(np.arange(max_documents))
        documents = np.sort(chosen)
    settings = {'evaluation': len(documents), 'sequence_length': sequence_length, 'context': context, **_identity(room)}

    def compute() -> tuple[npt.NDArray[Any], IndexArray]:
        ends = cache.document_ends()
        lengths = np.diff(ends, prepend=0)
        longest = sequence_length if room is None else len(room) - 1
        windows = _windows((ends - lengths)[documents], lengths[documents], longest, context)
        return _best_fit(windows, sequence_length, room)

    return _stored(cache, settings, compute), int(cache.document_bytes()[documents].sum())


def _count_within(sizes: IndexArray) -> IndexArray:
    """0, 1, ..., sizes[0] - 1, 0, 1, ..., sizes[1] - 1, and so on."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _concatenate(starts: IndexArray, lengths: IndexArray, size: int) -> tuple[npt.NDArray[Any], IndexArray]:
    ends = np.cumsum(lengths)
    num_rows = -(-int(ends[-1]) // size)
    row_bounds = np.arange(num_rows + 1) * size
    cuts = np.union1d(ends - lengths, row_bounds[:-1])
    documents = np.searchsorted(ends, cuts, side='right')
    offsets = cuts - (ends - lengths)[documents]
    spans = np.zeros(len(cuts), _SPAN)
    spans['start'] = starts[documents] + offsets
    spans['length'] = np.diff(cuts, append=ends[-1])
    spans['opens'] = offsets == 0
    return spans, np.searchsorted(cuts, row_bounds)


def _windows(starts: IndexArray, lengths: IndexArray, size: int, context: int) -> npt.NDArray[Any]:
    """The spans that cover documents: up to `size` tokens each, of which later ones repeat `context`."""
    step = size - context
    counts = 1 + np.maximum(0, -(-(lengths - size) // step))
    number = _count_within(counts)
    spans = np.zeros(len(number), _SPAN)
    spans['start'] = np.repeat(starts, counts) + number * step
    spans['length'] = np.minimum(np.repeat(lengths, counts) - number * step, size)
    spans['context'] = np.where(number > 0, context, 0)
    spans['opens'] = number == 0
    return spans


def _best_fit(
    spans: npt.NDArray[Any], size: int, room_of: IndexArray | None = None
) -> tuple[npt.NDArray[Any], IndexArray]:
    """Put spans into rows of `size`, longest first, each into the row with the least room that is enough.

    Rows with equal room are interchangeable, and so are spans of equal length. So all spans of one length are placed
    together: the fullest rows that fit take as many as they can, then the next fullest. Rows become as full as when
    spans are placed one by one, at a cost of a few array operations for each length.
    """
    sizes = spans['length'] if room_of is None else room_of[spans['length']]
    order = np.argsort(-sizes, kind='stable')
    lengths = sizes[order]
    row_of_span = np.empty(len(order), np.int64)
    rows_by_room: list[list[IndexArray]] = [[] for _ in range(size + 1)]
    num_by_room = np.zeros(size + 1, np.int64)
    num_rows = 0

    def put(rows: IndexArray, room: int) -> None:
        if len(rows):
            rows_by_room[room].append(rows)
            num_by_room[room] += len(rows)

    distinct, firsts, counts = np.unique(-lengths, return_index=True, return_counts=True)
    for length, first, count in zip((-distinct).tolist(), firsts.tolist(), counts.tolist(), strict=True):
        done = 0
        while done < count:
            fitting = np.flatnonzero(num_by_room[length:])
            if len(fitting):
                room = length + int(fitting[0])
                rows = np.concatenate(rows_by_room[room])
                rows_by_room[room], num_by_room[room] = [], 0
            else:
                room = size
                needed = -(-(count - done) // (size // length))
                rows = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            each = room // length
            taken = np.repeat(rows, each)[: count - done]
            row_of_span[first + done : first + done + len(taken)] = taken
            done += len(taken)
            full, rest = divmod(len(taken), each)
            touched = full + (rest > 0)
            put(rows[:full], room - each * length)
            put(rows[full:touched], room - rest * length)
            put(rows[touched:], room)
    by_row = np.argsort(row_of_span, kind='stable')
    row_starts = np.searchsorted(row_of_span[by_row], np.arange(num_rows + 1))
    return spans[order][by_row], row_starts


def _stored(cache: TokenCache, settings: dict[str, Any], compute: Any) -> Plan:
    """The plan for these settings from beside the cache, or computed and put there."""
    identity = {'version': _PLAN_VERSION, 'cache': cache.digest, **settings}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    paths = [cache.directory / f'plan-{digest[:16]}.{part}.npy' for part in ('spans', 'rows')]
    try:
        spans, row_starts = (np.asarray(np.load(path, mmap_mode='r')) for path in paths)
        if len(spans) == row_starts[-1]:
            return Plan(spans, row_starts, digest)
    except (OSError, ValueError, IndexError):  # not there, or damaged: computed again
        pass
    spans, row_starts = compute()
    with disk_errors(cache.directory):
        for path, array in zip(paths, (spans, row_starts), strict=True):
            _save(path, array)
    return Plan(spans, row_starts, digest)


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class PackedRows:
    """The rows of a plan as language-modelling examples, assembled for many rows at once.

    A span of targets t_1 ... t_n has inputs t_0 ... t_{n-1}, where t_0 is the token before it in its document, or the
    start boundary where the document begins.

    Args:
        attend_across_documents: make each row one segment with positions running through it, so that attention sees
            earlier documents of the row. Otherwise each span is a segment and positions begin anew in it.
    """

    def __init__(self, cache: TokenCache, plan: Plan, sequence_length: int, *, attend_across_documents: bool = False):
        self.cache, self.plan, self.sequence_length = cache, plan, sequence_length
        self.attend_across_documents = attend_across_documents
        self.num_rows = plan.num_rows
        self.digest = f'{plan.digest}:{attend_across_documents}'

    def rows(self, indices: npt.ArrayLike) -> Batch:
        """Rows by number, each array [n, S]; a number of num_rows or more gives a row of padding.

        Keys: inputs, targets int32; loss_weights float32; segment_ids, positions int32. Padding has weight 0 and
        segment 0.
        """
        indices = np.minimum(np.asarray(indices, np.int64), self.num_rows)
        starts = self.plan.row_starts
        first, last = starts[indices], starts[np.minimum(indices + 1, self.num_rows)]
        per_row = last - first
        number = _count_within(per_row)  # of a span in its row
        spans = self.plan.spans[np.repeat(first, per_row) + number]
        lengths = spans['length'].astype(np.int64)

        # Where each span begins in the flattened [n * S]: at its row, after the spans before it there.
        targets_before = np.concatenate([[0], np.cumsum(lengths)])
        row_begin = np.arange(len(indices)) * self.sequence_length - targets_before[np.cumsum(per_row) - per_row]
        begin = np.repeat(row_begin, per_row) + targets_before[:-1]

        shape = (len(indices), self.sequence_length)
        within = _count_within(lengths)
        where = np.repeat(begin, lengths) + within
        pad = self.cache.boundaries.pad
        inputs, targets = np.full(shape, pad, np.int32), np.full(shape, pad, np.int32)
        weights, segments = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int32)

        tokens = self.cache.gather(spans['start'], lengths)
        targets.reshape(-1)[where] = tokens
        inputs.reshape(-1)[where[1:]] = tokens[:-1]  # the first of each span is set next
        inputs.reshape(-1)[begin] = self._first_inputs(spans)
        weights.reshape(-1)[where] = within >= np.repeat(spans['context'], lengths)
        if self.attend_across_documents:
            segments.reshape(-1)[where] = 1
            positions.reshape(-1)[where] = where % self.sequence_length
        else:
            segments.reshape(-1)[where] = np.repeat(number + 1, lengths)
            positions.reshape(-1)[where] = within
        return {
            'inputs': inputs,
            'targets': targets,
            'loss_weights': weights,
            'segment_ids': segments,
            'positions': positions,
        }

    def __getitem__(self, index: int) -> Batch:
        """One row, each array [S]."""
        return {name: array[0] for name, array in self.rows([index]).items()}

    def _first_inputs(self, spans: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        first = np.full(len(spans), self.cache.boundaries.start, np.int32)
        cut = np.flatnonzero(~spans['opens'])
        first[cut] = self.cache.gather(spans['start'][cut] - 1, np.ones(len(cut), np.int64))
        return first
