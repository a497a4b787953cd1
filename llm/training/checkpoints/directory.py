"""Checkpoints as directories: their names, how one comes into being and how it goes, each by one atomic rename.

    checkpoints/step_000001000            committed: the only kind that is ever restored
    checkpoints/step_000002000.partial    being written, or left behind by a killed save
    checkpoints/step_000000500.deleting   being deleted, or left behind by a killed deletion

A name without a suffix is given only to a complete checkpoint and taken away before anything in it is deleted, so
whatever such a directory lacks was lost by the disk and is reported as damage, never mistaken for a killed save.
"""

import os
import re
import shutil
from pathlib import Path

PARTIAL, DELETING = '.partial', '.deleting'
_COMMITTED = re.compile(r'step_(\d{9,})')
_LEFTOVER = re.compile(rf'step_\d{{9,}}({re.escape(PARTIAL)}|{re.escape(DELETING)})')


def step_path(directory: Path, step: int) -> Path:
    """Where the committed checkpoint of `step` is or would be."""
    return directory / f'step_{step:09d}'


def partial_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is committed."""
    return directory / f'step_{step:09d}{PARTIAL}'


def step_of(path: Path) -> int | None:
    """The step of a committed checkpoint's directory, None if `path` is not named like one."""
    match = _COMMITTED.fullmatch(path.name)
    return int(match[1]) if match else None


def committed_steps(directory: Path) -> list[int]:
    """Steps of the committed checkpoints in `directory`, rising; damaged ones are among them."""
    if not directory.is_dir():
        return []
    steps = (step_of(path) for path in directory.iterdir() if path.is_dir())
    return sorted(step for step in steps if step is not None)


def publish(directory: Path, step: int) -> None:
    """Turn the partial checkpoint of `step` into the committed one, in place of a damaged one if there is one."""
    final = step_path(directory, step)
    if final.exists():
        _rename_for_deletion(final)
    os.rename(partial_path(directory, step), final)
    sync_directory(directory)


def delete(directory: Path, step: int) -> None:
    """Delete the committed checkpoint of `step`; killed half-way, nothing is left that looks committed."""
    shutil.rmtree(_rename_for_deletion(step_path(directory, step)))


def remove_leftovers(directory: Path) -> list[str]:
    """Delete what killed saves and killed deletions left behind; returns the names."""
    leftovers = sorted(path for path in directory.iterdir() if _LEFTOVER.fullmatch(path.name))
    for path in leftovers:
        shutil.rmtree(path)
    return [path.name for path in leftovers]


def _rename_for_deletion(path: Path) -> Path:
    doomed = path.with_name(path.name + DELETING)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    # Without this a power cut could bring the old name back over files that are already gone.
    sync_directory(path.parent)
    return doomed


def write_durably(path: Path, content: bytes) -> None:
    """Create `path` with this content, on the disk itself when this returns; where it exists, it is complete."""
    unfinished = path.with_name(path.name + '.unfinished')
    with open(unfinished, 'wb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(unfinished, path)


def sync_directory(path: Path) -> None:
    """Bring the entries of a directory to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
