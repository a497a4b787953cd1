"""What a run directory says about its run: the config it belongs to and where it was started."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.errors import UserError

_RECORD, _GIN = 'config.json', 'config.gin'


def flatten_config(config: Any, prefix: str = '') -> dict[str, Any]:
    """A nested config dataclass as {'path.to.field': JSON value}; a dataclass also records its type's name."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        flat: dict[str, Any] = {f'{prefix}.type' if prefix else 'type': type(config).__name__}
        for field in dataclasses.fields(config):
            flat |= flatten_config(getattr(config, field.name), f'{prefix}.{field.name}' if prefix else field.name)
        return flat
    if isinstance(config, (tuple, list)) and any(dataclasses.is_dataclass(item) for item in config):
        return {
            key: value for i, item in enumerate(config) for key, value in flatten_config(item, f'{prefix}.{i}').items()
        }
    return {prefix: list(config) if isinstance(config, tuple) else config}


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that `path` holds all of it or what it held before, whatever happens.

    Raises:
        UserError: the directory cannot be written, or the disk is full.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + '.partial')
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f'cannot write: {error.strerror}', where=str(path), fix='Check permissions and free space.'
        ) from error


def claim(directory: Path, config: Any, operative_config: str, *, changeable: tuple[str, ...]) -> bool:
    """Make `directory` the run of `config`, or confirm that it already is; True if it was there before.

    Writes config.json (what is compared), then config.gin (what reproduces the run); killed between them, the next
    call writes what is missing. Fields below a prefix in `changeable` do not decide what a run computes (its mesh,
    where it is saved) and may differ on resume. A run that was stopped before it had computed anything, by a mistake
    in its data for example, gives way to another config.

    Raises:
        UserError: the directory holds a run of another config, naming the fields that differ, or of another job, or
            is not a run.
    """
    record, gin = directory / _RECORD, directory / _GIN
    wanted = {
        key: value
        for key, value in flatten_config(config).items()
        if not any(key == prefix or key.startswith(prefix + '.') for prefix in changeable)
    }
    wanted = json.loads(json.dumps(wanted))
    if record.exists():
        try:
            found = json.loads(record.read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise UserError(
                f'cannot be read as JSON ({error})', where=str(record), fix='Use another run directory.'
            ) from error
        if not isinstance(found, dict) or 'type' not in found:
            raise UserError('is not the record of a run', where=str(record), fix='Use another run directory.')
        differing = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        if not differing:
            if not gin.exists():
                write_atomically(gin, operative_config)
            return True
        empty = _holds_only(directory, _RECORD, _GIN, f'{_RECORD}.partial', f'{_GIN}.partial')
        if found['type'] != wanted['type']:
            raise UserError(
                f'is of {found["type"]}, not of {wanted["type"]}',
                where=str(directory),
                fix='Use a new or an empty directory.',
            )
        if not empty:
            shown = ', '.join(f'{key} {found.get(key)!r} there, {wanted.get(key)!r} here' for key in differing[:3])
            more = f' and {len(differing) - 3} more' if len(differing) > 3 else ''
            raise UserError(
                f'holds a run of another config: {shown}{more}',
                where=str(directory),
                fix='Use another run directory, or that config, or delete the directory.',
            )
    elif directory.exists() and not _holds_only(directory, f'{_RECORD}.partial'):
        raise UserError(
            'is not empty and not a run directory (it has no config.json)',
            where=str(directory),
            fix='Use a new or an empty directory.',
        )
    with _writing(gin):
        gin.unlink(missing_ok=True)  # never one of another config beside the new record
    write_atomically(record, json.dumps(wanted, indent=1, sort_keys=True) + '\n')
    write_atomically(gin, operative_config)
    return False


def _holds_only(directory: Path, *names: str) -> bool:
    """Whether there is nothing but these files, the lock and a folder for checkpoints without any."""
    return all(
        entry.name in ('run.lock', *names)
        or (entry.name == 'checkpoints' and entry.is_dir() and not any(entry.iterdir()))
        for entry in directory.iterdir()
    )
