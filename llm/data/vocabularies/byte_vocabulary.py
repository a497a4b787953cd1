"""The vocabulary that needs no training: one token a byte of UTF-8 (Xue et al. 2022, ByT5)."""

import re
from typing import Any, Self

import numpy as np

from llm.data.vocabularies.special_tokens import SpecialTokens
from llm.data.vocabularies.vocabulary import Vocabulary


class ByteVocabulary(Vocabulary):
    """256 bytes after the special tokens: byte b has id b + number of special tokens."""

    kind = 'bytes'
    boundary = re.compile('')  # no token spans two characters: any place will do

    def __init__(self, special_tokens: SpecialTokens = SpecialTokens()) -> None:
        names = special_tokens.names()
        roles = {'pad': special_tokens.pad, 'eos': special_tokens.eos, 'bos': special_tokens.bos}
        super().__init__(256 + len(names), {name: i for i, name in enumerate(names)}, roles, rules=())

    @classmethod
    def restore(cls, settings: dict[str, Any], files: dict[str, bytes]) -> Self:
        """The vocabulary from its settings."""
        del files
        roles = settings['roles']
        extra = tuple(name for name in settings['special_ids'] if name not in roles.values())
        return cls(SpecialTokens(pad=roles['pad'], eos=roles['eos'], bos=roles['bos'], extra=extra))

    def files(self) -> dict[str, bytes]:
        """None: the settings say all."""
        return {}

    def encode_segment(self, text: str) -> np.ndarray:
        """One id a byte."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + np.int32(len(self.special_ids))

    def token_bytes(self) -> list[bytes]:
        """b'' for special tokens, then every byte."""
        return [b''] * len(self.special_ids) + [bytes([byte]) for byte in range(256)]
