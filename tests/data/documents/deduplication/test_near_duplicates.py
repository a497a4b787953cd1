import gzip
import itertools
import json

import numpy as np
import pytest
import zstandard

from llm.data.documents.deduplication.near_duplicates import NearDuplicates, candidate_pairs, similarities
from llm.data.documents.deduplication.words import as_sets, ngrams, words_of
from llm.errors import UserError


def in_buckets(keys):
    """(keys, nodes) of all documents in all bands, sorted."""
    nodes = np.repeat(np.arange(len(keys)), keys.shape[1])
    order = np.lexsort((nodes, keys.ravel()))
    return keys.ravel()[order], nodes[order]


@pytest.fixture(scope='module')
def pages(dev_data):
    """3,000 pages of 150 words of books, 2,400 as they are and 600 copies with up to 20 words changed; and of which."""
    with zstandard.open(dev_data / 'text' / 'classic_books.jsonl.zst', 'rt', encoding='utf-8') as file:
        books = [json.loads(line)['text'][:400_000] for line in itertools.islice(file, 12)]
    words = ' '.join(books).split()
    generator = np.random.default_rng(0)
    found = [words[150 * i : 150 * (i + 1)] for i in range(2400)]
    originals = generator.integers(2400, size=600)
    for i, original in enumerate(originals):
        copy = list(found[original])
        for place in generator.integers(150, size=i % 21):
            copy[place] = words[generator.integers(len(words))]
        found.append(copy)
    return [' '.join(page) for page in found], originals


def test_candidates_are_exactly_what_signatures_define(pages):
    pages, originals = pages
    near = NearDuplicates()
    shingles = as_sets(ngrams(words_of(pages), near.shingle))
    signatures = near.bands.signatures(shingles)
    first, second = candidate_pairs(*in_buckets(near.bands.keys(signatures)), bucket=len(pages))
    assert (first < second).all()
    found = set(zip(first.tolist(), second.tolist(), strict=True))
    rows = signatures.reshape(len(pages), 14, 8)
    brute = set()
    for i in range(len(pages) - 1):
        later = i + 1 + np.flatnonzero((rows[i, :, 0] == rows[i + 1 :, :, 0]).any(axis=1))  # where a first row is equal
        brute |= {(i, int(j)) for j in later[(rows[i] == rows[later]).all(axis=2).any(axis=1)]}
    assert found == brute and len(brute) > 200
    # Planted pairs agree in a binomial number of functions; their sum lies within four deviations.
    copies = np.arange(2400, 3000)
    alike = similarities(originals, copies, shingles.__getitem__)
    assert alike.min() < 0.4 and alike.max() == 1
    agreeing = (signatures[originals] == signatures[copies]).sum(axis=1)
    assert (agreeing[alike == 1] == 112).all()
    deviation = np.sqrt((112 * alike * (1 - alike)).sum())
    assert deviation > 50 and abs((agreeing - 112 * alike).sum()) < 4 * deviation
    # And they are found as often as their similarity says.
    chances = np.array([near.bands.probability(value) for value in alike])
    there = sum(pair in found for pair in zip(originals.tolist(), copies.tolist(), strict=True))
    assert abs(there - chances.sum()) < 4 * np.sqrt((chances * (1 - chances)).sum())


def test_large_buckets_give_a_number_of_pairs_that_grows_with_their_size():
    keys = np.array([7] * 1000 + [8] * 3, np.uint64)
    nodes = np.concatenate([np.arange(1000), [1, 5, 900]])
    first, second = candidate_pairs(keys, nodes, bucket=4)
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    assert pairs == {(i, j) for i in range(4) for j in range(i + 1, 1000)} | {(1, 5), (1, 900), (5, 900)}
    assert len(first) == 4 * 1000 - (1 + 2 + 3 + 4) + 3
    assert [len(x) for x in candidate_pairs(keys[:0], nodes[:0], 4)] == [0, 0]


@pytest.mark.parametrize('count', [100, 1000])
def test_articles_have_the_near_duplicates_that_are_known(count, dev_data):
    with gzip.open(dev_data / f'dedup/articles_{count}.txt.gz', 'rt', encoding='utf-8') as file:
        names, texts = zip(*(line.rstrip('\n').split(' ', 1) for line in file), strict=True)
    lines = (dev_data / f'dedup/articles_{count}.truth').read_text().splitlines()
    truth = {tuple(sorted(line.split())) for line in lines}
    near = NearDuplicates()
    shingles = as_sets(ngrams(words_of(texts), near.shingle))
    first, second = candidate_pairs(*in_buckets(near.bands.keys(near.bands.signatures(shingles))), near.bucket)
    alike = similarities(first, second, shingles.__getitem__) >= near.threshold
    found = {tuple(sorted((names[i], names[j]))) for i, j in zip(first[alike], second[alike], strict=True)}
    assert found == truth


def test_mistakes_are_said():
    for fields in ({'threshold': 0.0}, {'scheme': 'c4'}, {'bucket': 0}):
        with pytest.raises(UserError):
            NearDuplicates(**fields)
    assert NearDuplicates(scheme='solved', threshold=0.8).bands.rows == 13
