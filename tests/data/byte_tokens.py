"""A vocabulary small enough to read by eye, for the tests of what happens to tokens after they were made."""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class ByteTokens:
    """Bytes as ids 3 to 258. Without bos by default: the boundary is eos on both sides, as in GPT-2."""

    bos_id: int | None = None
    eos_id: int | None = 1
    size: int = 259
    pad_id: int = 0

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def encode_batch(self, texts, num_threads=None):
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3 for text in texts]

    def decode(self, ids) -> str:
        return bytes(i - 3 for i in ids if i >= 3).decode()


@dataclasses.dataclass(frozen=True)
class CharacterTokens:
    """Code points as ids, so that a corpus of distinct characters has distinct tokens."""

    bos_id: int | None = None
    eos_id: int | None = 1
    size: int = 0x110000
    pad_id: int = 0

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def encode_batch(self, texts, num_threads=None):
        return [np.asarray([ord(character) for character in text], np.int32) for text in texts]
