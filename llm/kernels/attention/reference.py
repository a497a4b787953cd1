"""The definition of attention in plain jnp: the whole score matrix at once, [B, H, S, T] in memory."""

import functools

import jax
import jax.numpy as jnp

from llm.kernels.attention.distance_bias import of_pairs


def check_arguments(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int | None,
    query_segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    query_offset: int | jax.Array,
    key_lengths: jax.Array | None,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    distance_bias: jax.Array | None,
    global_keys: jax.Array | None,
) -> None:
    """Raises ValueError where shapes do not fit together as `llm.kernels.attention` says."""
    batch, queries, heads, head_size = query.shape
    keys, kv_heads = key.shape[1:3]
    if key.shape != value.shape or (key.shape[0], key.shape[3]) != (batch, head_size):
        raise ValueError(f'query {query.shape}, key {key.shape} and value {value.shape} do not fit together')
    if heads % kv_heads:
        raise ValueError(f'{kv_heads} key/value heads do not divide {heads} heads')
    if window is not None and window < 1:
        raise ValueError(f'window must be at least 1, not {window}')
    if query_segment_ids is not None and key_segment_ids is not None:
        shapes = query_segment_ids.shape, key_segment_ids.shape
        if shapes != ((batch, queries), (batch, keys)):
            raise ValueError(f'segment ids {shapes[0]}, {shapes[1]} do not fit {query.shape}')
    elif query_segment_ids is not None or key_segment_ids is not None:
        raise ValueError('give both of query_segment_ids and key_segment_ids, or neither')
    if jnp.shape(query_offset) not in ((), (batch,)):
        raise ValueError(f'query_offset must have shape () or ({batch},), not {jnp.shape(query_offset)}')
    if key_lengths is not None and key_lengths.shape != (batch,):
        raise ValueError(f'key_lengths must have shape ({batch},), not {key_lengths.shape}')
    if global_keys is not None and global_keys.shape != (batch, keys):
        raise ValueError(f'global_keys must have shape ({batch}, {keys}), not {global_keys.shape}')
    if distance_bias is not None and not (distance_bias.shape[0] == heads and distance_bias.shape[1] % 2):
        raise ValueError(f'distance_bias must have shape ({heads}, an odd number), not {distance_bias.shape}')
    for name, per_head in (('alibi_slopes', alibi_slopes), ('sinks', sinks)):
        if per_head is not None and per_head.shape != (heads,):
            raise ValueError(f'{name} must have shape ({heads},), not {per_head.shape}')


def query_indices(query_offset: int | jax.Array, queries: int) -> jax.Array:
    """Absolute index of each query: [1, S], or [B, S] if the offset has an entry per row."""
    return jnp.reshape(jnp.asarray(query_offset), (-1, 1)) + jnp.arange(queries)


def attention_mask(
    query_index: jax.Array,
    key_index: jax.Array,
    *,
    causal: bool,
    window: int | None,
    query_segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    key_lengths: jax.Array | None,
    global_keys: jax.Array | None = None,
) -> jax.Array | None:
    """Which query may attend to which key: bool [B or 1, S, T], or None if all may.

    Args:
        query_index: [B or 1, S] absolute indices; key_index: [T].
    """
    distance = query_index[:, :, None] - key_index
    conditions = []
    if causal:
        conditions.append(distance >= 0)
    if window is not None:
        conditions.append((distance if causal else jnp.abs(distance)) < window)
    if global_keys is not None and conditions:
        conditions = [functools.reduce(jnp.logical_and, conditions) | global_keys[:, None, :]]
    if query_segment_ids is not None and key_segment_ids is not None:
        conditions.append(query_segment_ids[:, :, None] == key_segment_ids[:, None, :])
    if key_lengths is not None:
        conditions.append(key_index < key_lengths[:, None, None])
    mask = None
    for condition in conditions:
        mask = condition if mask is None else mask & condition
    return mask


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    soft_cap: float | None,
    query_segment_ids: jax.Array | None,
    key_segment_ids: jax.Array | None,
    query_offset: int | jax.Array,
    key_lengths: jax.Array | None,
    alibi_slopes: jax.Array | None,
    sinks: jax.Array | None,
    distance_bias: jax.Array | None = None,
    global_keys: jax.Array | None = None,
) -> jax.Array:
    """See `llm.kernels.attention.dot_product_attention`, of which this is the meaning."""
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) if group > 1 else x for x in (key, value))
    query_index, key_index = query_indices(query_offset, query.shape[1]), jnp.arange(key.shape[1])

    scores = jnp.einsum('BSHK,BTHK->BHST', query, key, preferred_element_type=dtype) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if alibi_slopes is not None:
        distance = jnp.abs(query_index[:, :, None] - key_index)[:, None]
        scores = scores - alibi_slopes.astype(dtype)[:, None, None] * distance
    if distance_bias is not None:
        scores = scores + of_pairs(distance_bias.astype(dtype), query_index, key_index)
    mask = attention_mask(
        query_index,
        key_index,
        causal=causal,
        window=window,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        key_lengths=key_lengths,
        global_keys=global_keys,
    )
    # The lowest finite number and not -inf: a row without a key would be 0 / 0, in the gradient too.
    shown = scores if mask is None else jnp.where(mask[:, None], scores, jnp.finfo(dtype).min)
    if sinks is None:
        weights = jax.nn.softmax(shown, axis=-1)
    else:
        sink = jnp.broadcast_to(sinks.astype(dtype)[:, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([shown, sink], axis=-1), axis=-1)[..., :-1]
    if mask is not None:
        weights = jnp.where(mask[:, None], weights, 0)
    output = jnp.einsum('BHST,BTHK->BSHK', weights.astype(value.dtype), value, preferred_element_type=dtype)
    return output.astype(query.dtype)
