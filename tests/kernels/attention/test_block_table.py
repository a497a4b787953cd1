import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.kernels.attention.block_table import ACTIVE, BLOCK_BITS, FIRST, LAST, PARTIAL, block_table
from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.reference import attention_mask, query_indices
from tests.models.small_decoders import compiled

MASK = (1 << BLOCK_BITS) - 1


@st.composite
def masks(draw):
    """Lengths, block sizes, options, positions, and the mask [B, S, T] they mean."""
    batch, queries, keys = draw(st.integers(1, 3)), draw(st.integers(1, 14)), draw(st.integers(1, 14))
    sizes = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    causal, window = draw(st.booleans()), draw(st.none() | st.integers(1, 8))
    offset = draw(st.integers(-6, 9))
    static = draw(st.booleans())
    ids = [None, None]
    if draw(st.booleans()):
        make = np.sort if draw(st.booleans()) else np.asarray
        ids = [make(rng.integers(0, 3, (batch, n))).astype(np.int32) for n in (queries, keys)]
    lengths = rng.integers(0, keys + 2, batch) if draw(st.booleans()) else None
    offsets = offset + (np.arange(batch) if draw(st.booleans()) else np.zeros(batch, int))
    mask = compiled(functools.partial(attention_mask, causal=causal, window=window))(
        query_indices(offset if static else jnp.asarray(offsets), queries),
        jnp.arange(keys),
        query_segment_ids=ids[0],
        key_segment_ids=ids[1],
        key_lengths=lengths,
    )
    mask = np.ones((batch, queries, keys), bool) if mask is None else np.broadcast_to(mask, (batch, queries, keys))
    padded = [
        None if x is None else jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)], mode='edge')
        for x, size in zip(ids, sizes, strict=True)
    ]
    positions = Positions(
        *padded, None if static else jnp.asarray(offsets), None if lengths is None else jnp.asarray(lengths)
    )
    return (queries, keys), sizes, Options(1.0, causal, window, None, offset if static else None), positions, mask


def traced(options, positions, lengths, sizes, *, keys_outer):
    """The table as kernels make it, in one compiled program."""
    tables = []

    def entries(positions):
        tables.append(block_table(options, positions, lengths, sizes, keys_outer=keys_outer))
        return tables[0].entries

    found = compiled(entries)(positions)
    return dataclasses.replace(tables[0], entries=found)


@settings(max_examples=60, derandomize=True)
@given(problem=masks(), keys_outer=st.booleans())
def test_every_pair_that_attends_is_in_one_active_entry_and_whole_entries_hide_nothing(problem, keys_outer):
    lengths, sizes, options, positions, mask = problem
    table = traced(options, positions, lengths, sizes, keys_outer=keys_outer)
    assert table.rows in (1, mask.shape[0])
    # The conditions are judged one by one, by a block's range; alone, causal mask and window are exact.
    exact = positions.query_ids is None and positions.key_lengths is None
    for row, wanted in enumerate(mask):
        entries = np.asarray(table.entries).reshape(table.rows, -1)[row % table.rows]
        assert len(entries) == table.length
        covered = np.zeros(lengths, int)
        order, flags = [], entries >> 2 * BLOCK_BITS
        for entry, flag in zip(entries, flags, strict=True):
            block = [entry & MASK, entry >> BLOCK_BITS & MASK]
            part = tuple(slice(i * size, (i + 1) * size) for i, size in zip(block, sizes, strict=True))
            order.append(block[::-1] if keys_outer else block)
            if flag & ACTIVE:
                covered[part] += 1
                hidden = not wanted[part].all()
                past_the_end = (block[1] + 1) * sizes[1] > lengths[1]
                assert bool(flag & PARTIAL) in table.kinds
                assert flag & PARTIAL or not (hidden or past_the_end)
                assert wanted[part].any() or not exact
        assert np.all(covered <= 1)
        assert np.all(covered[wanted] == 1)
        # In order, and the accumulators of every outer block are cleared once and written once.
        assert order == sorted(order)
        outer = np.array([block[0] for block in order])
        count = -(-lengths[1 if keys_outer else 0] // sizes[1 if keys_outer else 0])
        np.testing.assert_array_equal(outer[(flags & FIRST) != 0], np.arange(count))
        np.testing.assert_array_equal(outer[(flags & LAST) != 0], np.arange(count))
        for i in range(count):
            first, last = (np.flatnonzero((outer == i) & ((flags & flag) != 0))[0] for flag in (FIRST, LAST))
            active = np.flatnonzero((outer == i) & ((flags & ACTIVE) != 0))
            assert first <= last
            assert not active.size or (first <= active[0] and active[-1] <= last)


def test_a_causal_mask_leaves_half_of_the_blocks_and_masks_only_the_diagonal():
    table = block_table(Options(1.0, True, None, None, 0), Positions(), (32, 32), (4, 4), keys_outer=False)
    flags = np.asarray(table.entries) >> 2 * BLOCK_BITS
    assert (table.length, np.sum((flags & PARTIAL) != 0)) == (36, 8)


def test_packed_documents_leave_only_their_own_blocks_active():
    ids = jnp.repeat(jnp.arange(8), 4)[None]
    positions = Positions(ids, ids)
    table = block_table(Options(1.0, True, None, None, 0), positions, (32, 32), (4, 4), keys_outer=False)
    flags = np.asarray(table.entries) >> 2 * BLOCK_BITS
    assert np.sum((flags & ACTIVE) != 0) == 8
