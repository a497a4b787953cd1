"""Which blocks a kernel that loops has to visit: a range of them for each block that has a program of its own.

The counterpart of `block_table` for GPUs, where the programs of a grid run side by side and in no order: one computes a
block of queries against a range of blocks of keys, or the other way round. Within its range a run of blocks that the
mask leaves whole needs no masking. The range may hold hidden blocks only where segment ids go back and forth.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm.kernels.attention.block_table import visibility
from llm.kernels.attention.masking import Options, Positions


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
    offset: Any = options.offset
    if positions.offset is not None:
        offset = jnp.reshape(positions.offset, (-1, 1, 1)).astype(jnp.int32)
    known = positions.offset is None and positions.key_lengths is None and positions.query_ids is None
    # What is known is worked out now. The arrays are small beside what any device computes for that many blocks.
    with jax.ensure_compile_time_eval() if known else jax.named_scope('block_ranges'):
        visible, whole = visibility(options, positions, offset, lengths, block_sizes, jnp)
        inner = 1 if keys_outer else 2
        count = visible.shape[inner]
        index = jnp.arange(count, dtype=jnp.int32).reshape((1, -1, 1) if keys_outer else (1, 1, -1))
        high = jnp.max(jnp.where(visible, index + 1, 0), axis=inner)
        low = jnp.minimum(jnp.min(jnp.where(visible, index, count), axis=inner), high)
        first = jnp.minimum(jnp.min(jnp.where(whole, index, count), axis=inner, keepdims=True), count)
        end = jnp.min(jnp.where(~whole & (index >= first), index, count), axis=inner)
        first = jnp.minimum(first.squeeze(inner), high)
        edges = jnp.stack([low, first, jnp.clip(end, first, high), high], axis=-1).astype(jnp.int32)
        if not known:
            return BlockRanges(edges)
        before, middle, after = (bool(part) for part in jnp.any(jnp.diff(edges, axis=-1) > 0, axis=(0, 1)))
    return BlockRanges(edges, (before, middle, after))
