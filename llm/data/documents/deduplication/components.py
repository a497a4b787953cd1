"""Connected components of a graph too large for memory: large-star and small-star (Kiveris et al. 2014, figure 1).

Both are functions of a node with its neighbours, here of many nodes at once in sorted arrays. Taken in turns until
nothing changes they turn every component into a star around its smallest node.
"""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from llm.data.documents.deduplication.sorted_runs import (
    PAIRED,
    RunWriter,
    group_sizes,
    group_starts,
    ranges,
    read_range,
    records,
    runs_in,
)
from llm.data.documents.deduplication.words import mixed

Edges = tuple[np.ndarray, np.ndarray]


def large_star(node: np.ndarray, neighbour: np.ndarray) -> Edges:
    """Joins every larger neighbour of a node to the smallest of the node and its neighbours.

    Args:
        node, neighbour: int64 [edges], every edge in both directions, sorted by node.
    """
    starts = group_starts(node)
    if not len(starts):
        return node, neighbour
    least = np.minimum(np.minimum.reduceat(neighbour, starts), node[starts])
    least = np.repeat(least, group_sizes(starts, len(node)))
    larger = neighbour > node
    return neighbour[larger], least[larger]


def small_star(node: np.ndarray, neighbour: np.ndarray) -> Edges:
    """Joins a node and its smaller neighbours to the smallest of them.

    Args:
        node, neighbour: int64 [edges], neighbour < node, sorted by node.
    """
    starts = group_starts(node)
    if not len(starts):
        return node, neighbour
    least = np.minimum.reduceat(neighbour, starts)
    each = np.repeat(least, group_sizes(starts, len(node)))
    other = neighbour != each
    return np.concatenate([neighbour[other], node[starts]]), np.concatenate([each[other], least])


def connected(edges: Iterable[Edges], directory: Path, limit: int) -> list[Path]:
    """Stars of all components, as runs of (node, smallest of its component); what a component has once is left out.

    Args:
        edges: pairs of nodes. directory: for the rounds; only the last is left there.
        limit: bytes of edges that are held at a time.
    """
    shutil.rmtree(directory, ignore_errors=True)
    now = _write(directory / 'round-0', edges, both=True)
    number = 0
    while True:
        number += 1
        middle = _round(
            directory / f'round-{number}-large', directory / f'round-{number - 1}', large_star, limit, both=False
        )
        after = _round(directory / f'round-{number}', directory / f'round-{number}-large', small_star, limit, both=True)
        shutil.rmtree(directory / f'round-{number - 1}')
        shutil.rmtree(directory / f'round-{number}-large')
        if after == now == middle:
            return [path for path, _ in runs_in(directory / f'round-{number}')]
        now = after


def stars(paths: Iterable[Path]) -> Edges:
    """(node, smallest of its component) from what `connected` returns."""
    some = [np.load(path) for path in paths]
    both = np.concatenate(some) if some else np.zeros(0, PAIRED)
    leaves = both[both['node'] > both['other']]
    return leaves['node'], leaves['other']


def _round(target: Path, source: Path, function: Callable[..., Edges], limit: int, *, both: bool) -> tuple[int, int]:
    runs = runs_in(source)

    def results() -> Iterable[Edges]:
        for keys in ranges(runs, limit):
            some = read_range(runs, keys, PAIRED)
            yield function(some['node'], some['other'])

    return _write(target, results(), both=both)


def _write(directory: Path, edges: Iterable[Edges], *, both: bool) -> tuple[int, int]:
    """Edges by their larger node, or by both; returns a number of the set of edges: (their count, a sum of hashes)."""
    writer = RunWriter(directory, 'edges', PAIRED)
    count = total = 0
    for first, second in edges:
        large, small = np.maximum(first, second), np.minimum(first, second)
        proper = large != small
        large, small = large[proper], small[proper]
        # Each edge once, as far as it comes twice from one range; once all are stars, it never comes from two.
        order = np.lexsort((small, large))
        once = order[group_starts(large[order], small[order])]
        large, small = large[once], small[once]
        for node, other in ((large, small), (small, large))[: 2 if both else 1]:
            writer.add(records(PAIRED, key=mixed(node.astype(np.uint64)), node=node, other=other))
        count += len(large)
        total += int(mixed(mixed(large.astype(np.uint64)) + small.astype(np.uint64)).sum(dtype=np.uint64))
    writer.close()
    return count, total % (1 << 64)
