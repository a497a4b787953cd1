"""Supervised models that fastText has trained, read by the package fasttext-predict."""

import functools
import os
from typing import Any

from llm.data.sources.files import file_state
from llm.errors import UserError


def load(path: str) -> Any:
    """The model in a file, read once in a process while the file stays.

    Raises:
        UserError: the package is not installed, or the file is no model.
    """
    return _load(path, file_state(path) if os.path.exists(path) else None)


@functools.lru_cache(maxsize=8)
def _load(path: str, state: tuple[int, int, int] | None) -> Any:
    try:
        import fasttext
    except ImportError as error:
        raise UserError(
            'a fastText model needs the package fasttext-predict', where=path, fix='pip install fasttext-predict'
        ) from error
    try:
        return fasttext.load_model(path)
    except ValueError as error:
        raise UserError(
            f'is no fastText model ({error})', where=path, fix='Give the path of a .bin or .ftz.'
        ) from error


def best(path: str, text: str) -> tuple[str, float]:
    """(the most probable label, its probability); ('und', 0.0) where there is none."""
    labels, probabilities = load(path).predict(text.replace('\n', ' '))
    return (_name(labels[0]), min(1.0, float(probabilities[0]))) if labels else ('und', 0.0)


def probabilities(path: str, text: str) -> dict[str, float]:
    """The probability of every label; none for a text without words."""
    if not text.strip():
        return {}
    labels, found = load(path).predict(text.replace('\n', ' '), k=-1)
    return {_name(label): min(1.0, float(p)) for label, p in zip(labels, found, strict=True)}


def _name(label: str) -> str:
    return label.removeprefix('__label__')
