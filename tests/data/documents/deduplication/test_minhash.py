import numpy as np
import pytest

from llm.data.documents.deduplication.minhash import Bands, jaccard
from llm.data.documents.deduplication.words import Hashes, mixed
from llm.errors import UserError


def as_batch(sets):
    return Hashes(np.concatenate(sets), np.cumsum([0, *map(len, sets)]))


def test_signatures_are_least_values_of_each_function_however_documents_are_batched():
    generator = np.random.default_rng(0)
    sizes = [3, 0, 1, 70_000, 40, 65_536, 5]
    sets = [mixed(generator.integers(0, 1 << 63, size).astype(np.uint64)) for size in sizes]
    bands = Bands(3, 2, seed=5)
    found = bands.signatures(as_batch(sets))
    for values, signature in zip(sets, found, strict=True):
        assert (bands.signatures(as_batch([values]))[0] == signature).all()
        parts = [bands.signatures(as_batch([part]))[0] for part in np.array_split(values, 3)]
        assert (np.min(parts, axis=0) == signature).all()  # of a union, the least of both
    assert len(np.unique(found[0])) == 6 and (found[1] == 0xFFFFFFFF).all()
    assert not (found == Bands(3, 2, seed=6).signatures(as_batch(sets)))[[0, 2, 3, 4]].any()


@pytest.mark.parametrize('similarity', [0.1, 0.5, 0.9])
def test_signatures_agree_as_often_as_sets_do(similarity):
    """Each of 400 pairs of sets agrees in a binomial number of 1,024 functions: the sum lies within four deviations,
    and the spread over pairs is a binomial's (a chi-square of 400 within four deviations of it)."""
    generator = np.random.default_rng(1)
    total, pairs, hashes = 200, 400, 1024
    shared = round(2 * total * similarity / (1 + similarity))
    true = shared / (2 * total - shared)
    values = mixed(generator.integers(0, 1 << 63, (pairs, 2 * total - shared)).astype(np.uint64))
    bands = Bands(hashes, 1)
    first = bands.signatures(as_batch(list(values[:, :total])))
    second = bands.signatures(as_batch(list(values[:, total - shared :])))
    agreeing = (first == second).sum(axis=1)
    deviations = (agreeing - hashes * true) / np.sqrt(hashes * true * (1 - true))
    assert abs(deviations.sum()) < 4 * np.sqrt(pairs)
    assert abs((deviations**2).sum() - pairs) < 4 * np.sqrt(2 * pairs)
    assert jaccard(np.sort(values[0, :total]), np.sort(values[0, total - shared :])) == true


def test_bands_by_name_and_by_threshold():
    assert Bands.named('fineweb') == Bands(14, 8) and Bands.named('refinedweb') == Bands(20, 450)
    assert Bands(14, 8).probability(0.75) == pytest.approx(0.772, abs=1e-3)  # FineWeb's report says 77 %
    # What datasketch.lsh._optimal_param(threshold, 128, 0.5, 0.5) gives.
    assert [(b.bands, b.rows) for b in map(Bands.solved, (0.5, 0.8, 0.9))] == [(25, 5), (9, 13), (5, 25)]
    for mistake in (lambda: Bands.named('c4'), lambda: Bands.solved(1.0), lambda: Bands(0, 3)):
        with pytest.raises(UserError):
            mistake()


def test_keys_are_equal_where_all_rows_of_a_band_are():
    bands = Bands(2, 3)
    signatures = np.array([[1, 2, 3, 1, 2, 3], [1, 2, 3, 3, 2, 1], [1, 2, 4, 1, 2, 3]], np.uint32)
    keys = bands.keys(signatures)
    assert keys[0, 0] == keys[1, 0] and keys[0, 1] == keys[2, 1]
    assert len(np.unique(keys)) == 4  # the same rows in another band are another key
    assert jaccard(np.zeros(0, np.uint64), np.zeros(0, np.uint64)) == 0
