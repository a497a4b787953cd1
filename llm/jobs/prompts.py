"""Prompts and other texts: where they come from, and the tokens that a model sees of them."""

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
    return [text for text, _ in read_texts(path, field, 'prompt', 'prompt_field')]


def read_texts(
    path: str | Path, field: str, what: str, setting: str, id_field: str | None = None
) -> list[tuple[str, str]]:
    """The same for texts of any kind, each with its id: the number of its line, or what `id_field` holds.

    Args:
        what: a text is, for messages. setting: the one that `field` is from.
        id_field: of the objects of a .jsonl, a string.
    """
    path = Path(path).expanduser()
    try:
        # Not splitlines(), for which form feeds and the like end a line too.
        lines = path.read_text(encoding='utf-8-sig').split('\n')
    except UnicodeDecodeError as error:
        at = error.object[: error.start].count(b'\n') + 1
        raise UserError('this is not UTF-8 text', where=f'{path}:{at}', fix='Save the file as UTF-8.') from None
    except OSError as error:
        raise UserError(f'cannot read the {what}s ({error.strerror})', where=str(path), fix='Check the path.') from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f'there is no {what} in this file', where=str(path), fix='Write one a line.')
    if path.suffix != '.jsonl':
        if id_field is not None:
            raise UserError('id_field is for .jsonl files', where=str(path), fix='Set id_field = None.')
        return [(line, str(number)) for number, line in numbered]
    found = []
    for number, line in numbered:
        where = f'{path}:{number}'
        record = _object(line, where)
        text = _string(record, field, where, f'Set {setting} to the field that holds the {what}.')
        name = (
            str(number) if id_field is None else _string(record, id_field, where, 'Set id_field to another, or None.')
        )
        found.append((text, name))
    return found


def _object(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'this is not JSON ({error})', where=where, fix='Write one object a line.') from None


def _string(record: Any, field: str, where: str, fix: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        names = f' with fields {", ".join(map(repr, record))}' if isinstance(record, dict) else ''
        raise UserError(
            f'this is no object with a string in {field!r}, but {type(record).__name__}{names}', where=where, fix=fix
        )
    return value


def prompt_tokens(vocabulary: Vocabulary, text: str) -> tuple[int, ...]:
    """The ids of a text as the beginning of a document, after the token from which its first one is predicted.

    Raises:
        UserError: the text holds what UTF-8 cannot encode; or the vocabulary has no token to begin with.
    """
    try:
        return (Boundaries.of(vocabulary).start, *vocabulary.encode(text))
    except UnicodeEncodeError as error:
        raise UserError(f'the prompt {text!r} is no Unicode text ({error.reason})', fix='Change the prompt.') from error


def encoder_tokens(vocabulary: Vocabulary, text: str, most: int | None = None) -> tuple[int, ...]:
    """The ids of a text as an encoder reads it: bos, where the vocabulary has one besides eos, the text, eos.

    Args:
        most: tokens; what is over is cut off the end of the text.

    Raises:
        UserError: the text holds what UTF-8 cannot encode; or the vocabulary has neither bos nor eos.
    """
    boundaries = Boundaries.of(vocabulary)
    before = () if boundaries.start == boundaries.end else (boundaries.start,)
    try:
        tokens = vocabulary.encode(text)
    except UnicodeEncodeError as error:
        raise UserError(f'the text {text!r} is no Unicode text ({error.reason})', fix='Change the text.') from error
    room = len(tokens) if most is None else max(0, most - len(before) - 1)
    return (*before, *tokens[:room], boundaries.end)
