"""Finding the newest checkpoint that is whole, and reading it."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm.errors import UserError
from llm.training.checkpoints.arrays import check_match, read_arrays
from llm.training.checkpoints.directory import committed_steps, step_of, step_path
from llm.training.checkpoints.disk_errors import as_user_error
from llm.training.checkpoints.manifest import find_damage

METADATA = 'metadata.json'
ARRAYS = 'state'
PARAMETERS = 'parameters'


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint, read and verified.

    Attributes:
        step: the step after which it was saved.
        state: the arrays, with the structure, shardings and dtypes asked for.
        metadata: what the caller passed to `save` (tuples have become lists). metrics: likewise.
        environment: what it was saved on; see `llm.training.environment`.
        path: its directory.
        rejected: one line for each bad file of newer checkpoints that were passed over.
        rejected_steps: the steps of those checkpoints.
    """

    step: int
    state: Any
    metadata: dict[str, Any]
    metrics: dict[str, float]
    environment: dict[str, Any]
    path: Path
    rejected: list[str]
    rejected_steps: list[int]


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint, verified and not read: `content` is its metadata.json; the rest as in Restored."""

    step: int
    path: Path
    content: dict[str, Any]
    rejected: list[str]
    rejected_steps: list[int]


def restore_newest(
    directory: Path, steps: Sequence[int], abstract: Any, *, prefix: tuple[str, ...] = (), cast: bool = False
) -> Restored:
    """Read the newest whole checkpoint of `steps` in `directory`; see `Checkpointer.restore`.

    Every process of a job must call this; they agree on the checkpoint.
    """
    found = newest_whole(directory, steps)
    check_match(found.content['arrays'], abstract, str(found.path), prefix=prefix, cast=cast)
    return Restored(
        step=found.step,
        state=read_arrays(found.path / ARRAYS, abstract, prefix),
        metadata=found.content['metadata'],
        metrics=found.content['metrics'],
        environment=found.content['environment'],
        path=found.path,
        rejected=found.rejected,
        rejected_steps=found.rejected_steps,
    )


def newest_whole(directory: Path, steps: Sequence[int]) -> Found:
    """The newest whole checkpoint of `steps` in `directory`; every process of a job must call this.

    Raises:
        UserError: there is none.
    """
    rejected: list[str] = []
    rejected_steps: list[int] = []
    for step in sorted(steps, reverse=True):
        path = step_path(directory, step)
        problems = _damage_found_by_any(path, step)
        if problems:
            lines = [f'{path.name}/{problem}' for problem in problems]
            warn(f'{directory}: ' + '; '.join(lines) + '. This checkpoint is not used.')
            rejected += lines
            rejected_steps.append(step)
            continue
        return Found(step, path, json.loads((path / METADATA).read_bytes()), rejected, rejected_steps)
    raise UserError(
        f'no checkpoint is whole: {"; ".join(rejected)}' if rejected else 'there is no checkpoint',
        where=str(directory),
        fix='Bring the damaged files back from a copy; or, to start over, move these directories away.'
        if rejected
        else 'Check the path.',
    )


def restore_parameters(path: str | Path, abstract_parameters: Any) -> Restored:
    """Read only the parameters of a checkpoint, of this or another run, onto any mesh and in any float dtype.

    Args:
        path: a run directory, its `checkpoints` folder (the newest whole checkpoint is taken), or one checkpoint.
        abstract_parameters: pytree of jax.ShapeDtypeStruct with shardings, with the names of the saved parameters.

    Returns:
        Restored, whose state is the parameters alone.

    Raises:
        UserError: there is no whole checkpoint; or a parameter is missing, not expected or of another shape, each
            named with what was expected and what the checkpoint has.
    """
    return restore_newest(*steps_at(path), abstract_parameters, prefix=(PARAMETERS,), cast=True)


def steps_at(path: str | Path) -> tuple[Path, list[int]]:
    """The folder of checkpoints that `path` means (see restore_parameters), and the steps of those meant there.

    Raises:
        UserError: there is none.
    """
    path = Path(path).absolute()
    step = step_of(path)
    try:
        if step is not None and path.is_dir():
            directory, steps = path.parent, [step]
        else:
            directory = path / 'checkpoints' if (path / 'checkpoints').is_dir() else path
            steps = agreed_steps(directory)
    except OSError as error:
        raise as_user_error(error, 'cannot look for checkpoints', path) from error
    if not steps:
        raise UserError(
            'there is no checkpoint',
            where=str(path),
            fix='Give a run directory, its checkpoints folder, or one step_... folder in it.',
        )
    return directory, steps


def agreed_steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints as process 0 sees them: network file systems show others older listings."""
    steps = committed_steps(directory)
    if jax.process_count() == 1:
        return steps
    from jax.experimental import multihost_utils

    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.zeros(count, np.int32)
    padded[: len(steps)] = steps[:count]
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)] if count else []


def warn(message: str) -> None:
    """Say on stderr what went wrong without ending the run, once per job."""
    if jax.process_index() == 0:
        # The stderr of a job is often a file, and may be on the very disk that is full.
        with contextlib.suppress(OSError):
            print(f'warning: {message}', file=sys.stderr, flush=True)


def _damage_found_by_any(path: Path, step: int) -> list[str]:
    """The damage that the processes find in their shares of the files; every process gets all of it."""
    count = jax.process_count()
    problems = find_damage(path, step, jax.process_index(), count)
    if count == 1:
        return problems
    from jax.experimental import multihost_utils

    text = np.frombuffer('\n'.join(problems).encode(), np.uint8)
    longest = int(np.max(multihost_utils.process_allgather(np.int32(text.size))))
    if not longest:
        return []
    padded = np.zeros(longest, np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded).reshape(count, longest)
    # What all processes check, all have found: said once.
    lines = [line for row in texts for line in row.tobytes().rstrip(b'\0').decode().split('\n') if line]
    return sorted(set(lines))
