"""Examples by index: far ones directly equal iteration, records get their own randomness, and order never matters."""

import itertools
import pickle

import numpy as np
import pytest

from llm.data.examples import MixedExamples, ShuffledExamples
from llm.data.index_maps import MixtureSchedule, Permutation, derive_key
from llm.data.loader import host_rows, local_batch
from llm.data.objectives import LanguageModelling, record_generator
from llm.data.packing import PackedRows, training_plan
from tests.data.byte_tokens import CharacterTokens
from tests.data.packed_corpus import SEED, packed_rows


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    return [
        packed_rows(folder, 'web', 40),
        packed_rows(folder, 'books', 13, 'concatenate'),
        packed_rows(folder, 'code', 3),
    ]


NAMES = ('web', 'books', 'code')
RATES = (0.5, 0.3, 0.2)


@pytest.fixture(scope='module')
def mixture(parts):
    examples = [ShuffledExamples(rows, SEED, name) for rows, name in zip(parts, NAMES, strict=True)]
    return MixedExamples(examples, MixtureSchedule(RATES))


def records_in_order(rows, name):
    """The rows of one source as an iterator reads them: epoch after epoch, each in its shuffled order."""
    permutation = Permutation(rows.num_rows, derive_key(SEED, 'shuffle', name))
    for first_epoch in itertools.count(step=8192):
        epochs = np.arange(first_epoch, first_epoch + 8192)
        yield from permutation(np.arange(rows.num_rows)[None, :], epochs[:, None]).ravel().tolist()


def mixed_in_order(parts):
    """(source, row) after (source, row): a reader that holds positions and knows no index."""
    turns = MixtureSchedule(RATES).locate(np.arange(10))[0].tolist()  # 5, 3 and 2 in ten
    readers = [records_in_order(rows, name) for rows, name in zip(parts, NAMES, strict=True)]
    for source in itertools.cycle(turns):
        yield source, next(readers[source])


def test_step_a_million_directly_equals_by_iteration_on_any_number_of_hosts(mixture, parts):
    step, batch_size = 1_000_000, 4
    reader = mixed_in_order(parts)
    located = list(itertools.islice(reader, step * batch_size, (step + 1) * batch_size))
    iterated = [parts[source][row] for source, row in located]
    for hosts in (1, 2, 4):
        built = [local_batch(mixture, step, batch_size, host_rows(batch_size, host, hosts)) for host in range(hosts)]
        for name in iterated[0]:
            whole = np.concatenate([batch[name] for batch in built])
            assert np.array_equal(whole, np.stack([row[name] for row in iterated])), name
    assert mixture.schedule.locate([step * batch_size])[1][0] // parts[0].num_rows > 10_000  # epochs


def test_rows_do_not_depend_on_what_else_is_asked_for(mixture):
    indices = np.asarray([5, 10**12, 0, 77, 5])
    together = mixture.rows(indices)
    for i, index in enumerate(indices):
        for name, array in mixture[int(index)].items():
            assert np.array_equal(array, together[name][i])
    again = pickle.loads(pickle.dumps(mixture)).rows(indices)
    assert all(np.array_equal(again[name], together[name]) for name in together)


@pytest.mark.parametrize('mode', ['concatenate', 'best_fit'])
def test_every_token_is_a_target_once_in_every_epoch(tmp_path, mode):
    rows = packed_rows(tmp_path, 'web', 40, mode)
    examples = ShuffledExamples(rows, SEED)
    stream = np.sort(np.concatenate([rows.cache.document(i) for i in range(rows.cache.num_documents)]))
    epochs = [examples.rows(np.arange(e * rows.num_rows, (e + 1) * rows.num_rows)) for e in (0, 1, 10**9)]
    for batch in epochs:
        assert np.array_equal(np.sort(batch['targets'][batch['loss_weights'] > 0]), stream)
    assert not np.array_equal(epochs[0]['targets'], epochs[1]['targets'])


def test_sources_of_one_seed_are_shuffled_apart(parts):
    same_rows = [ShuffledExamples(parts[0], SEED, name).rows(np.arange(20))['targets'] for name in ('a', 'b')]
    assert not np.array_equal(*same_rows)


def test_a_digest_stands_for_content_and_order(parts, tmp_path):
    def digest(seed=SEED, name='web', rates=RATES, rows=parts[0], post_cache=()):
        first = ShuffledExamples(rows, seed, name, post_cache)
        others = [ShuffledExamples(part, SEED, n) for part, n in zip(parts[1:], NAMES[1:], strict=True)]
        return MixedExamples([first, *others], MixtureSchedule(rates)).digest

    other_vocabulary = packed_rows(tmp_path, 'web', 40, vocabulary=CharacterTokens())
    digests = [
        digest(),
        digest(seed=1),
        digest(name='x'),
        digest(rates=(0.4, 0.4, 0.2)),
        digest(rows=other_vocabulary),
        digest(post_cache=(LanguageModelling(1),)),
    ]
    assert len(set(digests)) == len(digests) and digest() == digests[0]


def noise(example, generator):
    return {**example, 'noise': generator.random(4)}


def test_post_cache_functions_get_randomness_by_epoch_and_record(parts):
    rows = parts[0]
    examples = ShuffledExamples(rows, SEED, 'web', (noise,))
    plain = ShuffledExamples(rows, SEED, 'web')
    epochs = [examples.rows(np.arange(e * rows.num_rows, (e + 1) * rows.num_rows)) for e in range(3)]
    values = np.concatenate([batch['noise'] for batch in epochs])
    assert len(np.unique(values)) == values.size
    assert np.array_equal(epochs[1]['inputs'], plain.rows(np.arange(rows.num_rows, 2 * rows.num_rows))['inputs'])
    index = rows.num_rows + 3
    assert np.array_equal(examples[index]['noise'], epochs[1]['noise'][3])


def test_record_generators_differ_in_every_part():
    draws = {
        float(record_generator(seed, epoch, index).random())
        for seed in range(4)
        for epoch in range(4)
        for index in range(4)
    }
    assert len(draws) == 64


def test_packed_rows_equal_the_objective_record_by_record(parts):
    cache = parts[0].cache
    rows = PackedRows(cache, training_plan(cache, 4096, 'concatenate', SEED), 4096)
    row, column = rows[0], 0
    for document in range(cache.num_documents):
        segment = row['segment_ids'] == document + 1
        stored = row['targets'][segment]
        expected = LanguageModelling(cache.boundaries.start)({'targets': stored}, record_generator(0, 0, 0))
        for name in ('inputs', 'targets', 'loss_weights', 'positions'):
            assert np.array_equal(row[name][segment], expected[name]), name
        column += len(stored)
    assert column == cache.num_tokens
