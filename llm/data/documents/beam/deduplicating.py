"""The second pipeline: documents that are equal by id, URL or words, and verified pairs of near duplicates."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np

from llm.data.documents.beam import earlier
from llm.data.documents.beam.files import join, listed
from llm.data.documents.beam.groups import Join, Smallest, Tell, Told, Without, watched
from llm.data.documents.beam.nodes import earlier_number, is_earlier, position_of
from llm.data.documents.beam.scanning import Card, cards, shingle_sets
from llm.data.documents.deduplication.config import EXACT, NEAR, Deduplication
from llm.data.documents.deduplication.corpus import Index
from llm.data.documents.deduplication.minhash import jaccard
from llm.data.documents.deduplication.near_duplicates import NearDuplicates

Lost = tuple[bytes, tuple[str, bytes]]
Edge = tuple[bytes, bytes]
# In place of the name of a file, before a number of a block of documents of earlier runs.
_EARLIER = 'earlier-'


def duplicates(
    pipeline: beam.Pipeline,
    output: str,
    work: str,
    config: Deduplication,
    salts: int,
    indexes: Sequence[Index] = (),
    state: str = '',
) -> None:
    """Adds all steps to a pipeline, which writes WORK/lost, (node, (rule, node that stays)), and WORK/edges, of pairs.

    Every rule sees what the one before it left, and documents of earlier runs as their own rules left them.

    Args:
        indexes: of earlier runs. state: of their documents, as `earlier.write_state` writes it.
    """

    def with_earlier(new: Any, rule: str) -> Any:
        if not indexes:
            return new
        found = earlier.runs(pipeline, indexes, rule, state, f'earlier {rule}')
        return (new, found | f'earlier {rule} keys' >> beam.FlatMap(earlier.keyed, rule)) | f'with earlier {rule}' >> (
            beam.Flatten()
        )

    alive = prepared(pipeline, output) | 'cards' >> beam.FlatMap(cards, config)
    for rule in [rule for rule in config.rules if rule in EXACT]:
        lost = (
            with_earlier(alive | f'{rule} keys' >> beam.FlatMap(_keyed, rule), rule)
            | f'{rule} groups' >> Tell(Smallest(1), salts, least=2)
            | f'{rule} others' >> beam.FlatMap(_others, rule)
        )
        write_pairs(lost, join(work, f'lost/{rule}/part'), f'save {rule}')
        alive = alive | f'after {rule}' >> Without(lost)
    if config.near is None:
        return
    pairs = (
        with_earlier(alive | 'bands' >> beam.FlatMap(_banded), NEAR)
        | 'buckets' >> Tell(Smallest(config.near.bucket), salts, least=2)
        | 'pairs' >> beam.FlatMap(_pairs)
        | 'each pair' >> beam.Distinct()
    )
    sets = (
        pairs
        | 'ends' >> beam.FlatMap(tuple)
        | 'each end' >> beam.Distinct()
        | 'by file' >> beam.Map(_by_file)
        | 'files to read' >> beam.GroupByKey()
        | 'sets' >> beam.FlatMap(_sets, output, config.near, indexes)
    )
    # A document is the less preferred one of `bucket` pairs in each band at most, but the more preferred one of any
    # number: so its set is given to the pairs of the first kind as they are, and to those of the second by `Join`.
    of_second = (
        pairs | 'by second' >> beam.Map(_by_second),
        sets | 'of second' >> beam.Map(_as_second),
    )
    with_one = of_second | 'meet second' >> beam.CoGroupByKey() | 'one set' >> beam.FlatMap(_with_second)
    edges = (with_one, sets) | 'join' >> Join(salts) | 'verify' >> beam.FlatMap(_alike, config.near.threshold)
    write_edges(edges, join(work, 'edges/0/part'))


def prepared(pipeline: beam.Pipeline, output: str) -> Any:
    """Paths of all files of prepared documents, in any order."""
    return (
        pipeline
        | 'documents' >> beam.Create([join(output, 'documents/*.parquet')])
        | 'files' >> beam.FlatMap(listed)
        | 'spread files' >> beam.Reshuffle()
    )


def write_edges(edges: Any, path: str) -> None:
    """Keeps (larger, smaller) node as a document that is lost to another."""
    write_pairs(edges | 'edges as lost' >> beam.Map(_as_lost), path, 'save edges')


def _as_lost(edge: Edge) -> Lost:
    return edge[0], (NEAR, edge[1])


def write_pairs(pairs: Any, path: str, label: str) -> None:
    """Keeps (node, rule, other node) for the next pipeline."""
    import pyarrow

    schema = pyarrow.schema([('node', pyarrow.binary()), ('rule', pyarrow.string()), ('other', pyarrow.binary())])
    _ = (
        pairs
        | f'{label} as rows' >> beam.Map(_as_row)
        | label >> beam.io.WriteToParquet(path, schema, codec='zstd', file_name_suffix='.parquet')
    )


def read_pairs(pipeline: beam.Pipeline, pattern: str, label: str) -> Any:
    """What `write_pairs` wrote."""
    return pipeline | label >> beam.io.ReadFromParquet(pattern) | f'{label} from rows' >> beam.Map(_from_row)


def _as_row(lost: Lost) -> dict[str, Any]:
    return {'node': lost[0], 'rule': lost[1][0], 'other': lost[1][1]}


def _from_row(row: dict[str, Any]) -> Lost:
    return row['node'], (row['rule'], row['other'])


def _keyed(element: tuple[bytes, Card], rule: str) -> Iterator[tuple[bytes, tuple[bytes, None]]]:
    some, card = element
    if rule in card.keys:
        yield card.keys[rule], (some, None)


def _others(told: Told, rule: str) -> Iterator[Lost]:
    _, (some, _), (first,), _ = told
    if some != first and not is_earlier(some):
        yield some, (rule, first)


def _banded(element: tuple[bytes, Card]) -> Iterator[tuple[bytes, tuple[bytes, None]]]:
    some, card = element
    for key in card.bands:
        yield key, (some, None)


def _pairs(told: Told) -> Iterator[Edge]:
    """(more, less preferred), as `near_duplicates.candidate_pairs` says."""
    _, (some, _), most_preferred, _ = told
    if is_earlier(some):  # two earlier documents have been compared before
        return
    for other in most_preferred:
        if other >= some:
            return
        yield other, some


def _by_file(some: bytes) -> tuple[str, tuple[int, bytes]]:
    if is_earlier(some):
        return f'{_EARLIER}{earlier.block_of(some)}', (earlier_number(some), some)
    where = position_of(some)
    return where.name, (where.row, some)


def _sets(
    element: tuple[str, Iterable[tuple[int, bytes]]], output: str, near: NearDuplicates, indexes: Sequence[Index]
) -> Iterator[tuple[bytes, bytes]]:
    name, wanted = element
    if name.startswith(_EARLIER):
        return ((some, earlier.shingle_set(number, indexes)) for number, some in watched(wanted))
    return shingle_sets(join(output, f'documents/{name}.parquet'), list(watched(wanted)), near)


def _by_second(pair: Edge) -> tuple[bytes, bytes]:
    return pair[1], pair[0]


def _as_second(element: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    return element


def _with_second(
    element: tuple[bytes, tuple[Iterable[bytes], Iterable[bytes]]],
) -> Iterator[tuple[bytes, tuple[bytes, bytes]]]:
    second, (firsts, (held,)) = element
    for first in watched(firsts):
        yield first, (second, held)


def _alike(told: Told, threshold: float) -> Iterator[Edge]:
    first, (second, held), other, _ = told
    if jaccard(np.frombuffer(other, np.uint64), np.frombuffer(held, np.uint64)) >= threshold:
        yield second, first
