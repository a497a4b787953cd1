"""State space duality, the recurrence of Mamba-2 (Dao and Gu 2024): one decay per head, so chunks are products."""

import jax
import jax.numpy as jnp

from llm.kernels.attention.sequence_axis import SequenceAxis
from llm.kernels.row_pieces import join, previous_state, segment_starts, split
from llm.kernels.scan_dispatch import Implementation, implementation_of
from llm.kernels.ssd import chunked, pallas_tpu, reference

_MODULES = {'chunked': chunked, 'pallas_tpu': pallas_tpu, 'reference': reference}


def ssd(
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
    """At each token in turn h = exp(dt a) h + dt x b^T and y = h c, a matrix h per head (Dao and Gu 2024, section 3).

    Softplus, skip connection and gate are left to the caller: XLA fuses them with what comes before and after. A token
    with dt = 0 leaves the state as it is, which is how padding is passed over.

    Args:
        x: [B, S, H, K].
        dt: [B, S, H], at least 0.
        a: [H], negative.
        b, c: [B, S, G, N]; G divides H, and head h reads group h // (H / G).
        segment_ids: [B, S], equal ids contiguous; the state is zero where a segment begins.
        initial_state: [B, H, K, N], which the first token goes on from; default: zeros.
        sequence_axis: rows are cut along this mesh axis, and S are one device's tokens (inside `jax.shard_map`); then
            `initial_state` is None. See `llm.kernels.row_pieces`.
        implementation: 'auto' takes the one made for `device`.
        device: one of those that will run this; default: the first there is.

    Returns:
        y [B, S, H, K] in the dtype of x, and the state after the last token [B, H, K, N] in at least fp32 (of the
        device's last piece of each row).
    """
    device = jax.devices()[0] if device is None else device
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    output_dtype = x.dtype
    a, dt = a.astype(dtype), dt.astype(dtype)
    x, dt, b, c = (split(each, sequence_axis) for each in (x, dt, b, c))
    rows, length, heads, size = x.shape
    if segment_ids is None:
        starts = jnp.zeros((rows, length), bool)
    else:
        starts = segment_starts(split(segment_ids, sequence_axis), sequence_axis)
    shape = (rows, heads, size, b.shape[-1])
    initial = jnp.zeros(shape, dtype) if initial_state is None else initial_state.astype(dtype)
    y, final = implementation_of('ssd', _MODULES, implementation, device, length)(x, dt, a, b, c, starts, initial)
    if sequence_axis is not None:
        if initial_state is not None:
            raise ValueError('a row that is cut along a mesh axis has no initial state')
        going_on = jnp.cumsum(starts, axis=1) == 0
        kept = jnp.where(going_on[..., None], jnp.exp(jnp.cumsum(dt, axis=1) * a), 0)
        decay = kept[:, -1, :, None, None]
        before = previous_state(decay, final, sequence_axis)
        # What the state before the piece adds: c reads what is left of it.
        grouped = before.reshape(rows, b.shape[2], -1, size, b.shape[-1]).astype(c.dtype)
        read = jnp.einsum('BSGN,BGHKN->BSGHK', c, grouped, preferred_element_type=dtype)
        y = y + kept[..., None] * read.reshape(y.shape)
        final = final + decay * before
        final = final.reshape(sequence_axis.parts, -1, *final.shape[1:])[-1]
    return join(y, sequence_axis).astype(output_dtype), final
