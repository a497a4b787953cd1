"""Documents that lie in records: JSON lines and Parquet files, as other pipelines write them."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from llm.data.documents.document import Quarantined
from llm.data.documents.sources.files import PACKINGS, FileSource, Item
from llm.data.documents.streams import bounded_lines
from llm.data.sources.files import is_url, stream_bytes, unreadable
from llm.errors import UserError

_FIELDS = ('id', 'url', 'date', 'licence')
# Parquet: rows of a batch that are held at once.
_ROWS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Records(FileSource):
    """Args:
    text_field: field or column of the text. html_field: of HTML to extract the text from, in place of a text.
    id_field, url_field, date_field, licence_field: of the others; a record need not have them. All fields that
        are left become metadata.
    """

    text_field: str = 'text'
    html_field: str | None = None
    id_field: str = 'id'
    url_field: str = 'url'
    date_field: str = 'date'
    licence_field: str = 'license'

    def from_fields(self, path: str, number: int, record: dict[str, Any]) -> Item:
        """The document of one record, or why it is none."""
        where, field = f'{path}:{number}', self.html_field or self.text_field
        if field not in record:
            has = ', '.join(map(repr, list(record)[:8])) or 'none'
            return Quarantined(where, f'has no field {field!r}; it has {has}')
        content = record.pop(field)
        if not isinstance(content, str):
            return Quarantined(where, f'field {field!r} holds {type(content).__name__}, not a string')
        if (size := len(content.encode(errors='surrogatepass'))) > self.max_document_bytes:
            return Quarantined(where, f'{size:,} bytes, more than max_document_bytes')
        named = {name: record.pop(getattr(self, f'{name}_field'), None) for name in _FIELDS}
        fields = {name: str(value) for name, value in named.items() if value not in (None, '')}
        kind = 'markup' if self.html_field else 'text'
        return self.document(f'{self.name}:{path}:{number}', {**fields, kind: content, 'metadata': record})


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonLines(_Records):
    """A JSON object a line, also compressed."""

    suffixes = tuple(f'{kind}{packing}' for kind in ('.jsonl', '.json', '.ndjson') for packing in PACKINGS)

    def read(self, path: str) -> Iterator[Item]:
        # A line has other fields beside the text, and escapes.
        for number, line in enumerate(bounded_lines(stream_bytes(path), 2 * self.max_document_bytes), start=1):
            where = f'{path}:{number}'
            if isinstance(line, int):
                yield Quarantined(where, f'a line of {line:,} bytes, more than twice max_document_bytes')
                continue
            if not line or line.isspace():
                continue
            try:
                record = json.loads(line)  # JSON is UTF-8; other encodings fail here
            except (ValueError, RecursionError) as error:
                yield Quarantined(where, f'not a line of JSON ({error})')
                continue
            if isinstance(record, dict):
                yield self.from_fields(path, number, record)
            else:
                yield Quarantined(where, f'a JSON {type(record).__name__}, not an object')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(_Records):
    """Rows of Parquet files; columns as the fields say."""

    suffixes = ('.parquet',)

    def read(self, path: str) -> Iterator[Item]:
        import fsspec
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with fsspec.open(path, 'rb') as opened, pyarrow.parquet.ParquetFile(opened) as file:
                for batch in file.iter_batches(batch_size=_ROWS):
                    for record in batch.to_pylist():
                        number += 1
                        yield self.from_fields(path, number, _as_json(record))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            # pyarrow says of content that is damaged that it is an OSError, of no kind and without a number.
            if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
                raise unreadable(path, error) from error
            raise UserError(f'Parquet data is corrupt or cut short after row {number} ({error})', where=path) from error
        except Exception as error:
            if not is_url(path):
                raise
            # Of the store's driver, which has errors of its own.
            raise unreadable(path, OSError(f'{type(error).__name__}: {error}')) from error


def _as_json(record: dict[str, Any]) -> dict[str, Any]:
    """Values that JSON lacks, such as times and bytes, as strings."""
    plain = (str, int, float, bool, list, dict, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in record.items()}
