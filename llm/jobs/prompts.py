"""Prompts: where they come from, and the tokens that a model sees of them."""

import json
from pathlib import Path
from typing import Any

from llm.data.token_cache import Boundaries
from llm.data.vocabularies import Vocabulary
from llm.errors import UserError


def read_prompts(path: str | Path, field: str) -> list[str]:
    """The prompts of a file, blank lines left out: a .jsonl has an object a line, any other file a prompt a line.

    Args:
        field: what holds the prompt in the objects of a .jsonl; the only way to a prompt of several lines.

    Raises:
        UserError: the file cannot be read, is not UTF-8, has no prompt, or a line is not an object with that string.
    """
    path = Path(path).expanduser()
    try:
        # Not splitlines(), for which form feeds and the like end a line too.
        lines = path.read_text(encoding='utf-8-sig').split('\n')
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b'\n') + 1
        raise UserError('this is not UTF-8 text', where=f'{path}:{line}', fix='Save the file as UTF-8.') from None
    except OSError as error:
        raise UserError(f'cannot read the prompts ({error.strerror})', where=str(path), fix='Check the path.') from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError('there is no prompt in this file', where=str(path), fix='Write one a line.')
    if path.suffix != '.jsonl':
        return [line for _, line in numbered]
    return [_field_of(line, field, f'{path}:{number}') for number, line in numbered]


def _field_of(line: str, field: str, where: str) -> str:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f'this is not JSON ({error})', where=where, fix='Write one object a line.') from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        names = f' with fields {", ".join(map(repr, record))}' if isinstance(record, dict) else ''
        raise UserError(
            f'this is no object with a string in {field!r}, but {type(record).__name__}{names}',
            where=where,
            fix='Set prompt_field to the field that holds the prompt.',
        )
    return record[field]


def prompt_tokens(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """The ids of a text as the beginning of a document, after the token from which its first one is predicted.

    Raises:
        UserError: the text holds what UTF-8 cannot encode; or the vocabulary has no token to begin with.
    """
    try:
        return (Boundaries.of(vocabulary).start, *vocabulary.encode(text))
    except UnicodeEncodeError as error:
        raise UserError(f'the prompt {text!r} is no Unicode text ({error.reason})', fix='Change the prompt.') from error
