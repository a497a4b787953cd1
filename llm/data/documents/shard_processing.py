"""One input shard: read, judged, and written as documents, ledger and quarantine, whole or not at all.

`documents/N.parquet` holds the documents that stay, ready for `TextFiles`; `ledger/N.parquet` a row for every document
with all verdicts; `quarantine/N.jsonl` what could not be judged, with the reason. `shards/N.json` comes last and
commits them: it has the counts, and the sizes of the other files.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llm.data.documents.counts import Counts
from llm.data.documents.document import Document, Ignored, Quarantined
from llm.data.documents.sources.files import InputShard, Item
from llm.data.documents.stage import Chain
from llm.data.token_cache_building import write_json

# What the stages are given at once: enough to be vectorised, little enough to bound memory.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 128, 4_000_000
# What is collected before it is written, in characters or in rows.
_GROUP_CHARACTERS, _GROUP_ROWS = 32_000_000, 10_000
EXCERPT = 400


@dataclasses.dataclass(frozen=True)
class Task:
    """What a worker does: one shard, and what is known of it from attempts that died.

    Attributes:
        index: number of the shard's files.
        digest: of the shard and of the chain's settings; empty is for `process` to find, and so is its cost.
        settings: of the chain, as a text.
        alone: first records of batches that are judged one by one: to find the one that is deadly, or because they are
            too much together.
        poison: record -> reason: not judged again, but quarantined.
        unreadable: record -> reason: reading stops before it.
    """

    shard: InputShard
    index: int
    digest: str = ''
    settings: str = ''
    alone: frozenset[int] = frozenset()
    poison: dict[int, str] = dataclasses.field(default_factory=dict)
    unreadable: tuple[int, str] | None = None


@dataclasses.dataclass
class ShardCounts(Counts):
    """What became of the records of a shard; those of several shards add up.

    Attributes:
        documents: records that are or should have been documents: kept + removed + quarantined.
        removed: by the first rule that removed it. ignored: by reason; they are no documents.
        characters, kept_characters: of the texts after all stages.
    """

    documents: int = 0
    kept: int = 0
    quarantined: int = 0
    characters: int = 0
    kept_characters: int = 0
    removed: Counter[str] = dataclasses.field(default_factory=Counter)
    ignored: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def balanced(self) -> bool:
        """Whether nothing was lost."""
        return self.documents == self.kept + self.removed.total() + self.quarantined


def shard_digest(shard: InputShard, settings: str) -> str:
    """Changes when what is made of a shard could change: its content, how it is read, or the settings of the chain."""
    # Names of files need not be valid Unicode.
    text = f'{shard.name}\0{shard.fingerprint()}\0{settings}'
    return hashlib.sha256(text.encode(errors='surrogateescape')).hexdigest()


def part(index: int | str, kind: str) -> str:
    """The path of one of a shard's files within the output directory; of a piece of a shard by the piece's name."""
    suffix = {'documents': 'parquet', 'ledger': 'parquet', 'quarantine': 'jsonl', 'shards': 'json'}[kind]
    return f'{kind}/{index if isinstance(index, str) else f"{index:06d}"}.{suffix}'


PARTS = ('documents', 'ledger', 'quarantine')


def committed(directory: Path, task: Task) -> ShardCounts | None:
    """The counts of a shard that is done, if it is the same shard and its files have their sizes."""
    try:
        record = json.loads((directory / part(task.index, 'shards')).read_text())
        sizes = {kind: (directory / part(task.index, kind)).stat().st_size for kind in PARTS}
        if record['digest'] != task.digest or record['sizes'] != sizes:
            return None
        return ShardCounts.from_json(record['counts'])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def check_rows(where: str, counts: ShardCounts, files: Mapping[str, Sequence[Path]]) -> None:
    """Check that nothing was lost: the counts balance, and files of 'documents' and 'ledger' have as many rows."""
    import pyarrow.parquet

    found = {kind: sum(pyarrow.parquet.read_metadata(path).num_rows for path in files[kind]) for kind in files}
    expected = {'documents': counts.kept, 'ledger': counts.documents - counts.quarantined}
    if not counts.balanced or found != expected:
        raise RuntimeError(f'documents were lost in {where}: {counts.as_json()}, in files {found}')


def process(task: Task, chain: Chain, directory: Path, at: Callable[[int, int], None]) -> ShardCounts:
    """Do one shard.

    Args:
        at: told (first record, records) before they are read or judged; no records mean reading.

    Raises:
        OSError: the disk is full or cannot be written.
        UserError: the shard cannot be opened, or a stage is configured wrongly.
    """
    digest = task.digest or shard_digest(task.shard, task.settings)
    counts = ShardCounts()
    with contextlib.ExitStack() as stack:
        writer = Writer(directory, task.index, chain.rules, stack)
        for first, items in batches(task, at):
            for start, some in _runs(first, items, alone=first in task.alone):
                at(start, len(some))
                judge(some, start, task, chain, counts, writer)
        sizes = writer.commit()
    assert counts.balanced, counts
    record = {
        'shard': task.shard.name,
        'digest': digest,
        'counts': counts.as_json(),
        'sizes': sizes,
    }
    write_json(directory / part(task.index, 'shards'), record)
    return counts


def _runs(first: int, items: list[Item], *, alone: bool) -> Iterator[tuple[int, list[Item]]]:
    if not alone:
        yield first, items
        return
    for i, item in enumerate(items):
        yield first + i, [item]


def batches(task: Task, at: Callable[[int, int], None]) -> Iterator[tuple[int, list[Item]]]:
    """(number of the first record, records) of each batch."""
    batch: list[Item] = []
    characters = number = 0
    at(0, 0)
    records = iter(task.shard.read())
    while True:
        if task.unreadable is not None and number == task.unreadable[0]:
            number += 1
            batch.append(Quarantined(f'{task.shard.name}:{number}', task.unreadable[1]))
            break
        item = next(records, None)
        if item is None:
            break
        number += 1
        batch.append(item)
        if isinstance(item, Document):
            characters += len(item.text) + len(item.markup or '')
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield number - len(batch), batch
            batch, characters = [], 0
            at(number, 0)
    if batch:
        yield number - len(batch), batch


class Rows(Protocol):
    """Where outcomes go, in the order of the records."""

    def document(self, document: Document) -> None:
        """One that was judged."""

    def quarantine(self, item: Quarantined) -> None:
        """One that could not be."""


def judge(items: Sequence[Item], first: int, task: Task, chain: Chain, counts: ShardCounts, writer: Rows) -> None:
    """Records through the chain, and into counts and files, in their order."""
    results: list[Item] = list(items)
    for i, item in enumerate(items):
        if isinstance(item, Document) and (reason := task.poison.get(first + i)):
            results[i] = Quarantined(f'{task.shard.name}:{first + i + 1}', reason, item.id)
    alive = [i for i, item in enumerate(results) if isinstance(item, Document)]
    documents = [item for item in results if isinstance(item, Document)]
    wheres = [f'{task.shard.name}:{first + i + 1}' for i in alive]
    for i, outcome in zip(alive, chain(documents, wheres), strict=True):
        results[i] = outcome
    for item in results:
        if isinstance(item, Ignored):
            counts.ignored[item.reason] += 1
            continue
        counts.documents += 1
        if isinstance(item, Quarantined):
            counts.quarantined += 1
            writer.quarantine(item)
            continue
        counts.characters += len(item.text)
        rule = item.removed_by
        if rule is None:
            counts.kept += 1
            counts.kept_characters += len(item.text)
        else:
            counts.removed[rule] += 1
        writer.document(item)


def rows_of(document: Document) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The row of the ledger, and the document's own if it stays."""
    common = {
        name: getattr(document, name)
        for name in ('id', 'source', 'url', 'domain', 'date', 'licence', 'language', 'language_confidence')
    }
    row = {
        **common,
        'characters': len(document.text),
        'removed_by': document.removed_by,
        'excerpt': document.text[:EXCERPT],
    }
    for verdict in document.verdicts:
        row[f'{verdict.rule}.keep'], row[f'{verdict.rule}.value'] = verdict.keep, verdict.value
    if document.removed_by is not None:
        return row, None
    metadata = json.dumps(dict(document.metadata), ensure_ascii=True, default=str)
    return row, {'text': document.text, **common, 'metadata': metadata}


