"""Files that workers on other machines read and write: paths on a shared disk, or URLs as fsspec opens them."""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from llm.data.sources.files import is_url, open_binary, unwritable
from llm.errors import UserError


def check_reachable(directory: str) -> None:
    """Raises UserError where no driver for a URL is installed, or it does not let us in."""
    try:
        listed(join(directory, '*'))
    except Exception as error:  # drivers have errors of their own
        fix = 'Install the driver' if isinstance(error, (ImportError, ValueError)) else 'Check the URL and your access'
        raise UserError(f'cannot be listed ({error})', where=directory, fix=fix) from error


def join(directory: str, name: str) -> str:
    """A path below a directory."""
    return f'{directory.rstrip("/")}/{name}'


@contextlib.contextmanager
def here(path: str) -> Iterator[Path]:
    """A file as one on this machine: itself, or a copy for as long as it is needed."""
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.rpartition('/')[2]
        with open_binary(path) as source, copy.open('wb') as target:
            shutil.copyfileobj(source, target, 1 << 20)
        yield copy


def publish(path: Path, target: str) -> None:
    """Give a finished file its name, so that it is there as a whole or not at all; done twice, the last one stays.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    if is_url(target):
        import fsspec

        # Stores show an object when it has been closed.
        with path.open('rb') as source, fsspec.open(target, 'wb') as file:
            shutil.copyfileobj(source, file, 1 << 20)
        return
    folder = Path(target).parent
    temporary = folder / f'{Path(target).name}.{uuid.uuid4().hex}.tmp'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open('rb') as source, temporary.open('wb') as file:
            shutil.copyfileobj(source, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise unwritable(folder, error, 'pipelines') from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_record(target: str, content: Any) -> None:
    """A small JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'record.json'
        path.write_text(json.dumps(content, indent=1, sort_keys=True))
        publish(path, target)


def read_record(path: str) -> Any:
    """A JSON file; None where there is none, or it is cut short."""
    try:
        with open_binary(path) as file:
            return json.loads(file.read())
    except (OSError, ValueError):
        return None


def listed(pattern: str) -> list[str]:
    """Files that match, sorted; there may be none."""
    if not is_url(pattern):
        path = Path(pattern)
        return sorted(str(found) for found in path.parent.glob(path.name))
    import fsspec

    files, _, _ = fsspec.get_fs_token_paths(pattern)
    files.invalidate_cache()  # others write there
    return [cast(str, files.unstrip_protocol(path)) for path in sorted(files.glob(pattern))]


def sizes(directory: str) -> dict[str, int]:
    """Name -> bytes of each file in a folder, which need not be there."""
    if not is_url(directory):
        return {path.name: path.stat().st_size for path in Path(directory).glob('*')}
    import fsspec

    files, _, (path,) = fsspec.get_fs_token_paths(directory)
    files.invalidate_cache()
    found = files.find(path, maxdepth=1, detail=True)
    return {name.rpartition('/')[2]: int(about['size']) for name, about in found.items()}


def remove_files(paths: Sequence[str]) -> None:
    """Files that are there."""
    if not paths or not is_url(paths[0]):
        for path in paths:
            Path(path).unlink()
        return
    import fsspec

    files, _, inner = fsspec.get_fs_token_paths(list(paths))
    files.rm(inner)


def remove(directory: str) -> None:
    """A folder with all that is in it, if it is there."""
    if not is_url(directory):
        shutil.rmtree(directory, ignore_errors=True)
        return
    import fsspec

    files, _, (path,) = fsspec.get_fs_token_paths(directory)
    with contextlib.suppress(FileNotFoundError):
        files.rm(path, recursive=True)
