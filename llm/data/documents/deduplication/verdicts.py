"""The last phase: one shard's documents as they stay, and the verdict on each."""

import contextlib
import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.counts import Counts
from llm.data.documents.deduplication.corpus import batch_rows
from llm.data.documents.deduplication.repeats import Repeats, Span, spans_of, united, without
from llm.data.documents.deduplication.words import word_spans


def withdraw(output: Path) -> None:
    """Takes back what the last phases wrote, before anything that it was made of changes.

    No reader sees a part of it: final.json goes first, and each folder at once.
    """
    for name in ('final.json', 'deduplication/phases/final.json', 'deduplication/phases/contamination.json'):
        (output / name).unlink(missing_ok=True)
    stale = output / 'stale.tmp'
    for name in ('final', 'verdicts', 'contamination'):
        shutil.rmtree(stale, ignore_errors=True)
        if (output / name).exists():
            (output / name).rename(stale)
    shutil.rmtree(stale, ignore_errors=True)


@dataclasses.dataclass
class FinalCounts(Counts):
    """What became of documents; those of several shards add up.

    Attributes:
        documents: kept + removed. removed: by rule. changed: kept ones of which something was cut out.
        characters, kept_characters: of their texts before, and of what stays.
    """

    documents: int = 0
    kept: int = 0
    changed: int = 0
    characters: int = 0
    kept_characters: int = 0
    removed: Counter[str] = dataclasses.field(default_factory=Counter)


@dataclasses.dataclass(frozen=True)
class ShardDecisions:
    """What the phases before decided on the documents of a shard, by row.

    Attributes:
        rules: for each row the rule that removed it, or None.
        representatives: row -> id of the document that stays for it, or name of the item that it goes for.
        cuts: row -> spans to cut out. repeats: unit -> row -> indexes of units to go.
    """

    rules: Sequence[str | None]
    representatives: Mapping[int, str]
    cuts: Mapping[int, Sequence[Span]]
    repeats: Mapping[str, Mapping[int, Sequence[int]]]


def decide(
    text: str, words: Sequence[Span], row: int, decisions: ShardDecisions, settings: Sequence[Repeats]
) -> tuple[str | None, str | None]:
    """(the rule that removes a document or None, the text as it stays).

    Args:
        words: where the words of the text are; of one with passages to cut out.
    """
    if decisions.rules[row] is not None:
        return decisions.rules[row], None
    cuts = list(decisions.cuts.get(row, ()))
    for some in settings:
        indexes = decisions.repeats[some.unit].get(row)
        if not indexes:
            continue
        spans = spans_of(some.unit, text, words, indexes, some.words)
        if sum(end - start for start, end in spans) > some.share * len(text):
            return some.unit, None
        if some.remove == 'spans':
            cuts += spans
            if not without(text, united(cuts)):
                return some.unit, None
    return None, without(text, united(cuts)) if cuts else text


def _decided(
    texts: Sequence[str], first: int, decisions: ShardDecisions, settings: Sequence[Repeats]
) -> list[tuple[str | None, str | None]]:
    passages = decisions.repeats.get('passages', {})
    some = [i for i in range(len(texts)) if first + i in passages]
    words = dict(zip(some, word_spans([texts[i] for i in some]), strict=True))
    return [decide(text, words.get(i, ()), first + i, decisions, settings) for i, text in enumerate(texts)]


def write_shard(
    source: Path, final: Path, verdicts: Path, decisions: ShardDecisions, settings: Sequence[Repeats]
) -> FinalCounts:
    """Writes what stays of a shard, and a row for each of its documents; both appear whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    counts = FinalCounts()
    string = pyarrow.string()
    schema = pyarrow.schema(
        [
            ('id', string),
            ('rule', string),
            ('representative', string),
            ('characters', pyarrow.int64()),
            ('kept_characters', pyarrow.int64()),
        ]
    )
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(pyarrow.parquet.ParquetFile(source))
        temporary = [path.with_name(f'{path.name}.{os.getpid()}.tmp') for path in (final, verdicts)]
        for path in temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(path.unlink, missing_ok=True)
        writers = [
            stack.enter_context(pyarrow.parquet.ParquetWriter(path, kind, compression='zstd'))
            for path, kind in zip(temporary, (file.schema_arrow, schema), strict=True)
        ]
        first = 0
        for batch in file.iter_batches(batch_rows(file.metadata)):
            texts, ids = batch.column('text').to_pylist(), batch.column('id').to_pylist()
            results = _decided(texts, first, decisions, settings)
            kept = np.array([rule is None for rule, _ in results], bool)
            stays = [text for rule, text in results if rule is None]
            counts.documents += len(texts)
            counts.kept += len(stays)
            counts.changed += sum(
                rule is None and text != before for (rule, text), before in zip(results, texts, strict=True)
            )
            counts.characters += sum(map(len, texts))
            counts.kept_characters += sum(len(text or '') for text in stays)
            counts.removed.update(rule for rule, _ in results if rule is not None)
            table = pyarrow.Table.from_batches([batch]).filter(pyarrow.array(kept))
            column = table.schema.get_field_index('text')
            table = table.set_column(
                column, table.schema.field(column), pyarrow.array(stays, table.schema.field(column).type)
            )
            writers[0].write_table(table)
            rows = {
                'id': ids,
                'rule': [rule for rule, _ in results],
                'representative': [decisions.representatives.get(first + i) for i in range(len(texts))],
                'characters': [len(text) for text in texts],
                'kept_characters': [len(text or '') for _, text in results],
            }
            writers[1].write_table(pyarrow.table(rows, schema))
            first += len(texts)
        for writer, path, target in zip(writers, temporary, (final, verdicts), strict=True):
            writer.close()
            with path.open('rb') as written:
                os.fsync(written.fileno())
            path.replace(target)
    return counts


def write_hits(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Every hit of a shard's documents in evaluation sets."""
    import pyarrow
    import pyarrow.parquet

    string = pyarrow.string()
    schema = pyarrow.schema(
        [
            ('id', string),
            ('rule', string),
            ('item', string),
            ('text', string),
            ('value', pyarrow.float64()),
            ('start', pyarrow.int64()),
        ]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema), temporary, compression='zstd')
    temporary.replace(path)
