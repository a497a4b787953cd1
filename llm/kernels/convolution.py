"""Causal depthwise convolution over the last few tokens, as Mamba layers have before their scan."""

import jax
import jax.numpy as jnp

from llm.kernels.attention.sequence_axis import SequenceAxis
from llm.kernels.row_pieces import join, previous_tail, split


def causal_convolution(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    history: jax.Array | None = None,
    sequence_axis: SequenceAxis | None = None,
) -> jax.Array:
    """y[t] = bias + sum over j < W of weight[W - 1 - j] * x[t - j], each channel by itself.

    Channels are any trailing dimensions, written as F. Plain XLA: a sum of shifted products fuses into one loop.

    Args:
        x: [B, S, F].
        weight: [W, F]; the last is for the token itself, as PyTorch's Conv1d has it.
        bias: [F].
        segment_ids: [B, S], equal ids contiguous; tokens of other segments count as zeros.
        history: [B, W - 1, F], the tokens before these; default: zeros.
        sequence_axis: rows are cut along this mesh axis, and S are one device's tokens; then `history` is None.

    Returns:
        [B, S, F] in the dtype of x.
    """
    width = weight.shape[0]
    x = split(x, sequence_axis)
    ids = None if segment_ids is None else split(segment_ids, sequence_axis)
    length = x.shape[1]
    if sequence_axis is not None and width > 1:
        history = previous_tail(x, width - 1, sequence_axis)
        ids_before = None if ids is None else previous_tail(ids, width - 1, sequence_axis)
    else:
        ids_before = None if ids is None else jnp.broadcast_to(ids[:, :1], (ids.shape[0], width - 1))
    if history is None:
        history = jnp.zeros((x.shape[0], width - 1, *x.shape[2:]), x.dtype)
    longer = jnp.concatenate([history.astype(x.dtype), x], axis=1)
    longer_ids = None if ids is None or ids_before is None else jnp.concatenate([ids_before, ids], axis=1)
    weight = weight.astype(x.dtype)
    y = x * weight[width - 1]
    for back in range(1, width):
        term = longer[:, width - 1 - back : width - 1 - back + length]
        if ids is not None and longer_ids is not None:
            same = longer_ids[:, width - 1 - back : width - 1 - back + length] == ids
            term = jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), term, 0)
        y = y + term * weight[width - 1 - back]
    if bias is not None:
        y = y + bias.astype(x.dtype)
    return join(y, sequence_axis)
