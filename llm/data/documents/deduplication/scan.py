"""What the phases need of each document, from one reading of a shard: digests, bands, shingles, hashes of pieces."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.deduplication.config import NEAR, Deduplication
from llm.data.documents.deduplication.corpus import Index, parquet_rows
from llm.data.documents.deduplication.exact import compared, digests
from llm.data.documents.deduplication.repeats import Repeats, Units, lines, pieces, windows
from llm.data.documents.deduplication.sorted_runs import BANDED, GROUPED, PLACED, RunWriter, records, write_array
from llm.data.documents.deduplication.words import Hashes, as_sets, ngrams, words_of
from llm.data.token_cache_building import write_json

# Texts that are tokenised at once, in characters.
_CHARACTERS = 4_000_000


def scan_shard(path: Path, shard: int, index: Index, config: Deduplication) -> None:
    """Writes the records of one shard's documents into the index, unless that has been done."""
    mark = index.directory / f'scanned/{shard:06d}.json'
    if mark.exists():
        return
    numbers = index.numbers(shard)
    scan = _Scan(config, index.directory, f'{shard:06d}')
    first = 0
    for batch in parquet_rows(path, ('id', 'source', 'url', 'text')):
        for start, end in text_batches(batch['text']):
            scan.documents(
                {name: values[start:end] for name, values in batch.items()}, numbers[first + start : first + end]
            )
        first += len(batch['id'])
    scan.close()
    mark.parent.mkdir(exist_ok=True)
    write_json(mark, {'documents': first})


def text_batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Cuts texts into batches [start, end) of bounded size."""
    start = characters = 0
    for i, text in enumerate(texts):
        characters += len(text)
        if characters >= _CHARACTERS:
            yield start, i + 1
            start, characters = i + 1, 0
    if start < len(texts):
        yield start, len(texts)


def units_of(some: Repeats, texts: Sequence[str], words: Hashes) -> Units:
    """The lines, paragraphs or passages of a batch of texts, whose words are given."""
    if some.unit == 'passages':
        return windows(words, some.words)
    cut = [text[start:end] for text in texts for start, end in pieces(some.unit, text)]
    return lines(some.unit, texts, words_of(cut), some.words)


class _Scan:
    def __init__(self, config: Deduplication, directory: Path, name: str):
        self._config, self._directory, self._name = config, directory, name
        kinds: dict[str, np.dtype[Any] | None] = {
            'id': GROUPED if config.ids else None,
            'url': GROUPED if config.urls else None,
            'document': GROUPED if config.documents else None,
            NEAR: BANDED if config.near else None,
        }
        kinds |= {some.unit: PLACED for some in config.repeats}
        self._writers = {
            kind: RunWriter(directory / 'runs' / kind, name, dtype)
            for kind, dtype in kinds.items()
            if dtype is not None
        }
        self._bands = config.near.bands if config.near else None
        self._offsets = [np.zeros(1, np.int64)]
        self._sets = directory / 'sets' / f'{name}.values'
        self._sets.parent.mkdir(parents=True, exist_ok=True)
        self._values = self._sets.open('wb')

    def documents(self, batch: dict[str, list[Any]], nodes: np.ndarray) -> None:
        """All that is made of some documents."""
        config, texts = self._config, batch['text']
        words = words_of(texts)
        for rule, some, values in compared(config, batch['id'], batch['source'], batch['url'], texts, words):
            keys, checks = digests(values)
            self._writers[rule].add(records(GROUPED, key=keys, check=checks, node=nodes[some]))
        if config.near and self._bands:
            self._near(ngrams(words, config.near.shingle), nodes)
        for unit in config.repeats:
            units = units_of(unit, texts, words)
            self._writers[unit.unit].add(
                records(
                    PLACED, key=units.keys, check=units.checks, index=units.indexes, node=np.repeat(nodes, units.counts)
                )
            )

    def _near(self, shingles: Hashes, nodes: np.ndarray) -> None:
        assert self._bands is not None
        some = np.flatnonzero(shingles.counts)
        keys = self._bands.keys(self._bands.signatures(shingles))[some]
        owners = np.repeat(nodes[some], self._bands.bands)
        self._writers[NEAR].add(records(BANDED, key=keys.ravel(), node=owners))
        sets = as_sets(shingles)
        self._values.write(sets.values.data)  # not tofile, which may not tell of a full disk
        self._offsets.append(sets.offsets[1:] + self._offsets[-1][-1])

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._values.flush()
        os.fsync(self._values.fileno())
        self._values.close()
        write_array(self._sets.with_suffix('.offsets.npy'), np.concatenate(self._offsets))
