"""Pieces of rows that are cut along a mesh axis, for what goes through a row token by token: scans, convolutions.

A device holds one run of neighbouring tokens of each row or, in zig-zag, two (`SequenceAxis.parts`). Both are treated
alike, as rows of their own: [B, S, ...] becomes [parts * B, S / parts, ...]. What a piece needs of those before it is
small (a state, the last few tokens), so every device gathers it of all pieces; what a window reaches is handed on from
neighbour to neighbour. For use inside `jax.shard_map`.
"""

import jax
import jax.numpy as jnp

from llm.kernels.attention.sequence_axis import SequenceAxis, hand_on, pieces_of


def split(x: jax.Array, axis: SequenceAxis | None) -> jax.Array:
    """[B, S, ...] -> [parts * B, S / parts, ...]."""
    if axis is None or axis.parts == 1:
        return x
    parts = x.reshape(x.shape[0], axis.parts, -1, *x.shape[2:]).swapaxes(0, 1)
    return parts.reshape(-1, *parts.shape[2:])


def join(x: jax.Array, axis: SequenceAxis | None) -> jax.Array:
    """The inverse of `split`."""
    if axis is None or axis.parts == 1:
        return x
    parts = x.reshape(axis.parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return parts.reshape(parts.shape[0], -1, *parts.shape[3:])


def _gather(x: jax.Array, axis: SequenceAxis) -> jax.Array:
    """Of this device's pieces [parts * B, ...] -> of all, in the order of the row, [pieces, B, ...]."""
    parts = x.reshape(axis.parts, -1, *x.shape[1:])
    everywhere = jax.lax.all_gather(parts, axis.name)
    first = everywhere[:, 0]
    return first if axis.parts == 1 else jnp.concatenate([first, everywhere[::-1, 1]])


def previous_tail(x: jax.Array, count: int, axis: SequenceAxis) -> jax.Array:
    """The `count` tokens before each piece, zeros before the row: pieces [P, S, ...] -> [P, count, ...]."""
    last = min(count, x.shape[1])  # a short piece hands on all it has, and what came before it
    tails = jnp.moveaxis(_gather(x[:, x.shape[1] - last :], axis), 0, 1)
    row = tails.reshape(tails.shape[0], -1, *tails.shape[3:])
    row = jnp.pad(row, [(0, 0), (count, 0)] + [(0, 0)] * (row.ndim - 2))
    own = [jax.lax.dynamic_slice_in_dim(row, place * last, count, axis=1) for place in pieces_of(axis)]
    return jnp.concatenate(own)


def with_neighbours(x: jax.Array, before: int, after: int, axis: SequenceAxis) -> jax.Array:
    """Pieces and the tokens around them, zeros outside of the row: [P, S, ...] -> [P, before + S + after, ...].

    What is more than one piece away is handed on as often as it takes.
    """
    length = x.shape[1]
    around: dict[int, list[jax.Array]] = {1: [], -1: []}
    for step, count in ((1, before), (-1, after)):
        moving = x
        for handed in range(0, count, length):
            taken = min(count - handed, length)
            moving = _neighbours(moving[:, length - taken :] if step == 1 else moving[:, :taken], step, axis)
            around[step].append(moving)
    return jnp.concatenate([*around[1][::-1], x, *around[-1]], axis=1)


def _neighbours(x: jax.Array, step: int, axis: SequenceAxis) -> jax.Array:
    """What the piece before each has (`step` 1), or the one after it (-1), zeros where there is none."""
    first, last = (jax.lax.axis_index(axis.name) == rank for rank in (0, axis.size - 1))
    parts = x.reshape(axis.parts, -1, *x.shape[1:])
    found = hand_on(parts[0], axis, step)
    if axis.parts == 1:
        return jnp.where(first if step == 1 else last, jnp.zeros_like(found), found)
    # The second pieces lie on the devices in reverse, and the last device has the two in the middle of the row.
    back = hand_on(parts[1], axis, -step)
    if step == 1:
        pair = jnp.where(first, jnp.zeros_like(found), found), jnp.where(last, parts[0], back)
    else:
        pair = jnp.where(last, parts[1], found), jnp.where(first, jnp.zeros_like(back), back)
    return jnp.concatenate(pair)


def previous_state(decay: jax.Array, state: jax.Array, axis: SequenceAxis) -> jax.Array:
    """The state before each piece, from what each piece alone does with one: state -> decay * state + its own.

    Shapes: [P, ...] each, for this device's pieces -> [P, ...].
    """

    def through(before: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        decay, state = piece
        return decay * before + state, before

    decays, states = _gather(decay, axis), _gather(state, axis)
    before = jax.lax.scan(through, jnp.zeros_like(states[0]), (decays, states))[1]
    return jnp.concatenate([jax.lax.dynamic_index_in_dim(before, p, keepdims=False) for p in pieces_of(axis)])


def segment_starts(segment_ids: jax.Array, axis: SequenceAxis | None = None) -> jax.Array:
    """Whether each token begins a segment: pieces [P, S], equal ids contiguous -> bool [P, S].

    The first token of a row begins none: it goes on from whatever state the row starts with.
    """
    if axis is None:
        before = segment_ids[:, :1]
    else:
        before = previous_tail(segment_ids, 1, axis)
        rank = jax.lax.axis_index(axis.name)
        # Zig-zag: a device's second piece is never the first of the row.
        first = (rank == 0) & (jnp.arange(segment_ids.shape[0]) < segment_ids.shape[0] // axis.parts)
        before = jnp.where(first[:, None], segment_ids[:, :1], before)
    return segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
