"""What goes into a mixture: prepared directories, or sub-corpora of them, and plain sources."""

import dataclasses
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Literal

from llm.data.sources import ReadCounts, Source, Split
from llm.data.sources.files import content_digest, unwritable
from llm.errors import UserError

_COLUMNS = ('id', 'source', 'url', 'domain', 'date', 'licence', 'language', 'language_confidence')
SPLITS: tuple[Split, ...] = ('train', 'validation')
_AGAIN = 'Run prepare_data again: it goes on where it stopped.'
_ROWS = 1000  # documents of a plain source that are written together


@dataclasses.dataclass(frozen=True)
class Filter:
    """Documents by a column: of documents/ ('source', 'language', 'domain', ...), of their metadata
    ('metadata.author'), or of the ledger (the figure of a rule, 'perplexity.value').

    Args:
        values: the column is one of them; () asks for none.
        minimum: the column is at least so much. below: it is less than that; the two make a bucket.
        exclude: the documents that do not match, those without a value among them, in place of those that do.
    """

    column: str
    values: tuple[str, ...] | tuple[int, ...] = ()
    minimum: float | None = None
    below: float | None = None
    exclude: bool = False

    def __post_init__(self) -> None:
        if not self.values and self.minimum is None and self.below is None:
            raise UserError(f'a filter on {self.column} asks for nothing', fix='Set values, minimum or below.')
        if self.minimum is not None and self.below is not None and self.minimum >= self.below:
            raise UserError(f'a filter on {self.column} wants at least {self.minimum} and less than {self.below}')


@dataclasses.dataclass(frozen=True)
class Part:
    """One component of a mixture: of a prepared directory or of a plain source.

    Args:
        name: of the component, of letters, digits, _ and .
        directory: of a finished prepare_data job: its final/ where it has one, else its documents/.
        source: a plain source, as `TextFiles`, which is copied into the mixture's directory with its own splits.
        filters: documents that match all of them; for a directory.
        weight: relative number of rows; all components have one, or none, or there is a curriculum. None takes the
            size times `epochs`, see `MakeMixture.temperature`.
        epochs: below 1, only so many of the training documents are in the component, chosen by a hash of their ids:
            the same ones however files are cut. Above 1, the component counts for so many times its size.
        max_epochs: it is left out once it was read so many times; None repeats without end.
    """

    name: str
    directory: str | None = None
    source: Source | None = None
    filters: tuple[Filter, ...] = ()
    weight: float | None = None
    epochs: float = 1.0
    max_epochs: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r'[A-Za-z0-9_.]+', self.name):
            raise UserError(f'component name {self.name!r} is not of letters, digits, _ and .')
        if (self.directory is None) == (self.source is None):
            raise UserError('has both a directory and a source, or neither', where=self.name, fix='Give one of them.')
        if self.source is not None and self.filters:
            raise UserError('filters are for a directory', where=self.name, fix='Prepare the source first.')
        for name in ('weight', 'epochs', 'max_epochs'):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f'{name} = {value} is not positive', where=self.name, fix='Leave the component out.')
        if self.weight is not None and self.epochs > 1:
            raise UserError('has a weight and epochs above 1', where=self.name, fix='Give one of them.')

    @property
    def sample(self) -> float:
        """The part of the training documents that is in it."""
        return min(1.0, self.epochs)

    def record(self, directory: Path) -> dict[str, Any]:
        """What mixture.json holds of it before anything is counted; a plain source is copied into `directory`.

        Raises:
            UserError: the prepared directory is missing, unfinished, or lacks a column; or nothing can be read.
        """
        files = self._prepared(directory) if self.directory is not None else self._copied(directory)
        return {
            'name': self.name,
            'from': self.directory if self.directory is not None else type(self.source).__name__,
            'files': files,
            'filters': [{**dataclasses.asdict(each), 'values': list(each.values)} for each in self.filters],
            'sample': self.sample,
            'epochs_wanted': self.epochs,
            'weight': self.weight,
            'max_epochs': self.max_epochs,
        }

    def _prepared(self, directory: Path) -> list[dict[str, Any]]:
        import pyarrow.parquet

        assert self.directory is not None
        root = Path(self.directory).expanduser()
        kind, kept = _finished(root, self.name)
        paths = sorted((root / kind).glob('*.parquet'))
        from_ledger: set[str] = set()
        rows = 0
        for path in paths:
            try:
                metadata = pyarrow.parquet.read_metadata(path)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f'is not Parquet that can be read ({error})', where=str(path), fix=_AGAIN) from error
            rows += metadata.num_rows
            from_ledger |= self._ledger_columns(path, metadata.schema.to_arrow_schema().names, root / 'ledger')
        if rows != kept:
            raise UserError(
                f'{kind}/ has {rows:,} documents and its counts say {kept:,}',
                where=str(root),
                fix=_AGAIN,
            )
        columns = sorted(from_ledger)
        files = []
        for path in paths:
            file = described(path, directory)
            if columns:
                file |= {'ledger': described(root / 'ledger' / path.name, directory), 'ledger_columns': columns}
            files.append(file)
        return files

    def _ledger_columns(self, path: Path, names: list[str], ledger: Path) -> set[str]:
        """The columns of filters that the ledger has, and not the documents."""
        import pyarrow.parquet

        wanted = {each.column for each in self.filters if not each.column.startswith('metadata.')} - set(names)
        if not wanted:
            return set()
        known = pyarrow.parquet.read_schema(ledger / path.name).names if (ledger / path.name).exists() else []
        if missing := wanted - set(known):
            figures = [name for name in known if name.endswith('.value')]
            raise UserError(
                f'no column {sorted(missing)[0]!r}, neither in {path} nor in its ledger',
                where=f'{self.name}, Filter.column',
                fix=f'Use one of {", ".join([*_COLUMNS, "metadata.FIELD", *figures])}.',
            )
        return wanted

    def _copied(self, directory: Path) -> list[dict[str, Any]]:
        assert self.source is not None
        target, files = directory / 'plain' / self.name, []
        try:
            target.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                path = target / f'{split}.parquet'
                _copy(self.source, split, self.name, path)
                files.append(described(path, directory) | {'split': split})
        except OSError as error:
            raise unwritable(str(target), error, 'parts') from error
        return files


