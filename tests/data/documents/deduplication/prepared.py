"""Prepared documents for tests of the phases after preparation: written as shards, and read back."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet


def write_shards(output: Path, shards: list[list[dict]]) -> Path:
    """Documents of given fields (id and text at least) as `prepare_data` leaves them."""
    text = pyarrow.string()
    schema = pyarrow.schema(
        [('text', pyarrow.large_string())] + [(name, text) for name in ('id', 'source', 'url', 'date', 'metadata')]
    )
    for folder in ('documents', 'shards'):
        (output / folder).mkdir(parents=True, exist_ok=True)
    for i, documents in enumerate(shards):
        table = pyarrow.Table.from_pylist([{'source': 'texts', **document} for document in documents], schema)
        pyarrow.parquet.write_table(table, output / f'documents/{i:06d}.parquet')
        (output / f'shards/{i:06d}.json').write_text(json.dumps(documents))
    return output


def rows(output: Path, kind: str) -> list[dict]:
    """All rows of `final`, `verdicts` or `contamination`, shard by shard."""
    paths = sorted((output / kind).glob('*.parquet'))
    return [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]
