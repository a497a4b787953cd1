"""What a run measures, written twice: JSON lines, which are the record, and TensorBoard events, which are for looking.

A line of `metrics.jsonl` is one JSON object with sorted keys:

    {"kind": "train", "step": 20, "loss": 3.1415927410125732, ..., "timing": {"tokens_per_second": 6012.4, ...}}

`kind` says what was measured (`train`, `evaluation`, ...); an `evaluation` line names its evaluation set in `set`, and
a `warning` line says its `message`. All that depends on the clock is under `timing`: two runs of one configuration are
equal in everything else, bit for bit, however often either was killed.
"""

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from llm.errors import UserError

if TYPE_CHECKING:
    from llm.training.tensorboard_events import TensorBoardEvents

METRICS_FILE = 'metrics.jsonl'
_log = logging.getLogger(__name__)
_RESERVED = frozenset({'step', 'kind', 'timing'})
_NOT_FINITE = {'NaN': math.nan, 'Infinity': math.inf, '-Infinity': -math.inf}  # as protobuf's JSON mapping spells them


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in `path`, in order; [] if there is no such file. A line that is not whole is left out."""
    if not path.exists():
        return []
    with path.open('rb') as file:
        return [record for line in file if (record := _parse(line)) is not None]


def read_metrics(run_directory: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` as written by MetricsWriter, with NaN and infinities as floats again."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: restore(inner) for name, inner in value.items()}
        return _NOT_FINITE.get(value, value) if isinstance(value, str) else value

    return [restore(record) for record in read_json_lines(run_directory / METRICS_FILE)]


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object with a step on this line; None if the line was not written to its end or is something else."""
    if not line.endswith(b'\n'):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get('step'), int) else None


def cut_after(path: Path, step: int) -> int:
    """Drop the lines of `path` after `step`, and those that are not whole; the number of lines dropped.

    The file is replaced at once, so that a kill leaves either the old or the new one.
    """
    if not path.exists():
        return 0
    partial = path.with_name(path.name + '.partial')
    dropped = 0
    with path.open('rb') as old, partial.open('wb') as new:
        for line in old:
            record = _parse(line)
            if record is not None and record['step'] <= step:
                new.write(line)
            else:
                dropped += 1
        new.flush()
        os.fsync(new.fileno())
    if not dropped:
        partial.unlink()
        return 0
    os.replace(partial, path)
    _sync_directory(path.parent)
    return dropped


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_failed(path: Path, error: OSError) -> UserError:
    return UserError(
        f'cannot write ({error.strerror or error})',
        where=str(path),
        fix='Make room or set the permissions, and run the same command again: it resumes from the last checkpoint.',
    )


class JsonLines:
    """Appends JSON objects with a `step` to a file, one a line, each handed to the operating system at once.

    Opened at `start_step` > 0, it cuts what a killed process wrote after that step; step 0 is a fresh start and cuts
    everything. What belongs to a step must be written before its checkpoint is committed.
    """

    def __init__(self, path: Path, start_step: int):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            dropped = cut_after(path, start_step if start_step > 0 else -1)
            self._file = path.open('ab', buffering=0)
        except OSError as error:
            raise _write_failed(path, error) from error
        if dropped:
            _log.info('%s: cut %d lines after step %d', path, dropped, start_step)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line, whole or not at all.

        Raises:
            UserError: the disk is full or fails.
        """
        line = (json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False) + '\n').encode(
            'utf-8', 'backslashreplace'
        )
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise _write_failed(self.path, error) from error

    def sync(self) -> None:
        """Return when all lines are on the disk and would survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; closing twice does no harm."""
        self._file.close()


class MetricsWriter:
    """Writes what is measured to `<run_directory>/metrics.jsonl` and `<run_directory>/tensorboard/`.

    Opened at the step that was restored, it cuts the lines after it, so that they are not there twice; 0 means a fresh
    start.

    Args:
        enabled: False writes nothing, in processes other than the first.

    Raises:
        UserError: the directory cannot be written to.
    """

    def __init__(self, run_directory: Path, start_step: int, *, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        self._lines = JsonLines(Path(run_directory) / METRICS_FILE, start_step)
        self._events = self._open_events(Path(run_directory) / 'tensorboard', start_step)
        self._started, self._clock = time.time(), time.perf_counter()

    def _open_events(self, directory: Path, start_step: int) -> 'TensorBoardEvents':
        from llm.training.tensorboard_events import TensorBoardEvents  # a sixth of a second, for who only reads

        try:
            return TensorBoardEvents(directory, start_step)
        except OSError as error:
            raise _write_failed(directory, error) from error

    def write(
        self, step: int, kind: str, values: Mapping[str, Any], *, timing: Mapping[str, float] | None = None
    ) -> None:
        """Write one line, and its numbers to TensorBoard as `<kind>/[<set>/]<name>`.

        Args:
            step: number of updates done when this was measured.
            kind: `train`, `evaluation`, `warning`, ...
            values: numbers (Python's, NumPy's or jax arrays of one element; all bits are kept) and strings.
            timing: what depends on the clock. `started` (Unix time at which this process began to write) and
                `elapsed` (seconds since then) are added to it.

        Raises:
            UserError: the disk is full or fails.
        """
        if reserved := _RESERVED.intersection(values):
            raise ValueError(f'the names {sorted(reserved)} are taken')
        if not self._enabled:
            return
        scalars = {name: _plain(value) for name, value in values.items()}
        clocks = {name: _plain(value) for name, value in (timing or {}).items()}
        stamps = {'started': self._started, 'elapsed': time.perf_counter() - self._clock}
        record = {'step': int(step), 'kind': kind, **scalars, 'timing': {**clocks, **stamps}}
        self._lines.append({name: _strict(value) for name, value in record.items()})

        prefix = f'{kind}/{scalars["set"]}/' if 'set' in scalars else f'{kind}/'
        numbers = {f'{prefix}{name}': value for name, value in (scalars | clocks).items() if not isinstance(value, str)}
        if numbers:
            try:
                self._events.write(int(step), numbers)
            except OSError as error:
                raise _write_failed(self._lines.path.parent / 'tensorboard', error) from error

    def sync(self) -> None:
        """Return when all lines are on the disk; for the moment before a checkpoint is committed."""
        if self._enabled:
            self._lines.sync()

    def close(self) -> None:
        """Close both files."""
        if self._enabled:
            self._lines.close()
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _plain(value: Any) -> int | float | str:
    """A Python scalar with the same bits."""
    if isinstance(value, str | bool | int | float):
        return value
    return np.asarray(value).item()


def _strict(value: Any) -> Any:
    """`value` in strict JSON, which has no NaN and no infinity."""
    if isinstance(value, dict):
        return {name: _strict(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return 'NaN' if math.isnan(value) else ('Infinity' if value > 0 else '-Infinity')
    return value
