import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.kernels.attention import block_ranges as module
from llm.kernels.attention.block_ranges import block_ranges
from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.reference import attention_mask, query_indices
from tests.kernels.attention.problems import problems
from tests.models.small_decoders import compiled


def blocks(options, positions, lengths, sizes):
    """What every pair of blocks shows, all or part of it, from the reference's mask: two bool [B, Q, T]."""
    batch = 1 if positions.query_ids is None else positions.query_ids.shape[0]
    batch = max([batch, *(x.shape[0] for x in (positions.offset, positions.key_lengths) if x is not None and x.ndim)])
    offset = options.offset if positions.offset is None else positions.offset
    mask = compiled(functools.partial(attention_mask, causal=options.causal, window=options.window))(
        query_indices(offset, lengths[0]),
        jnp.arange(lengths[1]),
        query_segment_ids=None if positions.query_ids is None else positions.query_ids[:, : lengths[0]],
        key_segment_ids=None if positions.key_ids is None else positions.key_ids[:, : lengths[1]],
        key_lengths=positions.key_lengths,
    )
    mask = np.ones((1, *lengths), bool) if mask is None else np.asarray(mask)
    mask = np.broadcast_to(mask, (batch, *lengths))
    counts = [-(-n // size) for n, size in zip(lengths, sizes, strict=True)]
    some, all_ = np.zeros((2, batch, *counts), bool)
    for b, q, k in np.ndindex(batch, *counts):
        part = mask[b, q * sizes[0] : (q + 1) * sizes[0], k * sizes[1] : (k + 1) * sizes[1]]
        some[b, q, k], all_[b, q, k] = part.any(), part.all() and (k + 1) * sizes[1] <= lengths[1]
    return some, all_


def traced(options, positions, lengths, sizes, *, keys_outer):
    """The ranges as kernels make them, in one compiled program."""
    ranges = []

    def edges(positions):
        ranges.append(block_ranges(options, positions, lengths, sizes, keys_outer=keys_outer))
        return ranges[0].edges

    found = compiled(edges)(positions)
    return ranges[0]._replace(edges=found)


@settings(max_examples=40, derandomize=True)
@given(
    problem=problems(),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    keys_outer=st.booleans(),
    at_run_time=st.booleans(),
)
def test_ranges_hold_all_that_is_visible_and_mask_all_that_is_not(problem, sizes, keys_outer, at_run_time):
    arrays, given_options = problem
    lengths = arrays[0].shape[1], arrays[1].shape[1]
    offset = given_options['query_offset']
    static = isinstance(offset, int)
    options = Options(1.0, given_options['causal'], given_options['window'], None, offset if static else None)
    ids = given_options['query_segment_ids'], given_options['key_segment_ids']
    if ids[0] is not None:
        ids = (
            jnp.pad(jnp.asarray(x), [(0, 0), (0, -x.shape[1] % size)], mode='edge')
            for x, size in zip(ids, sizes, strict=True)
        )
    key_lengths = given_options['key_lengths']
    positions = Positions(
        *ids, None if static else jnp.asarray(offset), None if key_lengths is None else jnp.asarray(key_lengths)
    )
    some, all_ = blocks(options, positions, lengths, sizes)
    if at_run_time and static:
        options = dataclasses.replace(options, offset=None)
        positions = dataclasses.replace(positions, offset=jnp.asarray(offset))
    ranges = traced(options, positions, lengths, sizes, keys_outer=keys_outer)
    if keys_outer:
        some, all_ = some.swapaxes(1, 2), all_.swapaxes(1, 2)
    edges = np.broadcast_to(ranges.edges, (*some.shape[:2], 4))
    for b, outer in np.ndindex(some.shape[:2]):
        low, first, end, high = edges[b, outer]
        assert 0 <= low <= first <= end <= high <= some.shape[2]
        assert not some[b, outer, :low].any()
        assert not some[b, outer, high:].any()
        assert all_[b, outer, first:end].all()
        parts = np.diff(edges[b, outer])
        assert all(there or not part for there, part in zip(ranges.kinds, parts, strict=True))


@pytest.mark.parametrize('known', [True, False])
def test_a_causal_mask_halves_the_work_and_masks_the_diagonal(known, monkeypatch):
    if not known:
        monkeypatch.setattr(module, '_MOST_PAIRS', 0)
    ranges = block_ranges(Options(1.0, True, None, None, 0), Positions(), (64, 64), (16, 16), keys_outer=False)
    np.testing.assert_array_equal(ranges.edges[0], [[0, 0, i, i + 1] for i in range(4)])
    assert ranges.kinds == ((False, True, True) if known else (True, True, True))
    ranges = block_ranges(Options(1.0, True, None, None, 0), Positions(), (64, 64), (16, 16), keys_outer=True)
    np.testing.assert_array_equal(ranges.edges[0], [[i, i + 1, 4, 4] for i in range(4)])
    assert ranges.kinds == ((True, True, False) if known else (True, True, True))


def test_packed_rows_leave_out_the_other_segments():
    ids = jnp.asarray([[0] * 32 + [1] * 32])
    ranges = block_ranges(Options(1.0, True, None, None, 0), Positions(ids, ids), (64, 64), (8, 8), keys_outer=False)
    np.testing.assert_array_equal(ranges.edges[0, :, 0], [0, 0, 0, 0, 4, 4, 4, 4])
    np.testing.assert_array_equal(ranges.edges[0, :, 1:3], [[start, i] for i, start in enumerate([0] * 4 + [4] * 4)])
