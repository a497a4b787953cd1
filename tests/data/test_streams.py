"""Rows in order: each row of a batch goes on from that of the batch before, and any batch is reached directly."""

import collections
import dataclasses

import numpy as np
import pytest

from llm.data.datasets import Component, DataConfig
from llm.data.examples import StreamedExamples
from llm.data.packing import PackedRows
from llm.data.sources import TextFiles
from llm.errors import UserError
from tests.data.packed_corpus import SEQUENCE_LENGTH, packed_rows

B = 4


@pytest.fixture(scope='module')
def records(tmp_path_factory):
    rows = packed_rows(tmp_path_factory.mktemp('streams'), 'a', 40, 'concatenate')
    return PackedRows(rows.cache, rows.plan, SEQUENCE_LENGTH, attend_across_documents=True)


def counted(rows):
    """How often each row is there."""
    return collections.Counter(row.tobytes() for row in rows)


def test_each_row_goes_on_from_the_one_before(records):
    examples = StreamedExamples(records, B, seed=3)
    assert 2 < examples.steps == records.num_rows // B
    seen, before = [], {}
    for epoch in range(2):
        for step in range(examples.steps):
            batch = examples.rows(np.arange(B) + (epoch * examples.steps + step) * B)
            if step:
                goes_on = batch['positions'][:, 0] > 0
                np.testing.assert_array_equal(batch['inputs'][goes_on, 0], before['targets'][goes_on, -1])
                np.testing.assert_array_equal(batch['positions'][goes_on, 0], before['positions'][goes_on, -1] + 1)
                assert goes_on.sum() >= B - 1  # but for the stream that comes to the end of the text
            else:
                assert not batch['positions'][:, 0].any()
            before = batch
            seen.append(batch['targets'])
    # An epoch has no row twice, and the next begins elsewhere.
    first, second = (np.concatenate(seen[i * examples.steps : (i + 1) * examples.steps]) for i in range(2))
    every = counted(records.rows(np.arange(records.num_rows))['targets'])
    assert counted(first) <= every and counted(second) <= every and len(first) == B * examples.steps
    assert not np.array_equal(first[:B], second[:B])


def test_a_batch_is_reached_directly_by_any_host(records):
    examples = StreamedExamples(records, B, seed=3)
    far = 10**6 * B + np.arange(B)
    whole = examples.rows(far)
    for host in range(2):
        part = examples.rows(far[host * 2 : host * 2 + 2])
        for name, array in part.items():
            np.testing.assert_array_equal(array, whole[name][host * 2 : host * 2 + 2])
    assert StreamedExamples(records, B, seed=4).digest != examples.digest != StreamedExamples(records, 2, 3).digest


def test_evaluation_reads_every_row_once(records):
    examples = StreamedExamples(records, B, None)
    batches = [examples.rows(np.arange(B) + step * B) for step in range(examples.steps + 1)]
    targets = np.concatenate([batch['targets'][batch['loss_weights'].any(1)] for batch in batches])
    assert counted(targets) == counted(records.rows(np.arange(records.num_rows))['targets'])
    assert not batches[-1]['loss_weights'].any()


def test_mistakes_are_named(records):
    with pytest.raises(UserError, match=f'{records.num_rows} rows cannot be 10000 streams'):
        StreamedExamples(records, 10_000, seed=0)
    one = Component('one', TextFiles('nothing'))
    good = DataConfig((one,), packing='concatenate', attend_across_documents=True, order='contiguous')
    for change, message in (
        ({'packing': 'best_fit'}, 'run through documents'),
        ({'attend_across_documents': False}, 'run through documents'),
        ({'components': (one, dataclasses.replace(one, name='two'))}, 'of one source'),
        ({'evaluation_documents': 3}, 'chosen at random'),
        ({'order': 'sorted'}, "order is 'sorted'"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(good, **change)
