"""What every layer sees besides the residual stream, and the cache that decoding carries from call to call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from llm.models.position import Rotary

Cache = dict[str, Any]

# Logical axes of a cache's array along which tokens are stored (a recurrent state has none), and those of an encoder.
CACHED_TOKENS = 'cached_tokens'
MEMORY_TOKENS = 'memory_tokens'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """Shared by all layers of one pass over [B, S] tokens.

    Attributes:
        segment_ids: [B, S] or None; tokens attend within their own segment only.
        rotary: cosines and sines by Rotary, at the positions of the tokens.
        offset: row index of the first token, [] or [B], when decoding with a cache. Otherwise None, for 0: a number
            would be traced by scans and recomputation, and kernels could not rely on it.
        token_index: [S], index in the row of each token where they do not lie in order; None if they do.
        token_ids: [B, S], for hash layers.
        token_weights: [B, S], what each token counts for in the auxiliary losses of routers, 0 on padding; None for 1,
            and 0 in segment 0.
        lengths: [B], how many tokens of each row are real when decoding with a cache; those after them are padding,
            which a recurrent state must not see. None: all.
        distance_bias: [H, 2 M + 1], for position 'relative'; see RelativeBias.
        global_keys: [B, T] bool or None; tokens that all of their segment see, whatever causal and window say.
        global_tokens: [B, S] bool or None; tokens that see all of their segment too, in layers of LongAttention.
        before: [B], tokens of the row's first segment that came before the row: how much of RecurrentAttention's memory
            is of it.
        memory: [B, T, D], what cross-attention reads: the output of the encoder; memory_segment_ids: [B, T] or None,
            a segment reads the one of its own number. Not needed where a cache holds the keys and values.
    """

    segment_ids: jax.Array | None = None
    rotary: dict[Rotary, tuple[jax.Array, jax.Array]] = dataclasses.field(default_factory=dict)
    offset: jax.Array | int | None = None
    token_index: jax.Array | None = None
    token_ids: jax.Array | None = None
    token_weights: jax.Array | None = None
    lengths: jax.Array | None = None
    distance_bias: jax.Array | None = None
    global_keys: jax.Array | None = None
    global_tokens: jax.Array | None = None
    before: jax.Array | None = None
    memory: jax.Array | None = None
    memory_segment_ids: jax.Array | None = None


def write_cache(cache: jax.Array, new: jax.Array, repeat: jax.Array | int, offset: jax.Array | int | None) -> jax.Array:
    """Store `new` at rows `offset`, `offset` + 1, ... of entry `repeat` of a stacked cache.

    Shapes: cache [L, B, T, ...], new [B, S, ...], repeat [], offset [] or [B] -> cache. With one offset per row,
    whatever would fall past the end T is dropped; with a common one, the caller keeps offset + S within T.
    """
    new = new.astype(cache.dtype)
    offset = 0 if offset is None else offset
    if jnp.ndim(offset) == 0:
        start = [jnp.asarray(index, jnp.int32) for index in (repeat, 0, offset, *(0,) * (new.ndim - 2))]
        return jax.lax.dynamic_update_slice(cache, new[None], start)
    batch, length = new.shape[:2]
    columns = jnp.asarray(offset)[:, None] + jnp.arange(length)
    return cache.at[repeat, jnp.arange(batch)[:, None], columns].set(new, mode='drop')