class Writer:
    """The files of one shard, under temporary names until they are committed."""

    def __init__(self, directory: Path, index: int | str, rules: Sequence[str], stack: contextlib.ExitStack):
        import pyarrow
        import pyarrow.parquet

        self._pyarrow, self._rules = pyarrow, rules
        text = pyarrow.string()
        common = [(name, text) for name in ('id', 'source', 'url', 'domain', 'date', 'licence', 'language')]
        common += [('language_confidence', pyarrow.float32())]
        verdicts = [
            column
            for rule in rules
            for column in ((f'{rule}.keep', pyarrow.bool_()), (f'{rule}.value', pyarrow.float32()))
        ]
        self._schemas = {
            'documents': pyarrow.schema([('text', pyarrow.large_string()), *common, ('metadata', text)]),
            'ledger': pyarrow.schema(
                [*common, ('characters', pyarrow.int64()), ('removed_by', text), ('excerpt', text), *verdicts]
            ),
        }
        self._final = {kind: directory / part(index, kind) for kind in PARTS}
        self._temporary = {kind: path.with_name(f'{path.name}.{os.getpid()}.tmp') for kind, path in self._final.items()}
        for path in self._final.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        (directory / part(index, 'shards')).parent.mkdir(parents=True, exist_ok=True)
        for path in self._temporary.values():
            stack.callback(path.unlink, missing_ok=True)
        self._tables = {
            kind: pyarrow.parquet.ParquetWriter(self._temporary[kind], schema, compression='zstd')
            for kind, schema in self._schemas.items()
        }
        self._lines = self._temporary['quarantine'].open('w', encoding='utf-8')
        stack.callback(self._close_quietly)
        self._rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in self._schemas}
        self._waiting = 0

    def document(self, document: Document) -> None:
        """A row of the ledger, and the document itself if it stays."""
        self.add(*rows_of(document))

    def add(self, row: dict[str, Any], document: dict[str, Any] | None) -> None:
        """What `rows_of` says of a document."""
        self._rows['ledger'].append(row)
        if document is not None:
            self._rows['documents'].append(document)
            self._waiting += len(document['text']) + len(document['metadata'])
        self._waiting += len(row['id']) + len(row['url'] or '')
        if self._waiting >= _GROUP_CHARACTERS or len(self._rows['ledger']) >= _GROUP_ROWS:
            self._flush()

    def quarantine(self, item: Quarantined) -> None:
        """A line of the quarantine."""
        self._lines.write(json.dumps(dataclasses.asdict(item), ensure_ascii=True) + '\n')

    def _flush(self) -> None:
        for kind, rows in self._rows.items():
            if rows:
                self._tables[kind].write_table(self._pyarrow.Table.from_pylist(rows, self._schemas[kind]))
            self._rows[kind] = []
        self._waiting = 0

    def commit(self) -> dict[str, int]:
        """Give the files their names; returns their sizes."""
        self._flush()
        for table in self._tables.values():
            table.close()
        self._lines.close()
        sizes = {}
        for kind in PARTS:
            with self._temporary[kind].open('rb') as file:
                os.fsync(file.fileno())
            sizes[kind] = self._temporary[kind].stat().st_size
            self._temporary[kind].replace(self._final[kind])
        return sizes

    def _close_quietly(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk fails again; the first failure is the one to tell
            for table in self._tables.values():
                table.close()
            self._lines.close()
