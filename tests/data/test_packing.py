"""Packing: each token a target once an epoch, no target across documents, rows as full as best-fit makes them."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.data import packing
from llm.data.sources import TextFiles
from llm.data.token_cache_building import open_token_cache
from llm.errors import UserError
from tests.data.byte_tokens import CharacterTokens

FIRST = 0x4E00  # of the characters of which the corpus is made, each used once
END = 1
START = 2


def make_cache(folder, lengths, bos_id=START):
    """A cache of documents of `lengths` characters, all different and consecutive within and across documents."""
    starts = FIRST + np.cumsum([0, *lengths])
    documents = [''.join(map(chr, range(a, b))) for a, b in itertools.pairwise(starts)]
    files = Path(folder) / 'corpus'
    files.mkdir()
    half = len(documents) // 2
    for name, part in (('a', documents[:half]), ('b', documents[half:])):
        (files / f'{name}.jsonl').write_text('\n'.join(json.dumps({'text': text}) for text in part))
    source = TextFiles(str(files / '*.jsonl'), validation_fraction=0.0)
    return open_token_cache(source, 'train', CharacterTokens(bos_id=bos_id), Path(folder) / 'cache', workers=1)


lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=30)
modes = pytest.mark.parametrize('mode', ['concatenate', 'best_fit'])


def check_language_model(batch, lengths):
    """Every real target follows its input in its document; each is there once; padding carries nothing."""
    firsts = FIRST + np.cumsum([0, *lengths])
    last_of_document = set((firsts[1:] - 1).tolist())
    seen = []
    real = batch['segment_ids'] > 0
    assert (batch['loss_weights'][~real] == 0).all() and (batch['targets'][~real] == 0).all()
    for x, y, weight in zip(batch['inputs'][real], batch['targets'][real], batch['loss_weights'][real], strict=True):
        if x == START:
            assert y in firsts[:-1]
        elif y == END:
            assert x in last_of_document
        else:
            assert y == x + 1 and x not in last_of_document
        if weight:
            seen.append(int(y))
    assert sorted(seen) == [END] * len(lengths) + list(range(firsts[0], firsts[-1]))


def check_segments(batch):
    """Segments are 1, 2, ... in their row, positions begin anew in each, and no segment holds two documents."""
    for row in range(len(batch['inputs'])):
        ids = batch['segment_ids'][row]
        real = ids > 0
        assert (np.diff(ids[real]) >= 0).all() and set(ids[real]) == set(range(1, ids.max() + 1))
        assert not real[np.argmin(real) :].any() or real.all()
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            assert np.array_equal(batch['positions'][row][here], np.arange(here.sum()))
            inputs, targets = batch['inputs'][row][here], batch['targets'][row][here]
            assert np.array_equal(inputs[1:], targets[:-1])
            assert (inputs[1:] != START).all() and (targets[:-1] != END).all()


@modes
@settings(max_examples=25)
@given(lengths=lengths_of_documents, size=st.integers(1, 24), seed=st.integers(0, 5))
def test_each_token_is_a_target_once_and_none_crosses_documents(mode, lengths, size, seed):
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(folder, lengths)
        plan = packing.training_plan(cache, size, mode, seed)
        batch = packing.PackedRows(cache, plan, size).rows(np.arange(plan.num_rows))
    check_language_model(batch, lengths)
    check_segments(batch)
    assert (batch['loss_weights'] == (batch['segment_ids'] > 0)).all()


@modes
@settings(max_examples=15)
@given(lengths=lengths_of_documents, size=st.integers(1, 24))
def test_attention_across_documents_changes_only_segments_and_positions(mode, lengths, size):
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(folder, lengths)
        plan = packing.training_plan(cache, size, mode, 0)
        everything = np.arange(plan.num_rows)
        apart = packing.PackedRows(cache, plan, size).rows(everything)
        across = packing.PackedRows(cache, plan, size, attend_across_documents=True).rows(everything)
    for name in ('inputs', 'targets', 'loss_weights'):
        assert np.array_equal(apart[name], across[name])
    assert np.array_equal(across['segment_ids'], (apart['segment_ids'] > 0).astype(np.int32))
    expected = np.where(across['segment_ids'] > 0, np.arange(size), 0)
    assert np.array_equal(across['positions'], expected)


def test_across_documents_a_row_is_the_plain_stream(tmp_path):
    cache = make_cache(tmp_path, [3, 2], bos_id=None)
    plan = packing.training_plan(cache, 8, 'concatenate', 0)
    row = packing.PackedRows(cache, plan, 8, attend_across_documents=True)[0]
    # One boundary token on both sides: after the first input, what is predicted is what is read next, as in GPT-2.
    assert row['inputs'][0] == END
    assert np.array_equal(row['inputs'][1:7], row['targets'][:6])


def test_concatenation_pads_only_the_last_row(tmp_path):
    lengths = [7, 3, 12, 1, 30]
    cache = make_cache(tmp_path, lengths)
    plan = packing.training_plan(cache, 8, 'concatenate', 3)
    batch = packing.PackedRows(cache, plan, 8).rows(np.arange(plan.num_rows))
    total = sum(lengths) + len(lengths)
    assert plan.num_rows == -(-total // 8)
    assert batch['loss_weights'][:-1].all() and batch['loss_weights'][-1].sum() == total % 8


def best_fit_one_by_one(lengths, size):
    """Best-fit decreasing as its definition says; the lengths in each row."""
    rows, rooms = [], []
    for length in sorted(lengths, reverse=True):
        fitting = [(room, i) for i, room in enumerate(rooms) if room >= length]
        if fitting:
            _, i = min(fitting)
        else:
            rows.append([])
            rooms.append(size)
            i = len(rows) - 1
        rows[i].append(length)
        rooms[i] -= length
    return rows


@settings(max_examples=80)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=120), size=st.integers(30, 64))
def test_best_fit_fills_rows_as_placing_one_by_one_does(lengths, size):
    spans = np.zeros(len(lengths), packing._SPAN)
    spans['length'] = lengths
    packed, row_starts = packing._best_fit(spans, size)
    rows = [packed['length'][a:b].tolist() for a, b in itertools.pairwise(row_starts)]
    assert sorted(itertools.chain(*rows)) == sorted(lengths)
    # Which of several rows with equal room takes a span is open; how full the rows become is not.
    assert sorted(map(sum, rows)) == sorted(map(sum, best_fit_one_by_one(lengths, size)))


def test_best_fit_cuts_only_what_is_longer_than_a_row(tmp_path):
    lengths = [5, 40, 11, 3, 15, 9]
    cache = make_cache(tmp_path, lengths)
    plan = packing.training_plan(cache, 16, 'best_fit', 0)
    pieces = plan.spans['length'].tolist()
    assert sorted(pieces) == sorted([6, 16, 16, 9, 12, 4, 16, 10])


@settings(max_examples=25)
@given(lengths=lengths_of_documents, size=st.integers(1, 24), data=st.data())
def test_evaluation_scores_every_token_once_with_context_before_it(lengths, size, data):
    stride = data.draw(st.none() | st.integers(1, size))
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(folder, lengths)
        plan, num_bytes = packing.evaluation_plan(cache, size, stride)
        batch = packing.PackedRows(cache, plan, size).rows(np.arange(plan.num_rows))
    assert num_bytes == 3 * sum(lengths)  # of these characters in UTF-8
    check_language_model(batch, lengths)
    check_segments(batch)
    context = 0 if stride is None else size - stride
    opening = batch['inputs'] == START
    for row, column in zip(*np.nonzero((batch['loss_weights'] > 0) & (batch['segment_ids'] > 0)), strict=True):
        segment = batch['segment_ids'][row] == batch['segment_ids'][row, column]
        before = batch['positions'][row, column]
        assert before >= context or (opening[row] & segment).any(), 'a scored token without its context'


def test_evaluation_of_some_documents_counts_their_bytes(tmp_path):
    cache = make_cache(tmp_path, [4, 9, 2, 30, 6])
    plan, num_bytes = packing.evaluation_plan(cache, 8, None, max_documents=3)
    batch = packing.PackedRows(cache, plan, 8).rows(np.arange(plan.num_rows))
    characters = batch['targets'][batch['targets'] >= FIRST]
    assert (batch['targets'] == END).sum() == 3
    assert num_bytes == 3 * len(characters) == 3 * len(set(characters.tolist()))
    assert packing.evaluation_plan(cache, 8, None, max_documents=50)[1] == cache.num_bytes


def test_rows_beyond_the_last_are_padding(tmp_path):
    cache = make_cache(tmp_path, [4, 9])
    plan, _ = packing.evaluation_plan(cache, 8)
    batch = packing.PackedRows(cache, plan, 8).rows([plan.num_rows, 0, plan.num_rows + 5])
    for name, array in batch.items():
        assert not array[[0, 2]].any(), name
    assert batch['loss_weights'][1].any()


@modes
def test_a_plan_is_computed_once_and_again_when_damaged(tmp_path, mode):
    cache = make_cache(tmp_path, [4, 9, 30, 2])
    first = packing.training_plan(cache, 8, mode, 1)
    files = sorted(cache.directory.glob('plan-*.npy'))
    content = [path.read_bytes() for path in files]
    times = [path.stat().st_mtime_ns for path in files]
    assert np.array_equal(packing.training_plan(cache, 8, mode, 1).spans, first.spans)
    assert times == [path.stat().st_mtime_ns for path in files]
    for path in files:
        path.write_bytes(path.read_bytes()[:-5])
        assert np.array_equal(packing.training_plan(cache, 8, mode, 1).spans, first.spans)
        assert [path.read_bytes() for path in files] == content
    assert packing.training_plan(cache, 8, mode, 2).digest != first.digest


def test_rows_equal_the_definition_of_the_objective(tmp_path):
    cache = make_cache(tmp_path, [11, 5])
    row = packing.PackedRows(cache, packing.training_plan(cache, 32, 'best_fit', 0), 32)[0]
    expected = {name: [] for name in row}
    for number, document in enumerate((cache.document(0), cache.document(1)), start=1):
        expected['inputs'] += [START, *document[:-1]]
        expected['targets'] += [*document]
        expected['loss_weights'] += [1.0] * len(document)
        expected['segment_ids'] += [number] * len(document)
        expected['positions'] += range(len(document))
    for name, values in expected.items():
        assert row[name].tolist() == [*values, *[0] * (32 - len(values))], name


@pytest.mark.parametrize('stride', [0, 9, -1])
def test_a_stride_out_of_range_is_refused(tmp_path, stride):
    with pytest.raises(UserError, match='stride'):
        packing.evaluation_plan(make_cache(tmp_path, [4]), 8, stride)
