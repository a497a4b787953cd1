"""Where gin files are found: relative to the working directory, then beside the installed package."""

import os
import pathlib

from llm.configuration import suggesting
from llm.errors import UserError

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
# A checkout has gin_configs beside the package `llm`; an installation may carry it inside.
ROOTS = (pathlib.Path(), _PACKAGE.parent, _PACKAGE)


def find(name: str, *, where: str = '') -> str:
    """Path of the gin file called `name`: as given if the working directory has it, else absolute.

    Raises:
        UserError: no such file; `where` is the include statement that asked for it, if one did.
    """
    for root in ROOTS:
        path = os.path.join(root, name)
        if os.path.isfile(path):
            return path if root.is_absolute() else name
    what = f'the gin file {name!r} does not exist'
    if os.path.isdir(name):
        what = f'{name!r} is a folder, not a gin file'
    raise UserError(what, where=where, fix=suggesting.nearest(name, _known_files(name)))


def read(path: str, *, where: str = '') -> str:
    """The text of the gin file at `path`.

    Raises:
        UserError: it cannot be read or is not UTF-8.
    """
    try:
        return pathlib.Path(path).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b'\n') + 1
        raise UserError('this is not UTF-8 text', where=f'{path}:{line}', fix='Save the file as UTF-8.') from None
    except OSError as error:
        raise UserError(f'cannot read {path!r}: {error.strerror}', where=where) from None


def run_files() -> list[tuple[str, str]]:
    """(path, first comment line) of every run file in gin_configs/runs."""
    for root in ROOTS:
        folder = root / 'gin_configs' / 'runs'
        if folder.is_dir():
            paths = sorted(folder.glob('*.gin'))
            return [(f'gin_configs/runs/{path.name}', _first_comment(path)) for path in paths]
    return []


def _first_comment(path: pathlib.Path) -> str:
    with path.open(encoding='utf-8', errors='replace') as lines:
        return next((line.lstrip('# ').rstrip() for line in lines if line.startswith('#')), '')


def _known_files(name: str) -> set[str]:
    """Gin files that `name` may be a misspelling of: those in its own folder and all of gin_configs."""
    folders = {os.path.dirname(name): '*.gin', 'gin_configs': '**/*.gin'}
    return {
        os.path.join(folder, path.relative_to(root / folder))
        for root in ROOTS
        for folder, pattern in folders.items()
        if '\0' not in folder and (root / folder).is_dir()
        for path in (root / folder).glob(pattern)
    }
