"""Attention over rows that are cut into pieces along a mesh axis, one of which each device holds.

Three ways, for use inside `jax.shard_map`; all are exact, for packed rows, grouped heads, windows, caps and sinks too.

- 'ring' (Liu et al. 2023, "Ring Attention"): keys and values travel round the devices while queries stay. Memory per
  device falls with the number of devices. See `ring`.
- 'all_gather' (Llama 3, section 3.3.2): every device gathers all keys and values, few if heads are grouped.
- 'ulysses' (Jacobs et al. 2023, DeepSpeed-Ulysses): two all-to-alls trade the cut through tokens for one through heads.
  Moves least for many heads on few devices; the number of heads bounds the number of devices.

With a causal mask a device that holds the last tokens would have most of the work. So for 'ring' and 'all_gather'
tokens are laid out in zig-zag: of 2 n chunks, device i of n holds chunks i and 2 n - 1 - i (`zigzag_order`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from llm.kernels.attention import flash
from llm.kernels.attention.flash import Inputs
from llm.kernels.attention.masking import Options
from llm.kernels.attention.ring import ring_attention
from llm.kernels.attention.sequence_axis import SequenceAxis, in_order, pieces_of


def attention(
    axis: SequenceAxis,
    implementation: flash.Implementation,
    options: Options,
    inputs: Inputs,
) -> jax.Array:
    """This device's part of attention over whole rows; S = T are the device's tokens.

    Raises:
        ValueError: the devices cannot share the heads ('ulysses').
    """
    if inputs.bias is not None:  # the one way that knows the index of queries without a part in the implementation
        return _gathered(axis, implementation, options, inputs)
    if axis.method == 'ring':
        return ring_attention(axis, implementation, options, inputs)
    if axis.method == 'all_gather':
        return _gathered(axis, implementation, options, inputs)
    return _ulysses(axis, implementation, options, inputs)


def _gathered(
    axis: SequenceAxis,
    implementation: flash.Implementation,
    options: Options,
    inputs: Inputs,
) -> jax.Array:
    (query, key, value, positions), sinks = inputs.arrays, inputs.sinks
    length = query.shape[1] // axis.parts
    key, value = in_order(key, axis), in_order(value, axis)
    key_ids = None if positions.key_ids is None else in_order(positions.key_ids, axis)
    outputs = []
    for part, piece in enumerate(pieces_of(axis)):
        mine = slice(part * length, (part + 1) * length)
        ids = None if positions.query_ids is None else positions.query_ids[:, mine]
        where = dataclasses.replace(positions, query_ids=ids, key_ids=key_ids, offset=piece * length)
        mine_of = Inputs(query[:, mine], key, value, where, sinks, inputs.bias)
        outputs.append(flash.attention(implementation, options, mine_of))
    return jnp.concatenate(outputs, axis=1)


def _ulysses(
    axis: SequenceAxis,
    implementation: flash.Implementation,
    options: Options,
    inputs: Inputs,
) -> jax.Array:
    (query, key, value, positions), sinks = inputs.arrays, inputs.sinks
    heads, groups = query.shape[2], key.shape[2]
    if heads % axis.size:
        raise ValueError(f'{heads} heads cannot be divided over {axis.size} devices')
    # Each device needs the key/value heads of its query heads: where they are fewer than devices, they are repeated.
    repeats = axis.size // np.gcd(groups, axis.size)
    key, value = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (key, value))
    query, key, value = (
        jax.lax.all_to_all(x, axis.name, split_axis=2, concat_axis=1, tiled=True) for x in (query, key, value)
    )
    share = heads // axis.size
    first = jax.lax.axis_index(axis.name) * share

    def mine(per_head: jax.Array | None) -> jax.Array | None:
        return None if per_head is None else jax.lax.dynamic_slice_in_dim(per_head, first, share)

    query_ids, key_ids = (
        None if ids is None else in_order(ids, axis) for ids in (positions.query_ids, positions.key_ids)
    )
    where = dataclasses.replace(positions, query_ids=query_ids, key_ids=key_ids, slopes=mine(positions.slopes))
    options = dataclasses.replace(options, offset=0)
    output = flash.attention(implementation, options, Inputs(query, key, value, where, mine(sinks)))
    return jax.lax.all_to_all(output, axis.name, split_axis=1, concat_axis=2, tiled=True)
