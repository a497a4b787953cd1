"""manifest.json of an exported model: what its programs take and give, and what made them."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm.errors import UserError
from llm.interop.exporting.signatures import Signature

FILE = 'manifest.json'
VERSION = 1
_PACKAGES = ('jax', 'jax2onnx', 'onnx', 'tensorflow')


def write_manifest(
    directory: Path,
    kind: str,
    programs: Sequence[Signature],
    places: Mapping[str, Mapping[str, Any]],
    more: Mapping[str, Any],
) -> None:
    """Write it.

    Args:
        kind: the format. places: of each program, what says where it is.
        more: of the model: its size, its vocabulary.
    """
    made_by = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    signatures = {program.name: {**places[program.name], **program.described()} for program in programs}
    content = {'version': VERSION, 'format': kind, **more, 'signatures': signatures, 'made_by': made_by}
    (directory / FILE).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


def read_manifest(directory: Path, kind: str) -> dict[str, Any]:
    """Its content.

    Raises:
        UserError: there is none, it is damaged, or of another format.
    """
    try:
        content = json.loads((directory / FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'has no {FILE} that can be read', where=str(directory), fix='Check the path.') from error
    if not isinstance(content, dict) or (content.get('format'), content.get('version')) != (kind, VERSION):
        raise UserError(f'{FILE} is not that of a model exported as {kind!r}', where=str(directory))
    return content


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
