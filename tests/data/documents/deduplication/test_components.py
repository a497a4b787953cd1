import numpy as np
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data.documents.deduplication.components import connected, large_star, small_star, stars

NODES = st.integers(0, 29)


def smallest_of_components(count, edges):
    """By SciPy: for each node the smallest of its component."""
    first, second = np.array(edges).reshape(-1, 2).T
    graph = scipy.sparse.coo_array((np.ones(len(edges)), (first, second)), (count, count))
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    least = {int(label): int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)}
    return [least[int(label)] for label in labels]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(NODES, NODES), max_size=60), st.randoms(), st.sampled_from([1 << 20, 100]))
def test_components_are_those_of_scipy_in_any_order_and_partitions(tmp_path_factory, edges, random, limit):
    directory = tmp_path_factory.mktemp('rounds')
    parts = [edges[i::3] for i in range(3)]
    random.shuffle(parts)
    arrays = [tuple(np.array(part, np.int64).reshape(-1, 2).T) for part in parts]
    node, least = stars(connected(arrays, directory / 'work', limit))
    found = dict(zip(node.tolist(), least.tolist(), strict=True))
    assert len(found) == len(node)
    assert [found.get(i, i) for i in range(30)] == smallest_of_components(30, edges)


def test_a_long_path_takes_few_rounds(tmp_path):
    """A path of 4,096 nodes in random order: each round shortens it by more than half."""
    order = np.random.default_rng(0).permutation(4096)
    node, least = stars(connected([(order[:-1], order[1:])], tmp_path / 'work', 1 << 14))
    assert sorted(node.tolist()) == list(range(1, 4096)) and not least.any()
    (last,) = (tmp_path / 'work').iterdir()
    assert int(last.name.removeprefix('round-')) <= 13


def test_stars_of_single_groups_as_the_paper_draws_them():
    node, neighbour = np.array([5, 5, 5, 5]), np.array([2, 3, 7, 9])
    assert [pair.tolist() for pair in large_star(node, neighbour)] == [[7, 9], [2, 2]]
    assert [pair.tolist() for pair in small_star(node[:2], neighbour[:2])] == [[3, 5], [2, 2]]
