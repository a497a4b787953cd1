"""Digests of every file of a checkpoint: written before it is committed, checked before it is used.

    manifest_00000.json    size and SHA-256 of each file that process 0 wrote (00001: process 1, ...)
    COMMITTED              size and SHA-256 of each manifest, written last, and the SHA-256 of itself

Together they cover every byte: a flipped bit, a truncated, missing or extra file anywhere, here too, is found and
named. Orbax alone restores flipped bits in silence.
"""

import concurrent.futures
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from llm.training.checkpoints.directory import sync_directory, write_durably

MARKER = 'COMMITTED'
FORMAT = 1
_MANIFEST = re.compile(r'manifest_(\d{5})\.json')
# Orbax keeps what process i writes in directories and files called ...process_i.
_PROCESS = re.compile(r'process_(\d+)')
_THREADS = 8  # hashlib lets go of the interpreter lock


def write_manifest(root: Path, process: int) -> None:
    """Write the manifest of the files under `root` that `process` wrote, after bringing them to the disk itself."""
    names = [name for name in _files(root) if _writer_of(name) == process]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        records = list(pool.map(lambda name: _record(root / name, sync=True), names))
    body = {'format': FORMAT, 'process': process, 'files': dict(zip(names, records, strict=True))}
    write_durably(root / f'manifest_{process:05d}.json', _json(body))


def missing_manifests(root: Path, process_count: int) -> list[int]:
    """The processes, of so many, that have not written their manifest."""
    return [process for process in range(process_count) if not (root / f'manifest_{process:05d}.json').is_file()]


def write_marker(root: Path, step: int) -> None:
    """Write the commit marker over all manifests under `root`, and bring every directory entry to the disk itself."""
    manifests = {name: _record(root / name) for name in _files(root) if _MANIFEST.fullmatch(name)}
    body = _json({'format': FORMAT, 'step': step, 'manifests': manifests})
    write_durably(root / MARKER, _seal(body) + body)
    for path, _, _ in os.walk(root):
        sync_directory(Path(path))


def find_damage(root: Path, step: int, process: int = 0, process_count: int = 1) -> list[str]:
    """What is wrong with the checkpoint of `step` at `root`: one line for each bad file, named relative to `root`.

    The digests are shared out: process i of n checks the files of manifests i, i + n, ...; the marker, the manifests
    themselves and the list of files are checked by every process.
    """
    try:
        marker = (root / MARKER).read_bytes()
    except FileNotFoundError:
        return [f'{MARKER} is missing']
    except OSError as error:
        return [f'{MARKER} cannot be read: {error.strerror}']
    seal, _, body = marker.partition(b'\n')
    if _seal(body) != seal + b'\n':
        return [f'{MARKER} is damaged']
    content = json.loads(body)
    if content['format'] != FORMAT:
        return [f'{MARKER} is of format {content["format"]}; this program reads format {FORMAT}']
    if content['step'] != step:
        return [f'{MARKER} is of step {content["step"]}']

    problems: list[str] = []
    expected = {MARKER, *content['manifests']}
    to_check: dict[str, dict[str, Any]] = {}
    for index, (name, record) in enumerate(sorted(content['manifests'].items())):
        problem = _compare(root, name, record)
        if problem:
            problems.append(problem)
            continue
        files = json.loads((root / name).read_bytes())['files']
        expected.update(files)
        if index % process_count == process:
            to_check.update(files)
    found = set(_files(root))
    # Without its manifest, which files belong to a process is not known: then only what is known is compared.
    if not problems:
        problems += [f'{name} is not part of the checkpoint' for name in sorted(found - expected)]
    problems += [f'{name} is missing' for name in sorted(expected - found) if name not in content['manifests']]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        names = sorted(name for name in to_check if name in found)
        problems += filter(None, pool.map(lambda name: _compare(root, name, to_check[name]), names))
    return problems


def _files(root: Path) -> list[str]:
    """Everything under `root` that is not a directory, relative to it, sorted."""
    paths = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return sorted(path.relative_to(root).as_posix() for path in paths)


def _writer_of(name: str) -> int:
    match = _PROCESS.search(name)
    return int(match[1]) if match else 0


def _record(path: Path, sync: bool = False) -> dict[str, Any]:
    with open(path, 'rb') as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
        return {'bytes': file.tell(), 'sha256': digest}


def _compare(root: Path, name: str, record: dict[str, Any]) -> str | None:
    try:
        found = _record(root / name)
    except FileNotFoundError:
        return f'{name} is missing'
    except OSError as error:
        return f'{name} cannot be read: {error.strerror}'
    if found['bytes'] != record['bytes']:
        return f'{name} has {found["bytes"]} bytes instead of {record["bytes"]}'
    if found['sha256'] != record['sha256']:
        return f'{name} is damaged: its content does not have the SHA-256 it was saved with'
    return None


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True).encode() + b'\n'


def _seal(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode() + b'\n'
