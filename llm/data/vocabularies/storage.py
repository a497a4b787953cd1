"""A vocabulary's directory: vocabulary.json, which says the kind and is written last, and the files it names."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from llm.errors import UserError

DESCRIPTION = 'vocabulary.json'
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a directory holds: the kind of vocabulary, its digest, its settings, its files' contents by name."""

    kind: str
    digest: str
    settings: dict[str, Any]
    files: dict[str, bytes]


def write(directory: Path, stored: Stored) -> None:
    """Write a vocabulary, or do nothing where the same one stands. Raises UserError where another one stands."""
    if (directory / DESCRIPTION).exists():
        if read(directory).digest == stored.digest:
            return
        raise UserError(
            'holds another vocabulary already', where=str(directory), fix='Choose another directory or delete this one'
        )
    description = {
        'format': _FORMAT,
        'kind': stored.kind,
        'digest': stored.digest,
        **stored.settings,
        'files': {name: hashlib.sha256(content).hexdigest() for name, content in stored.files.items()},
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(description, indent=2, ensure_ascii=False) + '\n'
        for name, content in {**stored.files, DESCRIPTION: text.encode()}.items():
            partial = directory / f'{name}.partial'
            with partial.open('wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(directory / name)
    except OSError as error:
        raise UserError(f'cannot write a vocabulary ({error.strerror})', where=str(directory)) from error


def read(directory: Path) -> Stored:
    """What `write` wrote, with every file checked against its SHA-256. Raises UserError where something is amiss."""
    path = directory / DESCRIPTION
    description = read_json(path)
    fields = ('format', 'kind', 'digest', 'files')
    if not isinstance(description, dict) or any(field not in description for field in fields):
        raise damaged(path, 'does not describe a vocabulary')
    version, kind, digest, names = (description.pop(field) for field in fields)
    if version != _FORMAT:
        raise UserError(f'has format {version}, not {_FORMAT}', where=str(path), fix='Use the llm that wrote it')
    files = {}
    for name, expected in names.items():
        files[name] = read_bytes(directory / name)
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise damaged(directory / name, f'is not the file that {DESCRIPTION} was written with')
    return Stored(kind, digest, description, files)


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises UserError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f'cannot be read ({error.strerror})', where=str(path), fix='Give a vocabulary directory'
        ) from error


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises UserError."""
    content = read_bytes(path)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f'is not JSON ({error})') from error


def damaged(path: Path, what: str) -> UserError:
    """The error for a file of a vocabulary that is not what it should be."""
    return UserError(what, where=str(path), fix='Take the vocabulary from where it was made, or train it again')
