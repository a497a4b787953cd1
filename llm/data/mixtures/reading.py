"""Reads the documents of a mixture directory, and registers them as SeqIO tasks and a mixture.

Copied as tasks.py into every mixture directory, for programs that have SeqIO and not `llm`: nothing but the standard
library and PyArrow is imported, and SeqIO where it registers.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RECORD = 'mixture.json'
_ROWS = 256  # documents that are in memory at once


def share(document: str, purpose: str) -> float:
    """A number in [0, 1) that a document's id draws: another for each purpose, the same wherever the document is."""
    digest = hashlib.blake2b(document.encode(errors='surrogatepass'), digest_size=8, key=f'mixture {purpose}'.encode())
    return int.from_bytes(digest.digest(), 'big') / 2**64


def changed(directory: Path, file: dict[str, Any]) -> str:
    """Why a file is not the one of the record, '' if it is; it is read only if its time or size are others."""
    path = directory / file['path']
    try:
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (file['bytes'], file['mtime_ns']):
            return ''
        with path.open('rb') as content:
            same = hashlib.file_digest(content, 'sha256').hexdigest() == file['sha256']
    except OSError as error:
        return f'cannot be read ({error.strerror})'
    return '' if same else 'has changed since the mixture was made'


def documents(
    directory: Path,
    component: dict[str, Any],
    file: dict[str, Any],
    split: str,
    validation_fraction: float,
    left_out: Callable[[], object] = lambda: None,
) -> Iterator[tuple[int, str]]:
    """(row from 1, text) of the documents of one file that belong to a component and a split.

    Args:
        component, file, validation_fraction: of the record.
        left_out: called for each document that belongs to the other split.

    Raises:
        ValueError: a file has changed since the mixture was made.
    """
    import pyarrow.parquet

    for some in (file, file.get('ledger')):
        if some is not None and (reason := changed(directory, some)):
            raise ValueError(f'{directory / some["path"]}: {reason}')
    filters, sample = component['filters'], component['sample'] if split == 'train' else 1.0
    columns = {each['column'] for each in filters}
    judged: dict[str, dict[str, Any]] = {}
    if file.get('ledger') is not None:
        table = pyarrow.parquet.read_table(directory / file['ledger']['path'], columns=['id', *file['ledger_columns']])
        judged = {row.pop('id'): row for row in table.to_pylist()}
    with pyarrow.parquet.ParquetFile(directory / file['path']) as opened:
        names = ['text', 'id']
        names += [name for name in opened.schema_arrow.names if name in columns and name not in names]
        if any(name.startswith('metadata.') for name in columns):
            names.append('metadata')
        number = 0
        for batch in opened.iter_batches(batch_size=_ROWS, columns=names):
            for row in batch.to_pylist():
                number += 1
                name = row['id']
                if file['split'] is None:
                    held_out = share(name, 'validation') < validation_fraction
                    if held_out != (split == 'validation'):
                        left_out()
                        continue
                elif file['split'] != split:
                    continue
                if sample < 1 and share(name, 'sample') >= sample:
                    continue
                if filters and not _matches(filters, row | judged.get(name, {})):
                    continue
                yield number, row['text']


def _matches(filters: list[dict[str, Any]], row: dict[str, Any]) -> bool:
    metadata = json.loads(row.get('metadata') or '{}')
    for each in filters:
        column = each['column']
        value = metadata.get(column.removeprefix('metadata.')) if column.startswith('metadata.') else row.get(column)
        fits = value is not None
        if fits and each['values']:
            fits = value in each['values']
        for bound in ('minimum', 'below'):
            if fits and each[bound] is not None:
                number = isinstance(value, int | float)
                fits = number and (value >= each[bound] if bound == 'minimum' else value < each[bound])
        if fits == each['exclude']:
            return False
    return True


def register(
    directory: str | os.PathLike[str], output_features: Any = None, preprocessors: Any = None
) -> tuple[str, list[str]]:
    """Add a task NAME:COMPONENT for each component, and the mixture NAME, to SeqIO.

    The rates are the components' shares of the run, which SeqIO takes per example; a curriculum is SeqIO's no more
    than epochs are.

    Args:
        output_features: of the tasks; bytes with an end as 'targets' by default.
        preprocessors: given {'text': document}; by default text becomes targets, tokenised, and gets its end.

    Returns:
        The names of the mixture and of its tasks.
    """
    import seqio
    import tensorflow as tf

    directory = Path(directory)
    record = json.loads((directory / RECORD).read_text(encoding='utf-8'))
    if output_features is None:
        output_features = {'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)}
    if preprocessors is None:
        preprocessors = [
            lambda dataset: dataset.map(lambda example: {'targets': example['text']}),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ]

    def source(component: dict[str, Any]) -> Any:
        def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None) -> Any:
            files = list(component['files'])
            if shuffle_files:
                random.Random(seed).shuffle(files)

            def examples() -> Iterator[dict[str, str]]:
                for file in files:
                    for _, text in documents(directory, component, file, split, record['validation_fraction']):
                        if text and not text.isspace():
                            yield {'text': text}

            return tf.data.Dataset.from_generator(examples, output_signature={'text': tf.TensorSpec((), tf.string)})

        sizes = {split: component[split]['documents'] for split in ('train', 'validation')}
        present = {split: size for split, size in sizes.items() if size}
        return seqio.FunctionDataSource(dataset_fn, splits=list(present), num_input_examples=present)

    rates = []
    for component in record['components']:
        name = f'{record["name"]}:{component["name"]}'
        seqio.TaskRegistry.add(
            name, source=source(component), preprocessors=preprocessors, output_features=output_features
        )
        rates.append((name, component['share']))
    seqio.MixtureRegistry.add(record['name'], rates)
    return record['name'], [name for name, _ in rates]
