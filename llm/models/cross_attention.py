"""Attention from the tokens of a decoder to the output of an encoder (Vaswani et al. 2017, section 3.2.3)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm.models.attention import Attention, AttentionConfig
from llm.models.context import Cache, Context
from llm.parallel.sharding import sequence_cut


class CrossAttention(Attention):
    """Queries from the row, keys and values from Context.memory. Positions play no part, nor do causal and window.

    The parameters are those of self-attention. Shapes: x [B, S, D], memory [B, T, D] -> [B, S, D].
    """

    def __init__(self, config: AttentionConfig, d_model: int) -> None:
        super().__init__(dataclasses.replace(config, causal=False, window=None), d_model, 'none')

    def __call__(  # type: ignore[override]
        self, x: jax.Array, context: Context, cache: Cache | None = None, repeat: jax.Array | int = 0
    ) -> jax.Array:
        """Attend to the memory or, with `cache`, to the `repeat`-th entry of what `keys_and_values` gave for it."""
        query = checkpoint_name(self._project(x, self.query, self.query_bias, self.query_norm, 'heads'), 'query')
        if cache is not None:
            key, value = (cache[name][repeat].astype(x.dtype) for name in ('key', 'value'))
        elif context.memory is not None:
            entry = self.keys_and_values(context.memory)
            key, value = (checkpoint_name(entry[name], name) for name in ('key', 'value'))
        else:
            raise ValueError('cross-attention needs a memory or a cache of its keys and values')
        ids, memory_ids = context.segment_ids, context.memory_segment_ids
        if memory_ids is None:
            ids = None
        elif ids is None:
            ids = jnp.ones(x.shape[:2], memory_ids.dtype)
        cut = sequence_cut() if cache is None else None
        mixed = self._attend(
            query, key, value, Context(segment_ids=ids), cut, memory_segment_ids=memory_ids, whole_keys=True
        )
        return self._output(mixed)

    def keys_and_values(self, memory: jax.Array) -> Cache:
        """What there is to attend to: memory [B, T, D] -> {'key', 'value'}, each [B, T, G, K]."""
        return {
            'key': self._project(memory, self.key, self.key_bias, self.key_norm, 'kv_heads'),
            'value': self._project(memory, self.value, self.value_bias, None, 'kv_heads'),
        }
