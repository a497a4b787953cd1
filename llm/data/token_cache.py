"""The token cache: a split of a source as token ids on disk, made once and then mapped into memory.

A cache is a directory named by a digest of what determines its content: the fingerprints of the shards, the split, the
vocabulary and FORMAT_VERSION. It holds, for shard 00000 of the source and so on,

    00000.tokens   token ids of the documents one after the other, little-endian uint16, or uint32 for a vocabulary
                   of more than 65,536
    00000.ends     int64, where each document ends in the former
    00000.bytes    int64, the UTF-8 bytes of each document
    00000.json     counts and digests; written after the three, it says that the shard is complete
    manifest.json  all of that and the totals; written last, it says that the cache is complete

Every document ends with the boundary token `end_id`, and its first token is predicted from `start_id`. So the stored
tokens are exactly the targets of a language model: each once, each with a context, and every byte of a document is
predicted exactly once. `llm.data.token_cache_building` writes caches, also in parallel.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm.data.sources import ReadCounts, Split
from llm.errors import UserError

FORMAT_VERSION = 1
MANIFEST = 'manifest.json'
PARTS = ('tokens', 'ends', 'bytes')

IndexArray = npt.NDArray[np.int64]


class Tokenizer(Protocol):
    """What the cache needs of a vocabulary of `llm.data.vocabularies`. Picklable."""

    @property
    def size(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def digest(self) -> str: ...

    def encode_batch(self, texts: list[str], num_threads: int | None = None) -> list[npt.NDArray[Any]]:
        """Token ids of each text, without boundary tokens; None takes as many threads as there are processors."""
        ...


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """The special tokens around documents: `start` is the context of the first token, `end` is the last target."""

    start: int
    end: int
    pad: int

    @classmethod
    def of(cls, vocabulary: Tokenizer) -> 'Boundaries':
        """bos and eos of the vocabulary; where it has only one of them, that one for both (GPT-2: <|endoftext|>)."""
        bos, eos = vocabulary.bos_id, vocabulary.eos_id
        start, end = (eos if bos is None else bos), (bos if eos is None else eos)
        if start is None or end is None:
            raise UserError(
                'the vocabulary has neither a bos nor an eos token, and documents need a boundary',
                where=type(vocabulary).__name__,
                fix='Give it one when it is trained or loaded.',
            )
        return cls(start, end, vocabulary.pad_id)


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """What 00000.json and the manifest say of one shard. `digests` are SHA-256 by part."""

    name: str
    fingerprint: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    digests: dict[str, str]
    counts: dict[str, Any]

    def sizes(self, item_size: int) -> dict[str, int]:
        """Bytes on disk by part."""
        return {
            'tokens': self.num_tokens * item_size,
            'ends': self.num_documents * 8,
            'bytes': self.num_documents * 8,
        }

    def is_intact(self, directory: Path, index: int, item_size: int) -> bool:
        """Whether the three files are there with the right sizes. Content is checked by `TokenCache.damaged_files`."""
        try:
            return all(
                (directory / shard_file(index, part)).stat().st_size == size
                for part, size in self.sizes(item_size).items()
            )
        except OSError:
            return False


def shard_file(index: int, part: str) -> str:
    """File name of one part of a shard, within the directory of its cache."""
    return f'{index:05d}.{part}'


def cache_digest(fingerprints: Iterable[str], split: Split, vocabulary: Tokenizer) -> str:
    """The name of the cache: SHA-256 of all that determines its content."""
    identity = {
        'format': FORMAT_VERSION,
        'shards': list(fingerprints),
        'split': split,
        'vocabulary': vocabulary.digest,
        'boundaries': dataclasses.astuple(Boundaries.of(vocabulary)),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def token_dtype(vocabulary_size: int) -> np.dtype[Any]:
    """The smallest type on disk that holds every id."""
    return np.dtype('<u2') if vocabulary_size <= 1 << 16 else np.dtype('<u4')


def _mapped(path: Path, dtype: npt.DTypeLike, length: int) -> npt.NDArray[Any]:
    if length == 0:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode='r', shape=(length,)))


class TokenCache:
    """A complete cache, read through memory maps. Picklable: another process maps the files again.

    Documents and tokens are numbered through all shards in order.

    Attributes:
        directory, digest: where it is, and the name that stands for its content.
        boundaries: the special tokens.
        num_documents, num_tokens, num_bytes: totals; tokens include one boundary for each document.
        counts: what reading the source met, with samples of bad records.
    """

    def __init__(self, directory: Path):
        """Open the cache in `directory`.

        Raises:
            FileNotFoundError: it is not complete.
            ValueError: a file has not the size that the manifest says, or the manifest is unreadable.
        """
        self.directory = Path(directory)
        try:
            manifest = json.loads((self.directory / MANIFEST).read_text())
            self.digest: str = manifest['digest']
            self.split: Split = manifest['split']
            self.boundaries = Boundaries(**manifest['boundaries'])
            self._dtype = np.dtype(manifest['dtype'])
            self.shards = tuple(ShardRecord(**shard) for shard in manifest['shards'])
            self.counts = ReadCounts.from_dict(manifest['counts'])
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f'{self.directory / MANIFEST} is not a manifest: {error}') from error
        for index, shard in enumerate(self.shards):
            if not shard.is_intact(self.directory, index, self._dtype.itemsize):
                raise ValueError(f'shard {index} of {self.directory} has files of the wrong size')
        self.num_documents = sum(shard.num_documents for shard in self.shards)
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self.num_bytes = sum(shard.num_bytes for shard in self.shards)
        self._first_tokens = np.cumsum([0] + [shard.num_tokens for shard in self.shards], dtype=np.int64)
        self._tokens: dict[int, npt.NDArray[Any]] = {}

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return TokenCache, (self.directory,)

    def document_ends(self) -> IndexArray:
        """[num_documents] int64: where each document ends in the numbering of tokens; it starts where the one before
        ends. In memory."""
        parts = [
            _mapped(self.directory / shard_file(index, 'ends'), '<i8', shard.num_documents) + first
            for index, (shard, first) in enumerate(zip(self.shards, self._first_tokens[:-1], strict=True))
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def document_bytes(self) -> IndexArray:
        """[num_documents] int64: the UTF-8 length of each document. In memory."""
        parts = [
            _mapped(self.directory / shard_file(index, 'bytes'), '<i8', shard.num_documents)
            for index, shard in enumerate(self.shards)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def gather(self, starts: IndexArray, lengths: IndexArray) -> npt.NDArray[np.int32]:
        """The tokens of many spans, one after the other, [sum(lengths)] int32.

        Args:
            starts: [n] first token of each span.
            lengths: [n] how many tokens; a span does not leave its shard.
        """
        out = np.empty(int(lengths.sum()), np.int32)
        destinations = np.cumsum(lengths) - lengths
        shards = np.searchsorted(self._first_tokens, starts, side='right') - 1
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            size = lengths[here]
            step = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
            source = np.repeat(starts[here] - self._first_tokens[shard], size) + step
            out[np.repeat(destinations[here], size) + step] = self._shard_tokens(shard)[source]
        return out

    def document(self, index: int) -> npt.NDArray[np.int32]:
        """The tokens of one document, the end boundary last. For looking at data; rows are read with `gather`."""
        ends = self.document_ends()
        start = ends[index - 1] if index else 0
        return self.gather(np.asarray([start]), np.asarray([ends[index] - start]))

    def damaged_files(self) -> list[Path]:
        """Files whose content is not what was written, found by reading all of the cache."""
        damaged = []
        for index, shard in enumerate(self.shards):
            for part in PARTS:
                path = self.directory / shard_file(index, part)
                with path.open('rb') as file:
                    if hashlib.file_digest(file, 'sha256').hexdigest() != shard.digests[part]:
                        damaged.append(path)
        return damaged

    def _shard_tokens(self, index: int) -> npt.NDArray[Any]:
        tokens = self._tokens.get(index)
        if tokens is None:
            path = self.directory / shard_file(index, 'tokens')
            tokens = self._tokens[index] = _mapped(path, self._dtype, self.shards[index].num_tokens)
        return tokens