def text_digest(text: str) -> bytes:
    """16 bytes that equal texts have in common."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def described(path: Path, directory: Path) -> dict[str, Any]:
    """What the record says of a file, so that a change is noticed."""
    digest, stat = content_digest(str(path)).hex(), path.stat()
    return {
        'path': os.path.relpath(os.path.realpath(path), os.path.realpath(directory)),
        'bytes': stat.st_size,
        'mtime_ns': stat.st_mtime_ns,
        'sha256': digest,
        'split': None,
        'ledger': None,
    }


def _finished(root: Path, name: str) -> tuple[Literal['final', 'documents'], int]:
    """Where the documents of a prepared directory are, and how many. Raises UserError if prepare_data has not ended."""
    if not root.is_dir():
        raise UserError('there is no such directory', where=f'{name}, {root}', fix='Prepare it with prepare_data.')
    kind: Literal['final', 'documents']
    try:
        config = json.loads((root / 'config.json').read_text(encoding='utf-8'))
        more = any(key.startswith(('deduplication.', 'decontamination.')) for key in config)
        if config.get('type') != 'PrepareData':
            raise UserError('was not made by prepare_data', where=f'{name}, {root}', fix='Use Part.source for files.')
        if more:
            kind, record = 'final', json.loads((root / 'final.json').read_text(encoding='utf-8'))
        else:
            kind, record = 'documents', json.loads((root / 'summary.json').read_text(encoding='utf-8'))['counts']
        elsewhere = config.get('runner.directory')
        if elsewhere and not (root / kind).is_dir():
            raise UserError(
                f'has the records of a run, and {elsewhere} has its documents',
                where=f'{name}, {root}',
                fix=f'Copy {kind}/ and ledger/ from there.',
            )
        return kind, int(record['kept'])
    except FileNotFoundError as error:
        missing = os.path.basename(error.filename)
        raise UserError(
            f'prepare_data has not ended there: {missing} is missing', where=f'{name}, {root}', fix=_AGAIN
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'cannot be read ({error})', where=f'{name}, {root}', fix=_AGAIN) from error


def _copy(source: Source, split: Split, name: str, path: Path) -> None:
    """One split of a plain source as Parquet with ids that are hashes of the texts."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([('text', pyarrow.large_string()), ('id', pyarrow.string()), ('source', pyarrow.string())])
    temporary = path.with_suffix('.tmp')
    rows: list[dict[str, str]] = []
    with pyarrow.parquet.ParquetWriter(temporary, schema, compression='zstd') as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            rows.clear()

        counts = ReadCounts()
        for shard in source.shards(split):
            for text in shard.documents(counts):
                rows.append({'text': text, 'id': text_digest(text).hex(), 'source': name})
                if len(rows) == _ROWS:
                    flush()
        flush()
    temporary.replace(path)
