"""The loader: batches by step, placed on the mesh, the same with and without making them ahead."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm.data.examples import MixedExamples, ShuffledExamples
from llm.data.index_maps import MixtureSchedule
from llm.data.loader import Loader, host_rows, local_batch
from llm.data.packing import PackedRows, evaluation_plan
from llm.errors import UserError
from tests.data.packed_corpus import SEED, SEQUENCE_LENGTH, batch_sharding, packed_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def examples(tmp_path_factory):
    return ShuffledExamples(packed_rows(tmp_path_factory.mktemp('corpus'), 'web', 40), SEED)


@pytest.mark.parametrize(
    'sizes', [{'data': 1}, {'data': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}, {'pipeline': 2, 'data': 2, 'sequence': 2}]
)
def test_a_batch_on_any_mesh_holds_the_same_rows(examples, sizes):
    sharding = batch_sharding(**sizes)
    with Loader(examples, 8, sharding) as loader:
        for step in (0, 1, 2, 10**6):
            expected = examples.rows(np.arange(step * 8, step * 8 + 8))
            batch = loader.batch(step)
            assert batch.keys() == expected.keys()
            for name, array in batch.items():
                assert array.sharding == sharding and array.shape == (8, SEQUENCE_LENGTH)
                assert array.dtype == expected[name].dtype
                assert np.array_equal(array, expected[name]), name


def test_making_ahead_and_jumping_change_nothing(examples):
    sharding = batch_sharding(data=2)
    order = [0, 1, 2, 3, 2, 3, 4, 100, 101, 5, 5, 6]
    with (
        Loader(examples, 4, sharding, prefetch=0) as plain,
        Loader(examples, 4, sharding, prefetch=3, threads=2) as ahead,
    ):
        for step in order:
            want, got = plain.batch(step), ahead.batch(step)
            assert all(np.array_equal(want[name], got[name]) for name in want)


class Recorded(ShuffledExamples):
    """Examples that note which thread made which rows."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.made = []

    def rows(self, indices):
        self.made.append((int(indices[0]), threading.current_thread() is threading.main_thread()))
        return super().rows(indices)


def test_consecutive_batches_are_made_once_and_in_other_threads(examples):
    recorded = Recorded(examples.records, SEED)
    with Loader(recorded, 4, batch_sharding(data=1), prefetch=2) as loader:
        for step in range(5):
            loader.batch(step)
    firsts = [first for first, _ in recorded.made]
    assert firsts == sorted(set(firsts)) and set(range(0, 20, 4)) <= set(firsts)
    assert not any(main for _, main in recorded.made)


def test_evaluation_rows_end_in_padding(examples):
    cache = examples.records.cache
    plan, _ = evaluation_plan(cache, SEQUENCE_LENGTH)
    rows = PackedRows(cache, plan, SEQUENCE_LENGTH)
    total = 0
    with Loader(rows, 8, batch_sharding(data=4)) as loader:
        for step in range(-(-rows.num_rows // 8)):
            total += int(loader.batch(step)['loss_weights'].sum())
        assert rows.num_rows % 8, 'choose a corpus whose last batch is not full'
    assert total == cache.num_tokens


def test_the_end_of_a_limited_mixture_is_a_user_error(examples):
    limited = MixedExamples([examples], MixtureSchedule([1.0], [10]))
    with Loader(limited, 4, batch_sharding(data=1)) as loader:
        loader.batch(0)
        loader.batch(1)
        with pytest.raises(UserError, match='ends after 10 rows'):
            loader.batch(2)


@pytest.mark.parametrize(
    ('sizes', 'batch_size', 'message'),
    [
        ({'data': 8}, 12, '12 rows cannot be divided over the mesh axes data=8'),
        ({'data': 2, 'fsdp': 2}, 6, 'data=2, fsdp=2'),
    ],
)
def test_a_batch_that_the_mesh_cannot_divide_is_refused(examples, sizes, batch_size, message):
    with pytest.raises(UserError, match=message):
        Loader(examples, batch_size, batch_sharding(**sizes))


def test_a_sequence_that_the_mesh_cannot_divide_is_refused(tmp_path):
    rows = packed_rows(tmp_path, 'web', 5)
    odd = PackedRows(rows.cache, evaluation_plan(rows.cache, 33)[0], 33)
    loader = Loader(odd, 4, batch_sharding(data=2, sequence=2))
    with pytest.raises(UserError, match='33 tokens cannot be divided over the mesh axes sequence=2'):
        loader.batch(0)


def test_hosts_that_cannot_divide_a_batch_are_refused():
    assert [list(host_rows(6, host, 3)) for host in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match='6 rows cannot be divided over 4 hosts'):
        host_rows(6, 0, 4)


def test_state_is_the_step_and_a_digest_of_the_data(examples):
    loader = Loader(examples, 4, NamedSharding(batch_sharding(data=1).mesh, PartitionSpec()))
    assert loader.state(12) == {'step': 12, 'batch_size': 4, 'digest': examples.digest}


HOST = """
import os, sys
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
sys.path.insert(0, {root!r})
import jax
import numpy as np
from pathlib import Path
jax.distributed.initialize('localhost:{port}', num_processes=2, process_id=int(sys.argv[1]))
from tests.data.packed_corpus import SEED, batch_sharding, packed_rows
from llm.data.examples import ShuffledExamples
from llm.data.loader import Loader
folder = Path({folder!r}) / sys.argv[1]
folder.mkdir()
examples = ShuffledExamples(packed_rows(folder, 'web', 40), SEED)
expected = examples.rows(np.arange(24, 32))
for sizes in ({{'data': 4}}, {{'data': 2, 'tensor': 2}}, {{'pipeline': 2, 'data': 2}}, {{'tensor': 4}}):
    with Loader(examples, 8, batch_sharding(**sizes)) as loader:
        print(list(sizes.items()), 'rows', loader.local_rows)
        for name, array in loader.batch(3).items():
            for shard in array.addressable_shards:
                assert np.array_equal(shard.data, expected[name][shard.index]), (sizes, name)
"""


@pytest.mark.slow
def test_two_real_hosts_build_only_their_rows(tmp_path, unused_port):
    script = tmp_path / 'host.py'
    script.write_text(HOST.format(root=str(ROOT), port=unused_port, folder=str(tmp_path)))
    processes = [
        subprocess.Popen([sys.executable, str(script), str(host)], stdout=subprocess.PIPE, text=True) for host in (0, 1)
    ]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    rows = [[line.split(' rows ')[1] for line in output if ' rows ' in line] for output in outputs]
    everything = 'range(0, 8)'
    assert rows[0] == ['range(0, 4)', 'range(0, 4)', everything, everything]
    assert rows[1] == ['range(4, 8)', 'range(4, 8)', everything, everything]


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def test_a_host_builds_rows_that_join_to_the_whole_batch(examples):
    whole = local_batch(examples, 7, 8, range(8))
    parts = [local_batch(examples, 7, 8, host_rows(8, host, 4)) for host in range(4)]
    for name, array in whole.items():
        assert np.array_equal(array, np.concatenate([part[name] for part in parts]))
