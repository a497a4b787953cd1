"""What every vocabulary can do: text to ids and back, exactly."""

import abc
import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from llm.data.vocabularies import storage

# Characters encoded in one call. Longer texts are cut, so that memory stays bounded and threads share one document.
_SEGMENT_CHARACTERS = 1 << 18
# A run of this many characters in which no place to cut is found is cut anyway.
_MAX_SEGMENT_CHARACTERS = 1 << 20

# Where each token is in a text: the first character that it has a part of, and the one behind the last.
Spans = list[tuple[int, int]]


class Vocabulary(abc.ABC):
    """A finite set of tokens, ids 0 to size - 1, and the rules by which text becomes tokens.

    For every vocabulary trained here `decode(encode(text)) == text` for any text that UTF-8 can encode (others raise
    UnicodeEncodeError), and the tokens' bytes add up to the text's. Special tokens are never the result of encoding.
    Vocabularies that give the same ids are equal: `digest` decides. Instances do not change and can be pickled.

    Args:
        size: number of ids, special tokens included.
        special_ids: the id of every special token by name.
        roles: the names of the special tokens that are pad, eos, bos and unk, as far as there are any.
        rules: what else decides the ids; goes into the digest.

    Attributes:
        pad_id: the id that fills batches: of the padding token, else of eos, else 0.
        bos_id, eos_id, unk_id: ids of these special tokens, None where there is none.
        digest: SHA-256 in hex of all that decides the ids.
    """

    kind: ClassVar[str]
    # Where a text may be cut without changing its ids; a subclass says why its pattern is right.
    boundary: ClassVar[re.Pattern[str]]

    def __init__(
        self, size: int, special_ids: Mapping[str, int], roles: Mapping[str, str | None], rules: Iterable[bytes]
    ) -> None:
        self.size = size
        self.special_ids = dict(special_ids)
        self.roles = {role: roles.get(role) for role in ('pad', 'eos', 'bos', 'unk')}
        ids = {role: None if name is None else self.special_ids[name] for role, name in self.roles.items()}
        self.eos_id, self.bos_id, self.unk_id = ids['eos'], ids['bos'], ids['unk']
        self.pad_id: int = next((i for i in (ids['pad'], ids['eos']) if i is not None), 0)
        digest = hashlib.sha256(json.dumps([self.kind, size, sorted(self.special_ids.items()), self.roles]).encode())
        for rule in rules:
            digest.update(len(rule).to_bytes(8, 'little') + rule)
        self.digest = digest.hexdigest()

    @classmethod
    @abc.abstractmethod
    def restore(cls, settings: dict[str, Any], files: dict[str, bytes]) -> Self:
        """The vocabulary from what `settings` and `files` of another gave."""

    @abc.abstractmethod
    def files(self) -> dict[str, bytes]:
        """Content, by name, of the files that define the vocabulary."""

    def settings(self) -> dict[str, Any]:
        """What defines the vocabulary besides, as JSON takes it."""
        return {'size': self.size, 'special_ids': self.special_ids, 'roles': self.roles}

    @abc.abstractmethod
    def encode_segment(self, text: str) -> np.ndarray:
        """The ids of a text of at most a million characters, int32 [length]."""

    @abc.abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for, by id; b'' for special tokens."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return [token for segment in self._segments(text) for token in self.encode_segment(segment).tolist()]

    def encode_marked(self, text: str) -> tuple[list[int], Spans]:
        """The ids of a text in which names of special tokens stand for these, as in a rendered chat, and their spans.

        Only for text that a program wrote: whoever writes '<eos>' in such a text ends the document.
        """
        ids: list[int] = []
        spans: Spans = []
        start = 0
        for name in [*self._special_names.finditer(text), None] if self.special_ids else [None]:
            end = name.start() if name else len(text)
            if end > start:
                part_ids, part_spans = self._encode_with_spans(text[start:end])
                ids += part_ids
                spans += [(start + a, start + b) for a, b in part_spans]
            if name:
                ids.append(self.special_ids[name[0]])
                spans.append(name.span())
                start = name.end()
        return ids, spans

    def encode_batch(self, texts: Iterable[str], num_threads: int | None = None) -> list[np.ndarray]:
        """The ids of each text, int32 [length], in as many threads as the process has cores, unless told otherwise."""
        texts = list(texts)
        groups: list[list[tuple[int, str]]] = []  # (which text, segment), about one segment's length together
        room = 0
        for index, text in enumerate(texts):
            for segment in self._segments(text):
                if room <= 0:
                    groups.append([])
                    room = _SEGMENT_CHARACTERS
                groups[-1].append((index, segment))
                room -= len(segment)

        def encode_group(group: list[tuple[int, str]]) -> list[tuple[int, np.ndarray]]:
            return [(index, self.encode_segment(segment)) for index, segment in group]

        threads = min(num_threads or _usable_cores(), len(groups))
        if threads <= 1:
            encoded = [encode_group(group) for group in groups]
        else:
            with concurrent.futures.ThreadPoolExecutor(threads) as pool:
                encoded = list(pool.map(encode_group, groups))
        parts: list[list[np.ndarray]] = [[] for _ in texts]
        for group in encoded:
            for index, ids in group:
                parts[index].append(ids)
        return [np.concatenate(ids) if ids else np.zeros(0, np.int32) for ids in parts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the tokens; special tokens have none. Raises ValueError for an id outside of the vocabulary."""
        table = self._byte_table
        tokens = np.asarray(list(ids), np.int64)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.size):
            raise ValueError(f'ids from {tokens.min()} to {tokens.max()} are not all in a vocabulary of {self.size}')
        return b''.join([table[token] for token in tokens])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the tokens; bytes that are not UTF-8 (half a character, say) become U+FFFD."""
        return self.decode_bytes(ids).decode(errors='replace')

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the vocabulary to a directory. Raises UserError when it holds another or cannot be written."""
        storage.write(Path(directory), storage.Stored(self.kind, self.digest, self.settings(), self.files()))

    def as_seqio(self) -> Any:
        """This vocabulary as a seqio.Vocabulary, for SeqIO tasks. Imports TensorFlow."""
        from llm.data.vocabularies.seqio_adapter import as_seqio

        return as_seqio(self)

    @functools.cached_property
    def _byte_table(self) -> list[bytes]:
        return self.token_bytes()

    @functools.cached_property
    def _special_names(self) -> re.Pattern[str]:
        return re.compile('|'.join(re.escape(name) for name in sorted(self.special_ids, key=len, reverse=True)))

    def _encode_with_spans(self, text: str) -> tuple[list[int], Spans]:
        """The ids and spans of a text whose tokens' bytes add up to its own."""
        ids = self.encode(text)
        character_of = [i for i, character in enumerate(text) for _ in character.encode()]
        ends = list(itertools.accumulate(len(self._byte_table[token]) for token in ids))
        return ids, [(character_of[a], character_of[b - 1] + 1) for a, b in itertools.pairwise([0, *ends])]

    def _segments(self, text: str) -> list[str]:
        return cut(text, self.boundary, _SEGMENT_CHARACTERS, _MAX_SEGMENT_CHARACTERS)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size}, digest={self.digest[:12]!r})'

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return type(self).restore, (self.settings(), self.files())


def cut(text: str, boundary: re.Pattern[str], length: int, limit: int) -> list[str]:
    """Segments that joined are the text; each ends where `boundary` first matches from `length` on, or at `limit`."""
    segments = []
    start = 0
    while len(text) - start > length:
        match = boundary.search(text, start + length, start + limit)
        end = match.start() if match else min(start + limit, len(text))
        segments.append(text[start:end])
        start = end
    if start < len(text):
        segments.append(text[start:] if start else text)
    return segments


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
