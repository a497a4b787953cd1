"""What the later pipelines need of the documents in one file: cards, sets of shingles, units, hits in evaluation sets.

A file of prepared documents is a bounded piece of a shard, so whatever is known of its documents may be held at once.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llm.data.documents.beam.files import here
from llm.data.documents.beam.nodes import node, position
from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.corpus import parquet_rows, preference, text_digest
from llm.data.documents.deduplication.exact import compared, digests
from llm.data.documents.deduplication.near_duplicates import NearDuplicates
from llm.data.documents.deduplication.repeats import Repeats
from llm.data.documents.deduplication.scan import text_batches, units_of
from llm.data.documents.deduplication.words import as_sets, ngrams, words_of

Batch = dict[str, list[Any]]


@dataclasses.dataclass(frozen=True)
class Card:
    """What a document is compared by.

    Attributes:
        keys: rule -> digest of 16 bytes; a document without a URL has none for it.
        bands: keys of 8 bytes, of near duplicates.
    """

    keys: dict[str, bytes]
    bands: tuple[bytes, ...] = ()


def file_name(path: str) -> str:
    """A prepared file's name without folder and suffix."""
    return path.rpartition('/')[2].partition('.')[0]


def nodes_of(name: str, first: int, batch: Batch, config: Deduplication) -> list[bytes]:
    """The key of each document of a batch of rows.

    Args:
        first: row of the first in its file.
    """
    result = []
    for row, (identity, source, date, text) in enumerate(
        zip(batch['id'], batch['source'], batch['date'], batch['text'], strict=True), start=first
    ):
        places = preference(config.prefer, config.sources, {'source': source, 'date': date, 'text': text})
        result.append(node(places, identity, text_digest(text), position(name, row)))
    return result


def rows(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Batch]]:
    """(row of the first, columns) of bounded batches of a file."""
    with here(path) as copy:
        first = 0
        for batch in parquet_rows(copy, columns):
            for start, end in text_batches(batch['text']):
                yield first + start, {name: values[start:end] for name, values in batch.items()}
            first += len(batch['text'])


def cards(path: str, config: Deduplication) -> Iterator[tuple[bytes, Card]]:
    """(node, card) of every document."""
    for first, batch in rows(path, ('id', 'url', 'source', 'date', 'text')):
        words = words_of(batch['text'])
        keys: list[dict[str, bytes]] = [{} for _ in batch['id']]
        for rule, some, values in compared(config, batch['id'], batch['source'], batch['url'], batch['text'], words):
            both = np.stack(digests(values), axis=1)
            for i, digest in zip(some, both, strict=True):
                keys[i][rule] = digest.tobytes()
        bands = _bands(words, config.near) if config.near else [() for _ in batch['id']]
        for some_node, some_keys, some_bands in zip(
            nodes_of(file_name(path), first, batch, config), keys, bands, strict=True
        ):
            yield some_node, Card(some_keys, some_bands)


def _bands(words: Any, near: NearDuplicates) -> list[tuple[bytes, ...]]:
    shingles = ngrams(words, near.shingle)
    keys = near.bands.keys(near.bands.signatures(shingles))
    return [
        tuple(key.tobytes() for key in some) if count else ()
        for some, count in zip(keys, shingles.counts.tolist(), strict=True)
    ]


def shingle_sets(path: str, wanted: Sequence[tuple[int, bytes]], near: NearDuplicates) -> Iterator[tuple[bytes, bytes]]:
    """(node, its set of shingles as bytes) of these (row, node)."""
    by_row = dict(wanted)
    for first, batch in rows(path, ('text',)):
        some = [i for i in range(len(batch['text'])) if first + i in by_row]
        if some:
            sets = as_sets(ngrams(words_of([batch['text'][i] for i in some]), near.shingle))
            for i, row in enumerate(some):
                yield by_row[first + row], sets[i].tobytes()


def unit_keys(path: str, gone: set[int], some: Repeats) -> np.ndarray:
    """uint64 [units]: a hash of each line, paragraph or passage of the rows that are not gone."""
    found = [np.zeros(0, np.uint64)]
    for first, batch in rows(path, ('text',)):
        texts = [text for row, text in enumerate(batch['text'], start=first) if row not in gone]
        found.append(units_of(some, texts, words_of(texts)).keys)
    return np.concatenate(found)


def unit_records(
    path: str, gone: set[int], some: Repeats, config: Deduplication, wanted: np.ndarray
) -> Iterator[tuple[bytes, tuple[bytes, None]]]:
    """(key, (node and index of the unit, None)) of the units of these hashes in rows that are not gone."""
    for first, batch in rows(path, ('id', 'source', 'date', 'text')):
        nodes = nodes_of(file_name(path), first, batch, config)
        units = units_of(some, batch['text'], words_of(batch['text']))
        owners = np.repeat(np.arange(len(nodes)), units.counts)
        for place in np.flatnonzero(np.isin(units.keys, wanted)).tolist():
            if first + (owner := int(owners[place])) not in gone:
                name = nodes[owner] + int(units.indexes[place]).to_bytes(4, 'big')
                yield units.keys[place].tobytes() + units.checks[place].tobytes(), (name, None)
