"""Which blocks of queries meet which blocks of keys: the list of work that a kernel's grid walks through.

Queries and keys are cut into blocks. A pair of blocks is left out when the mask hides all of it; a pair that the mask
leaves whole needs no masking. What is known when the program is traced (causal mask, window) shortens the list; what is
known at run time only (segments, lengths, offsets) moves the pairs that are not needed behind the others, where they
cost neither a load nor a product.

An entry is one int32: query block, key block << 12, flags << 24.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm.kernels.attention.masking import Options, Positions

BLOCK_BITS = 12
# First and last entry of its outer block, where accumulators are cleared and written.
FIRST, LAST = 1, 2
# Whether there is anything to compute, and whether some of the pair is hidden.
ACTIVE, PARTIAL = 4, 8


@dataclasses.dataclass(frozen=True)
class BlockTable:
    """The list of work.

    Attributes:
        entries: of every row, [rows * length] int32; rows is 1 if all rows of the batch have the same.
        kinds: the values that PARTIAL takes among active entries, as far as is known when the program is traced.
    """

    entries: jax.Array
    length: int
    rows: int
    kinds: tuple[bool, ...] = (False, True)


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, N * size] -> [B, N, size]."""
    return x.reshape(x.shape[0], -1, size)


def visibility(
    options: Options,
    positions: Positions,
    lengths: tuple[int, int],
    block_sizes: tuple[int, int],
    xp: Any,
) -> tuple[Any, Any]:
    """Whether a pair of blocks has anything to show, and whether it shows all: bool [1 or B, query blocks, key blocks].

    Args:
        lengths: of queries and keys, without padding.
        xp: numpy, or jax.numpy if anything is traced.
    """
    (queries, keys), (block_q, block_k) = lengths, block_sizes
    offset: Any = options.offset
    if positions.offset is not None:
        offset = jnp.reshape(positions.offset, (-1, 1, 1)).astype(jnp.int32)
    first_query = (xp.arange(-(-queries // block_q)) * block_q)[None, :, None]
    first_key = (xp.arange(-(-keys // block_k)) * block_k)[None, None, :]
    last_key = xp.minimum(first_key + block_k, keys) - 1
    farthest = offset + xp.minimum(first_query + block_q, queries) - 1 - first_key
    nearest = offset + first_query - last_key
    visible = xp.ones_like(farthest, dtype=bool)
    whole = visible & (first_key + block_k <= keys)
    if options.causal:
        visible, whole = visible & (farthest >= 0), whole & (nearest >= 0)
    if options.window is not None:
        visible, whole = visible & (nearest < options.window), whole & (farthest < options.window)
        if not options.causal:
            visible, whole = visible & (farthest > -options.window), whole & (nearest > -options.window)
    if positions.key_lengths is not None:
        length = positions.key_lengths[:, None, None]
        visible, whole = visible & (first_key < length), whole & (last_key < length)
    if positions.query_ids is not None and positions.key_ids is not None:
        ids_q, ids_k = _blocks(positions.query_ids, block_q), _blocks(positions.key_ids, block_k)
        low_q, high_q = ids_q.min(-1)[:, :, None], ids_q.max(-1)[:, :, None]
        low_k, high_k = ids_k.min(-1)[:, None, :], ids_k.max(-1)[:, None, :]
        visible = visible & (low_q <= high_k) & (low_k <= high_q)
        whole = whole & (low_q == high_q) & (low_k == high_k) & (low_q == low_k)
    return visible, whole


def block_table(
    options: Options,
    positions: Positions,
    lengths: tuple[int, int],
    block_sizes: tuple[int, int],
    *,
    keys_outer: bool,
) -> BlockTable:
    """The list of work, by blocks of queries and, within one, of keys; with `keys_outer` the other way round.

    Every outer block has an entry, even if nothing of it is to be computed, so that its result is written.

    Args:
        positions: its segment ids are padded to whole blocks.
        lengths: of queries and keys, without padding. block_sizes: of queries and keys.
    """
    pruned = np.ones((1, -(-lengths[0] // block_sizes[0]), -(-lengths[1] // block_sizes[1])), bool)
    whole = pruned
    if options.offset is not None:
        pruned, whole = visibility(options, Positions(), lengths, block_sizes, np)
    if max(pruned.shape) >= 1 << BLOCK_BITS:
        raise ValueError(f'{lengths} queries and keys make more blocks of {block_sizes} than an entry can hold')
    # The first entry of an outer block stands in where none of the block's is needed.
    inner = 1 if keys_outer else 2
    listed = pruned | (~pruned.any(inner, keepdims=True) & (np.indices(pruned.shape)[inner] == 0))
    query_block, key_block = np.nonzero(listed[0])
    if keys_outer:
        order = np.lexsort((query_block, key_block))
        query_block, key_block = query_block[order], key_block[order]
    outer = key_block if keys_outer else query_block
    first = np.diff(outer, prepend=-1) != 0
    pack = query_block | key_block << BLOCK_BITS

    if options.offset is not None and positions.key_lengths is None and positions.query_ids is None:
        shown, complete = pruned[0, query_block, key_block], whole[0, query_block, key_block]
        flags = first * FIRST | np.roll(first, -1) * LAST | shown * ACTIVE | (shown & ~complete) * PARTIAL
        kinds = tuple(kind for kind in (False, True) if np.any(shown & (complete != kind)))
        return BlockTable(jnp.asarray(pack | flags << 2 * BLOCK_BITS, jnp.int32), len(pack), 1, kinds)

    visible, whole = visibility(options, positions, lengths, block_sizes, jnp)
    shown, complete = ((x & pruned)[:, query_block, key_block] for x in (visible, whole))
    group = np.cumsum(first) - 1
    needed = jnp.zeros((shown.shape[0], group[-1] + 1), bool).at[:, group].max(shown)
    kept = shown | (first & ~needed[:, group])
    # Behind the entries that are kept the last of them is repeated without flags: the same blocks, nothing to load.
    count = kept.sum(axis=1, keepdims=True)
    moved = jnp.argsort(~kept, axis=1, stable=True)
    moved = jnp.take_along_axis(moved, jnp.minimum(jnp.arange(len(pack)), count - 1), axis=1)
    shown, complete = (jnp.take_along_axis(x, moved, axis=1) for x in (shown, complete))
    at = jnp.asarray(outer)[moved]
    starts = jnp.diff(at, axis=1, prepend=-1) != 0
    ends = (jnp.diff(at, axis=1, append=-1) != 0) | (jnp.arange(len(pack)) == count - 1)
    flags = starts * FIRST | ends * LAST | shown * ACTIVE | (shown & ~complete) * PARTIAL
    flags = jnp.where(jnp.arange(len(pack)) < count, flags, 0)
    entries = (jnp.asarray(pack)[moved] | flags << 2 * BLOCK_BITS).astype(jnp.int32)
    return BlockTable(entries.reshape(-1), len(pack), entries.shape[0])
