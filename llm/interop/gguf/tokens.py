"""The tokens that a GGUF file lists, whatever kind of tokenizer they belong to."""

import dataclasses
from typing import Any

from llm.errors import UserError

# Kinds of tokens, as llama.cpp counts them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_ROLES = {
    'bos': ('bos_token_id', 'cls_token_id'),
    'eos': ('eos_token_id', 'seperator_token_id'),  # spelt like that
    'pad': ('padding_token_id',),
    'unk': ('unknown_token_id',),
}
ROLES = {role: keys[0] for role, keys in _ROLES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """What the metadata say of a tokenizer, checked.

    Attributes:
        metadata: keys without 'tokenizer.ggml.'.
        tokens, kinds: by id.
        ids: of bos, eos, pad and unk.
        where: the file, for messages.
    """

    metadata: dict[str, Any]
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int | None]
    where: str


def read_tokens(metadata: dict[str, Any], where: str) -> Stored:
    """The lists of a tokenizer.

    Raises:
        UserError: they are missing, or do not fit together.
    """
    tokens = metadata.get('tokens')
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise broken(where, 'has no list of tokens')
    kinds = metadata.get('token_type', [NORMAL] * len(tokens))
    if not isinstance(kinds, list) or len(kinds) != len(tokens) or not set(kinds) <= set(range(7)):
        raise broken(where, f'has {len(tokens)} tokens and no kind for each')
    ids = {
        role: next((metadata[key] for key in keys if metadata.get(key) is not None), None)
        for role, keys in _ROLES.items()
    }
    for role, token in ids.items():
        if token is not None and (type(token) is not int or not 0 <= token < len(tokens)):
            raise broken(where, f'gives {token!r:.40} as {role}, and has {len(tokens)} tokens')
    return Stored(metadata, tokens, kinds, ids, where)


def broken(where: str, what: str) -> UserError:
    """The error for a file whose tokenizer cannot be used."""
    return UserError(what, where=where, fix='Get the file again, from where it was made.')
