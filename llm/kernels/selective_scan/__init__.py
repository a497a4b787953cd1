"""The selective scan of Mamba (Gu and Dao 2023): a linear recurrence of each channel, whose rates follow the input."""

import jax
import jax.numpy as jnp

from llm.kernels.attention.sequence_axis import SequenceAxis
from llm.kernels.row_pieces import join, previous_state, segment_starts, split
from llm.kernels.scan_dispatch import Implementation, implementation_of
from llm.kernels.selective_scan import chunked, pallas_tpu, reference

_MODULES = {'chunked': chunked, 'pallas_tpu': pallas_tpu, 'reference': reference}


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    sequence_axis: SequenceAxis | None = None,
    implementation: Implementation = 'auto',
    device: jax.Device | None = None,
) -> tuple[jax.Array, jax.Array]:
    """At each token in turn h = exp(dt a) h + dt x b and y = c . h (Gu and Dao 2023, eq. 2, discretised as in 3.3).

    Softplus, skip connection and gate are left to the caller: XLA fuses them with what comes before and after. A token
    with dt = 0 leaves the state as it is, which is how padding is passed over.

    Args:
        x: [B, S, F].
        dt: [B, S, F], at least 0.
        a: [F, N], negative.
        b, c: [B, S, N].
        segment_ids: [B, S], equal ids contiguous; the state is zero where a segment begins.
        initial_state: [B, N, F], which the first token goes on from; default: zeros.
        sequence_axis: rows are cut along this mesh axis, and S are one device's tokens (inside `jax.shard_map`); then
            `initial_state` is None. See `llm.kernels.row_pieces`.
        implementation: 'auto' takes the one made for `device`.
        device: one of those that will run this; default: the first there is.

    Returns:
        y [B, S, F] in the dtype of x, and the state after the last token [B, N, F] in at least fp32 (of the device's
        last piece of each row).
    """
    device = jax.devices()[0] if device is None else device
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    output_dtype = x.dtype
    a = a.astype(dtype).T
    x, dt, b, c = (split(each, sequence_axis) for each in (x, dt, b, c))
    rows, length, channels = x.shape
    if segment_ids is None:
        starts = jnp.zeros((rows, length), bool)
    else:
        starts = segment_starts(split(segment_ids, sequence_axis), sequence_axis)
    initial = jnp.zeros((rows, a.shape[0], channels), dtype) if initial_state is None else initial_state.astype(dtype)
    y, final = implementation_of('selective_scan', _MODULES, implementation, device, length)(
        x, dt.astype(dtype), a, b, c, starts, initial
    )
    if sequence_axis is not None:
        if initial_state is not None:
            raise ValueError('a row that is cut along a mesh axis has no initial state')
        going_on = jnp.cumsum(starts, axis=1) == 0
        total = jnp.cumsum(dt.astype(dtype), axis=1)
        decay = jnp.where(going_on[:, -1, None, None], jnp.exp(total[:, -1, None] * a), 0)
        before = previous_state(decay, final, sequence_axis)
        y = y + _carried(before, total, a, c.astype(dtype), going_on)
        final = final + decay * before
        final = final.reshape(sequence_axis.parts, -1, *final.shape[1:])[-1]
    return join(y, sequence_axis).astype(output_dtype), final


@jax.checkpoint
def _carried(before: jax.Array, total: jax.Array, a: jax.Array, c: jax.Array, going_on: jax.Array) -> jax.Array:
    """What a state before the row adds to y, [B, S, F]: it has decayed by exp(a sum of dt) when a token reads it."""
    states = jnp.exp(total[:, :, None] * a) * before[:, None] * c[..., None]
    return jnp.where(going_on[..., None], jnp.sum(states, axis=2), 0)
