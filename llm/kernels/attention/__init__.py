"""Softmax attention: one function, several implementations that agree with `reference.py`."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from llm.errors import UserError
from llm.kernels.attention import chunked, cudnn, flash, pallas_gpu, pallas_tpu, reference, sequence
from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.sequence_axis import SequenceAxis

# Rows of so many tokens are as T5's: their scores fit, and accelerators are slow at one block of a row after the other.
_SHORT = 1024

Implementation = Literal['auto', 'chunked', 'cudnn', 'pallas_gpu', 'pallas_tpu', 'reference']


@functools.cache
def by_blocks(implementation: Implementation, chip: str | None) -> flash.Implementation:
    """The forward and backward functions of an implementation.

    Args:
        implementation: 'chunked', 'pallas_gpu' or 'pallas_tpu'.
        chip: what will run it, as `chip_of` says; None for what the kernel is not made for, where it is interpreted.
    """
    if implementation == 'chunked':
        return flash.Implementation(chunked.forward, chunked.backward)
    if implementation == 'pallas_gpu':
        return flash.Implementation(
            functools.partial(pallas_gpu.forward, gpu=chip), functools.partial(pallas_gpu.backward, gpu=chip)
        )
    return flash.Implementation(
        functools.partial(pallas_tpu.forward, tpu=chip), functools.partial(pallas_tpu.backward, tpu=chip)
    )


def chip_of(device: jax.Device, platform: str) -> str | None:
    """The kind of a TPU or the compute capability of a GPU, as '9.0'; None if `device` is not of `platform`."""
    if device.platform != platform:
        return None
    return device.device_kind if platform == 'tpu' else str(device.compute_capability)


def choose(
    implementation: Implementation, device: jax.Device, queries: int, *, bias: bool = False, global_keys: bool = False
) -> Implementation:
    """What 'auto' means on `device` for this many queries; any other choice as it is.

    Args:
        bias, global_keys: whether there is one; then 'auto' is 'reference' or 'chunked', on every device.

    Raises:
        UserError: 'pallas_gpu' is asked for on a GPU that it cannot run on, or what is asked for cannot do these.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f'no attention implementation is called {implementation!r}')
    gpu = chip_of(device, 'gpu')
    if implementation == 'pallas_gpu' and gpu is not None:  # without a GPU it is interpreted
        pallas_gpu.check_gpu(implementation, gpu)
    for what, there in (('distance_bias', bias), ('global_keys', global_keys)):
        if there and implementation not in ('auto', 'reference', 'chunked'):
            raise UserError(f'cannot do {what}', where=f'attention {implementation!r}', fix="Use 'chunked' or 'auto'.")
    if implementation != 'auto':
        return implementation
    if bias and device.platform != 'cpu' and queries <= _SHORT:
        return 'reference'
    if bias or global_keys:
        return 'reference' if queries == 1 else 'chunked'
    # One token at a time (decoding) has nothing to cut up.
    if queries == 1:
        return 'reference'
    if device.platform == 'tpu':
        return 'pallas_tpu'
    return 'pallas_gpu' if gpu is not None and pallas_gpu.runs_on(gpu) else 'chunked'


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    query_segment_ids: jax.Array | None = None,
    key_segment_ids: jax.Array | None = None,
    query_offset: int | jax.Array = 0,
    key_lengths: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    distance_bias: jax.Array | None = None,
    global_keys: jax.Array | None = None,
    sequence_axis: SequenceAxis | None = None,
    implementation: Implementation = 'auto',
    device: jax.Device | None = None,
) -> jax.Array:
    """Multi-head, grouped-query or multi-query attention (Vaswani et al. 2017, eq. 1; Ainslie et al. 2023).

    Query s of a row has absolute index i = query_offset + s, key t has index t. The query attends to the key iff
    all of these hold: t <= i if `causal`; i - t < window (without `causal` |i - t| < window); equal segment ids;
    t < key_lengths. Keys that are global are seen whatever the first two say. Scores are `scale * q.k`, then
    `soft_cap * tanh(score / soft_cap)` (Gemma 2), then minus `slope * |i - t|` (ALiBi, Press et al. 2022), then plus
    the bias of t - i (T5, Raffel et al. 2020, section 2.1); softmax runs in at least fp32, over these and, with
    `sinks`, one more score per head whose value is zero (gpt-oss; Miller 2023). A query that may attend to no key gets
    zeros.

    Args:
        query: [B, S, H, K].
        key: [B, T, G, K]; G divides H, and head h reads key/value head h // (H / G).
        value: [B, T, G, K].
        scale: usually 1 / sqrt(K).
        query_segment_ids: [B, S] integers, with key_segment_ids [B, T]; give both or neither.
        query_offset: absolute index of the first query: an integer, or an integer array [] or [B].
        key_lengths: [B] integers; keys from there on are padding.
        alibi_slopes: [H], one positive slope per head; no gradient flows to them.
        sinks: [H].
        distance_bias: [H, 2 M + 1], for t - i from -M to M; what is farther away has that of M. By 'reference' and
            'chunked' alone.
        global_keys: [B, T] bool: the prefix of a prefix language model (Raffel et al. 2020, section 3.2.1), global
            tokens (Beltagy et al. 2020, section 3.1). By 'reference' and 'chunked' alone.
        sequence_axis: rows are cut along this mesh axis, and S = T tokens are one device's piece (inside
            `jax.shard_map`); then query_offset is 0 and key_lengths None. See `sequence`.
        implementation: 'auto' takes the one made for `device`. Pieces of rows need one that goes by blocks:
            'reference' means 'chunked' there. 'cudnn' cannot do all of this; see `cudnn`.
        device: one of those that will run this; default: the first there is.

    Returns:
        [B, S, H, K] in the dtype of `query`.

    Raises:
        UserError: the implementation that is asked for cannot do this, or not on this device.
    """
    reference.check_arguments(
        query,
        key,
        value,
        window=window,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_offset=query_offset,
        key_lengths=key_lengths,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        distance_bias=distance_bias,
        global_keys=global_keys,
    )
    device = jax.devices()[0] if device is None else device
    present = {'bias': distance_bias is not None, 'global_keys': global_keys is not None}
    implementation = choose(implementation, device, query.shape[1], **present)
    slopes = None
    if alibi_slopes is not None:
        dtype = jnp.promote_types(query.dtype, jnp.float32)
        slopes = jax.lax.stop_gradient(jnp.asarray(alibi_slopes)).astype(dtype)
    if sequence_axis is not None:
        if implementation == 'cudnn':
            raise UserError(
                'cannot do rows that are cut along a mesh axis',
                where=pallas_gpu.where('cudnn'),
                fix="Use 'pallas_gpu' or 'auto'.",
            )
        if key_lengths is not None or not (isinstance(query_offset, int) and query_offset == 0):
            raise ValueError('a row that is cut along a mesh axis has no query_offset and no key_lengths')
        if global_keys is not None:
            raise UserError(
                'rows that are cut along a mesh axis have no global keys',
                where='MeshConfig.sequence',
                fix='Use 1.',
            )
        query_offset = jnp.zeros((), jnp.int32)  # each device has its own
        implementation = 'chunked' if implementation == 'reference' else implementation
    if implementation == 'reference':
        return reference.dot_product_attention(
            query,
            key,
            value,
            scale=scale,
            causal=causal,
            window=window,
            soft_cap=soft_cap,
            query_segment_ids=query_segment_ids,
            key_segment_ids=key_segment_ids,
            query_offset=query_offset,
            key_lengths=key_lengths,
            alibi_slopes=slopes,
            sinks=sinks,
            distance_bias=distance_bias,
            global_keys=global_keys,
        )
    static, traced = (query_offset, None) if isinstance(query_offset, int) else (None, query_offset)
    positions = Positions(query_segment_ids, key_segment_ids, traced, key_lengths, slopes, global_keys)
    options = Options(scale, causal, window, soft_cap, static, global_keys is not None)
    inputs = jax.tree.map(jnp.asarray, flash.Inputs(query, key, value, positions, sinks, distance_bias))
    if implementation == 'cudnn':
        return cudnn.attention(options, inputs, gpu=chip_of(device, 'gpu'))
    chip = chip_of(device, 'gpu' if implementation == 'pallas_gpu' else 'tpu')
    attend: Any = flash.attention if sequence_axis is None else functools.partial(sequence.attention, sequence_axis)
    output: jax.Array = attend(by_blocks(implementation, chip), options, inputs)
    return output
