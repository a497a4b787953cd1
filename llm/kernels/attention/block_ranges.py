"""Which blocks a kernel that loops has to visit: a range of them for each block that has a program of its own.

The counterpart of `block_table` for GPUs, where the programs of a grid run side by side and in no order: one computes a
block of queries against a range of blocks of keys, or the other way round. Within its range a run of blocks that the
mask leaves whole needs no masking. The range may hold hidden blocks only where segment ids go back and forth.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llm.kernels.attention.block_table import visibility
from llm.kernels.attention.masking import Options, Positions

# Pairs of blocks looked at one by one when a program is traced; more of them are left to the device.
_MOST_PAIRS = 2**22


class BlockRanges(NamedTuple):
    """Where to start and stop.

    Attributes:
        edges: [1 or B, outer blocks, 4] int32: low <= first whole block <= end of the whole ones <= high.
        kinds: for the three parts of a range, whether any program has blocks in it, as far as is known when the
            program is traced. The middle part is whole.
    """

    edges: jax.Array
    kinds: tuple[bool, bool, bool] = (True, True, True)


def block_ranges(
    options: Options,
    positions: Positions,
    lengths: tuple[int, int],
    block_sizes: tuple[int, int],
    *,
    keys_outer: bool,
) -> BlockRanges:
    """For each block of queries its blocks of keys; with `keys_outer` for each block of keys its blocks of queries.

    Args:
        positions: its segment ids are padded to whole blocks.
        lengths: of queries and keys, without padding. block_sizes: of queries and keys.
    """
    (queries, keys), (block_q, block_k) = lengths, block_sizes
    pairs = -(-queries // block_q) * -(-keys // block_k)
    given = positions.offset, positions.key_lengths, positions.query_ids
    known = all(x is None for x in given) and pairs <= _MOST_PAIRS
    xp: Any = np if known else jnp
    visible, whole = visibility(options, positions, lengths, block_sizes, xp)
    inner = 1 if keys_outer else 2
    count = visible.shape[inner]
    index = xp.arange(count, dtype=xp.int32).reshape((1, -1, 1) if keys_outer else (1, 1, -1))
    high = xp.max(xp.where(visible, index + 1, 0), axis=inner)
    low = xp.minimum(xp.min(xp.where(visible, index, count), axis=inner), high)
    first = xp.min(xp.where(whole, index, count), axis=inner, keepdims=True)
    end = xp.min(xp.where(~whole & (index >= first), index, count), axis=inner)
    first = first.squeeze(inner)
    # Without a whole block all are in the part that a causal mask makes: more often than not the other stays empty.
    none = high if keys_outer else low
    first, end = xp.where(first == count, none, first), xp.where(first == count, none, end)
    edges = xp.stack([low, first, end, high], axis=-1).astype(xp.int32)
    if not known:
        return BlockRanges(edges)
    before, middle, after = (bool(part) for part in np.any(np.diff(edges, axis=-1) > 0, axis=(0, 1)))
    return BlockRanges(jnp.asarray(edges), (before, middle, after))
