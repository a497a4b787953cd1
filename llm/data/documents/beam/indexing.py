"""The index for later runs, as the runner for one machine writes it: its functions of a file, in pipelines.

Files are put in order and scanned by workers. Where the job is started their orders are merged, and what was removed is
written by number: there are 16 bytes a document in memory, and some 60 for each that is removed.
"""

import concurrent.futures
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np

from llm.data.documents.beam.files import join, listed
from llm.data.documents.beam.nodes import earlier_number, is_earlier, position_of
from llm.data.documents.beam.scanning import file_name
from llm.data.documents.deduplication.config import EXACT, NEAR, Deduplication
from llm.data.documents.deduplication.corpus import Index, merge_shards, sort_shard
from llm.data.documents.deduplication.scan import scan_shard
from llm.data.documents.deduplication.sorted_runs import PAIRED, records, write_array
from llm.data.token_cache_building import write_json

_READERS = 32


def begin(output: str, index: Index, record: dict[str, Any]) -> None:
    """Writes index.json into an empty folder."""
    import pyarrow.parquet

    shutil.rmtree(index.directory, ignore_errors=True)
    (index.directory / 'phases').mkdir(parents=True)
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(pyarrow.parquet.read_metadata, listed(join(output, 'documents/*.parquet')))
        rows = [metadata.num_rows for metadata in found]
    write_json(index.directory / 'index.json', {**record, 'rows': rows, 'base': index.base})


def _files(pipeline: beam.Pipeline, output: str) -> Any:
    return (
        pipeline
        | 'documents' >> beam.Create([join(output, 'documents/*.parquet')])
        | 'numbered' >> beam.FlatMap(_numbered)
        | 'spread' >> beam.Reshuffle()
    )


def _numbered(pattern: str) -> Iterator[tuple[int, str]]:
    yield from enumerate(listed(pattern))


def order(pipeline: beam.Pipeline, output: str, index: Index, config: Deduplication) -> None:
    """Adds the steps that put each file in order of preference."""
    _ = _files(pipeline, output) | 'sort' >> beam.Map(_sort, index, config)


def _sort(element: tuple[int, str], index: Index, config: Deduplication) -> None:
    shard, path = element
    sort_shard(Path(path), index.first_rows[shard], _sorted_file(index, shard), config.prefer, config.sources)


def _sorted_file(index: Index, shard: int) -> Path:
    return index.directory / f'work/order/{shard:06d}.arrow'


def merge(index: Index, config: Deduplication) -> None:
    """Numbers all documents."""
    paths = [_sorted_file(index, shard) for shard in range(len(index.record['rows']))]
    merge_shards(paths, index.directory, index.count, index.base, len(config.prefer))


def scan(pipeline: beam.Pipeline, output: str, index: Index, config: Deduplication) -> None:
    """Adds the steps that write records and sets of each file."""
    _ = _files(pipeline, output) | 'scan' >> beam.Map(_scanned, index, config)


def _scanned(element: tuple[int, str], index: Index, config: Deduplication) -> None:
    scan_shard(Path(element[1]), element[0], index, config)


def end(output: str, work: str, turn: int, index: Index, config: Deduplication, *, decontaminated: bool) -> None:
    """Writes what each rule removed, and the mark that the index is whole."""
    names = {file_name(path): i for i, path in enumerate(listed(join(output, 'documents/*.parquet')))}
    numbers = np.load(index.directory / 'number_of.npy', mmap_mode='r')

    def number(some: bytes) -> int:
        if is_earlier(some):
            return earlier_number(some)
        where = position_of(some)
        return int(numbers[index.first_rows[names[where.name]] + where.row])

    folders = {rule: join(work, f'lost/{rule}/*') for rule in config.rules if rule in EXACT}
    if config.near is not None:
        folders[NEAR] = join(work, f'edges/{turn}/*')
    for rule, pattern in folders.items():
        pairs = (
            [(number(node), number(other)) for node, other in zip(*columns, strict=True) if not is_earlier(node)]
            for columns in _columns(listed(pattern), ('node', 'other'))
        )
        _write(index, rule, pairs)
    if decontaminated:
        _write(index, 'contamination', _contaminated(output, index, numbers))
    shutil.rmtree(index.directory / 'work', ignore_errors=True)
    write_json(index.directory / 'phases/final.json', {'done': 'final'})


def _contaminated(output: str, index: Index, numbers: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    for shard, path in enumerate(listed(join(output, 'verdicts/*.parquet'))):
        row = index.first_rows[shard]
        for (rules,) in _columns([path], ('rule',)):
            yield [(int(numbers[row + i]), -1) for i, rule in enumerate(rules) if rule == 'contamination']
            row += len(rules)


def _columns(paths: Sequence[str], names: Sequence[str]) -> Iterator[list[list[Any]]]:
    import pyarrow.parquet

    for path in paths:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(columns=list(names)):
                yield [batch.column(name).to_pylist() for name in names]


def _write(index: Index, rule: str, pairs: Iterator[list[tuple[int, int]]]) -> None:
    """(node, other) pairs that come a batch at a time."""
    parts = [np.array(some, np.int64).reshape(-1, 2) for some in pairs]
    nodes, others = np.ascontiguousarray(np.concatenate([np.zeros((0, 2), np.int64), *parts]).T)
    write_array(
        index.directory / f'removed/{rule}.npy',
        records(PAIRED, key=nodes.astype(np.uint64), node=nodes, other=others),
    )
