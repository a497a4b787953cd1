"""Connected components as joins: rounds of large-star and small-star (Kiveris et al. 2014), several in a pipeline.

How many rounds a graph takes is not known before, and a pipeline is built before it runs: so one has a few rounds, and
says whether its last changed anything.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.transforms.combiners import ToDict

from llm.data.documents.beam.deduplicating import Edge, Lost, read_pairs, write_edges
from llm.data.documents.beam.files import join, write_record
from llm.data.documents.beam.groups import Smallest, Tell, Told

# Beam's integers have 64 bits and a sign.
_MASK = (1 << 62) - 1


def stars(pipeline: beam.Pipeline, work: str, turn: int, rounds: int, salts: int) -> None:
    """Adds rounds to a pipeline, from WORK/edges/TURN to TURN + 1; WORK/changed-TURN.json says whether they ended."""
    edges = read_pairs(pipeline, join(work, f'edges/{turn}/*'), 'edges') | 'ends' >> beam.Map(_ends)
    for number in range(rounds):
        before = edges
        middle = (
            before
            | f'both ways {number}' >> beam.FlatMap(_both)
            | f'neighbourhoods {number}' >> Tell(Smallest(1), salts)
            | f'large star {number}' >> beam.FlatMap(_large)
            | f'each of large {number}' >> beam.Distinct()
        )
        edges = (
            middle
            | f'down {number}' >> beam.Map(_down)
            | f'smaller ones {number}' >> Tell(Smallest(1), salts)
            | f'small star {number}' >> beam.FlatMap(_small)
            | f'each of small {number}' >> beam.Distinct()
        )
    write_edges(edges, join(work, f'edges/{turn + 1}/part'))
    sums = [
        some | f'hash {name}' >> beam.Map(_hashed, name)
        for name, some in (('before', before), ('middle', middle), ('after', edges))
    ]
    _ = (
        sums
        | 'all hashes' >> beam.Flatten()
        | 'sums' >> beam.CombinePerKey(_sum)
        | ToDict()
        | 'changed' >> beam.Map(_report, join(work, f'changed-{turn}.json'))
    )


def _ends(lost: Lost) -> Edge:
    return lost[0], lost[1][1]


def _both(edge: Edge) -> Iterator[tuple[bytes, tuple[bytes, None]]]:
    large, small = edge
    yield large, (small, None)
    yield small, (large, None)


def _large(told: Told) -> Iterator[Edge]:
    some, (neighbour, _), (least,), _ = told
    if neighbour > some:
        yield neighbour, min(least, some)


def _down(edge: Edge) -> tuple[bytes, tuple[bytes, None]]:
    return edge[0], (edge[1], None)


def _small(told: Told) -> Iterator[Edge]:
    some, (neighbour, _), (least,), _ = told
    yield (some, least) if neighbour == least else (neighbour, least)


def _hashed(edge: Edge, name: str) -> tuple[str, tuple[int, int]]:

    digest = hashlib.blake2b(b''.join(edge), digest_size=8).digest()
    return name, (1, int.from_bytes(digest, 'big') & _MASK)


def _sum(some: Any) -> tuple[int, int]:
    count = total = 0
    for number, value in some:
        count, total = count + number, (total + value) & _MASK
    return count, total


def _report(sums: dict[str, tuple[int, int]], path: str) -> None:
    write_record(path, {'changed': len(set(sums.values())) > 1, 'edges': sums.get('after', (0, 0))[0]})
