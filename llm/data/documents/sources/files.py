"""What a source of raw documents is, and what sources that read files have in common."""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from llm.data.documents.document import Document, Ignored, Quarantined, domain_of, not_installed, valid_text
from llm.data.sources.files import UnreadableFile, file_identity, find_files
from llm.errors import UserError

# Suffixes of what is decompressed while it is read.
PACKINGS = ('', '.gz', '.zst', '.bz2')

Item = Document | Quarantined | Ignored
# Part of every fingerprint: raise it when a change here changes what is read from the same file.
_READER_VERSION = 2


class InputShard(Protocol):
    """One unit of parallel work, usually a file. Picklable: it holds where and how to read, never the content."""

    @property
    def name(self) -> str:
        """For messages and quarantine; unique within a run."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 in hex. Changes when what the shard gives could change: the content or the settings."""
        ...

    def read(self) -> Iterator[Item]:
        """Its records in a fixed order, the same ones every time. Damaged data gives `Quarantined` and never raises.

        Raises:
            UserError: the file cannot be opened or read to its end.
        """
        ...


@runtime_checkable  # so that a config's field can be annotated with it
class Source(Protocol):
    """Where raw documents come from: a frozen dataclass that gin configures."""

    @property
    def name(self) -> str: ...

    def shards(self) -> Sequence[InputShard]:
        """In a fixed order. Raises UserError where there is nothing to read."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileSource(abc.ABC):
    """Files by globs, on this machine or by URL (gs://, s3://, https://, as fsspec and its drivers open them).

    Args:
        files: glob or globs.
        name: of the source, in the ledger and in settings by source.
        licence: SPDX identifier of what has no licence of its own.
        max_document_bytes: a longer record is quarantined, and never held in memory as a whole.
    """

    files: str | tuple[str, ...]
    name: str
    licence: str | None = None
    max_document_bytes: int = 16 * 1024 * 1024

    suffixes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.max_document_bytes <= 0:
            raise UserError(f'max_document_bytes = {self.max_document_bytes} is not positive', where=self.name)

    def shards(self) -> Sequence[InputShard]:
        """One a file."""
        return [FileShard(path, self) for path in find_files(self.files, self.suffixes)]

    @abc.abstractmethod
    def read(self, path: str) -> Iterator[Item]:
        """The records of one file; see InputShard.read."""

    def document(self, fallback_id: str, fields: dict[str, Any]) -> Document:
        """A document of this source: text made valid, domain and licence filled in.

        Args:
            fallback_id: for a record that has no id of its own.
        """
        fields = {'id': fallback_id, 'text': '', 'licence': self.licence, 'metadata': {}} | {
            name: value for name, value in fields.items() if value not in (None, '')
        }
        valid = {name: valid_text(value) for name, value in fields.items() if isinstance(value, str)}
        fields |= {name: value for name, (value, _) in valid.items()}
        if any(changed for _, changed in valid.values()):
            fields['metadata'] = {**fields['metadata'], 'lone_surrogates': True}
        return Document(source=self.name, domain=domain_of(fields.get('url')), **fields)


@dataclasses.dataclass(frozen=True)
class FileShard:
    """One file of a source."""

    path: str
    source: FileSource

    @property
    def name(self) -> str:
        return f'{self.source.name}:{self.path}'

    def fingerprint(self) -> str:
        """Of the file's content where it is on this machine, else of what its store says of it; and of the settings."""
        settings = {field.name: getattr(self.source, field.name) for field in dataclasses.fields(self.source)}
        settings.pop('files')
        identity = [_READER_VERSION, type(self.source).__name__, file_identity(self.path), settings]
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=list).encode()).hexdigest()

    def read(self) -> Iterator[Item]:
        """The records, each id once: a second record of the same id is quarantined."""
        seen: set[bytes] = set()
        number = 0
        try:
            for item in self.source.read(self.path):
                number += 1
                if isinstance(item, Document):
                    key = hashlib.blake2b(item.id.encode(errors='surrogatepass'), digest_size=8).digest()
                    if key in seen:
                        yield Quarantined(f'{self.path}:{number}', 'its id has come up before in this file', item.id)
                        continue
                    seen.add(key)
                yield item
        except UnreadableFile:  # a disk or a net that fails says nothing of the data
            raise
        except UserError as error:  # damaged data: what was read before it counts
            yield Quarantined(f'{self.path}:{number + 1}', f'{error.what}; nothing behind it was read')
        except ImportError as error:
            raise not_installed(error) from error
        except Exception as error:  # whatever a parser raises is the fault of what it was given
            reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:500]
            yield Quarantined(f'{self.path}:{number + 1}', f'{reason}; nothing behind it was read')
