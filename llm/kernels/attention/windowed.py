"""Windows with gaps, and global tokens (Longformer, Beltagy et al. 2020, section 3.1), in S (W + N) time and memory.

A window of dilation d reaches W - 1 steps of d tokens. Tokens that are d apart lie side by side once rows are cut into
d rows of every d-th token; there it is a plain window. Attention to N global tokens is worked out apart, and the two
are put together by their log-sum-exps; so every implementation by blocks can do the parts.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llm.errors import UserError
from llm.kernels.attention import Implementation, by_blocks, chip_of, choose, flash
from llm.kernels.attention.masking import Options, Positions


class GlobalTokens(NamedTuple):
    """Tokens that see all of their segment and are seen by all of it, and what they see it with.

    Attributes:
        mask: [B, S] bool.
        places: [B, N], where they are in the row; real: [B, N], whether there are so many.
        query: [B, N, H, K]; key, value: [B, S, G, K], of all tokens, by projections of their own.
    """

    mask: jax.Array
    places: jax.Array
    real: jax.Array
    query: jax.Array
    key: jax.Array
    value: jax.Array


def find(mask: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Index of the first `most` tokens that are set, and whether there are so many: bool [B, S] -> [B, N] twice."""
    length = mask.shape[1]
    left, _ = jax.lax.top_k(jnp.where(mask, length - jnp.arange(length), 0), min(most, length))
    return jnp.where(left > 0, length - left, 0), left > 0


def pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """The tokens at `index`: [B, S, ...] and [B, N] -> [B, N, ...]."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), axis=1)


def _implementation(implementation: Implementation, device: jax.Device, queries: int) -> flash.Implementation:
    chosen = choose(implementation, device, queries)
    if chosen == 'cudnn':
        raise UserError(
            'cannot do windows with gaps or global tokens', where="attention 'cudnn'", fix="Use 'pallas_gpu' or 'auto'."
        )
    chosen = 'chunked' if chosen == 'reference' else chosen
    return by_blocks(chosen, chip_of(device, 'gpu' if chosen == 'pallas_gpu' else 'tpu'))


def _every(x: jax.Array, dilation: int, pad: int = 0) -> jax.Array:
    """Rows of every `dilation`-th token: [B, S, ...] -> [B * dilation, ceil(S / dilation), ...]."""
    more = -x.shape[1] % dilation
    x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2), constant_values=pad)
    parts = x.reshape(x.shape[0], -1, dilation, *x.shape[2:]).swapaxes(1, 2)
    return parts.reshape(-1, *parts.shape[2:])


def _together(x: jax.Array, dilation: int, length: int, axis: int) -> jax.Array:
    """The inverse of `_every`, with tokens along `axis`."""
    x = jnp.moveaxis(x, axis, 1)
    parts = x.reshape(-1, dilation, *x.shape[1:]).swapaxes(1, 2)
    return jnp.moveaxis(parts.reshape(parts.shape[0], -1, *parts.shape[3:])[:, :length], 1, axis)


def windowed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    causal: bool,
    window: int,
    dilation: int = 1,
    soft_cap: float | None = None,
    segment_ids: jax.Array | None = None,
    global_tokens: GlobalTokens | None = None,
    implementation: Implementation = 'auto',
    device: jax.Device | None = None,
) -> jax.Array:
    """Self-attention in windows: token i sees token t where i - t is a multiple m of the dilation, 0 <= m < window.

    Without `causal` |m| < window. Besides, all tokens see the global ones of their segment, and those see all of it.

    Shapes: query [B, S, H, K], key and value [B, S, G, K] -> [B, S, H, K].

    Args:
        segment_ids: [B, S], not negative. global_tokens: not with `causal`.
        soft_cap, implementation, device: see dot_product_attention.
    """
    if causal and global_tokens is not None:
        raise ValueError('a causal window has no global tokens')
    device = jax.devices()[0] if device is None else device
    length = query.shape[1]
    ids = key_ids = segment_ids
    if ids is None and (global_tokens is not None or length % dilation):
        ids = key_ids = jnp.ones(query.shape[:2], jnp.int32)
    if global_tokens is not None and ids is not None:
        key_ids = jnp.where(global_tokens.mask, -1, ids)  # they are seen apart
    attend = functools.partial(flash.attention_and_sums, _implementation(implementation, device, length))
    options = Options(scale, causal, window, soft_cap, 0)
    where = Positions()
    if ids is not None and key_ids is not None:
        where = Positions(_every(ids, dilation, -2), _every(key_ids, dilation, -2))
    q, k, v = (_every(x, dilation) for x in (query, key, value))
    output, total = attend(options, flash.Inputs(q, k, v, where, None))
    output, total = _together(output, dilation, length, 1), _together(total, dilation, length, 2)
    if global_tokens is None or ids is None:
        return output
    index, real = global_tokens.places, global_tokens.real
    own = jnp.where(real, pick(ids, index), -1)
    options = Options(scale, False, None, soft_cap, 0)
    seen = flash.Inputs(query, pick(key, index), pick(value, index), Positions(ids, own), None)
    output = flash.joined([(output, total), attend(options, seen)])
    seeing = flash.Inputs(global_tokens.query, global_tokens.key, global_tokens.value, Positions(own, ids), None)
    theirs = flash.attention(_implementation(implementation, device, index.shape[1]), options, seeing)
    rows = jnp.arange(query.shape[0])[:, None]
    return output.at[rows, jnp.where(real, index, length)].set(theirs, mode='drop')


def windowed_attention_to_cache(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_index: jax.Array,
    *,
    scale: float,
    window: int,
    dilation: int = 1,
    soft_cap: float | None = None,
) -> jax.Array:
    """Causal windows for a few queries in a long cache, of which only the keys in the window are read.

    Shapes: query [B, S, H, K], key and value [B, T, G, K], query_index [B or 1, S] -> [B, S, H, K]. Arguments: see
    windowed_attention.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    index = query_index[..., None] - dilation * jnp.arange(window)
    index = jnp.broadcast_to(index, (query.shape[0], *index.shape[1:]))
    rows = jnp.arange(query.shape[0])[:, None, None]
    key, value = (x[rows, jnp.maximum(index, 0)] for x in (key, value))
    grouped = query.reshape(*query.shape[:2], key.shape[3], -1, query.shape[-1])
    scores = jnp.einsum('BSGRK,BSTGK->BSGRT', grouped, key, preferred_element_type=dtype) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where((index >= 0)[:, :, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum('BSGRT,BSTGK->BSGRK', weights, value, preferred_element_type=dtype)
    return mixed.reshape(query.shape).astype(query.dtype)
