"""Softmax attention: one function, several implementations that agree with `reference.py`."""

from typing import Literal, get_args

import jax

from llm.kernels.attention import chunked, reference

Implementation = Literal['auto', 'chunked', 'reference']


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
    alibi_slopes: jax.Array | None = None,
    implementation: Implementation = 'auto',
) -> jax.Array:
    """Multi-head, grouped-query or multi-query attention (Vaswani et al. 2017, eq. 1; Ainslie et al. 2023).

    Query s of a row has absolute index i = query_offset + s, key t has index t. The query attends to the key iff
    all of these hold: t <= i if `causal`; i - t < window (without `causal` |i - t| < window); equal segment ids.
    Scores are `scale * q.k`, then `soft_cap * tanh(score / soft_cap)` (Gemma 2), then minus `slope * |i - t|` (ALiBi,
    Press et al. 2022); softmax runs in at least fp32. A query that may attend to no key gets zeros.

    Args:
        query: [B, S, H, K].
        key: [B, T, G, K]; G divides H, and head h reads key/value head h // (H / G).
        value: [B, T, G, K].
        scale: usually 1 / sqrt(K).
        query_segment_ids: [B, S] integers, with key_segment_ids [B, T]; give both or neither.
        query_offset: absolute index of the first query: an integer, or an integer array [] or [B].
        alibi_slopes: [H], one positive slope per head.
        implementation: 'auto' takes the fastest one that supports these arguments on this backend.

    Returns:
        [B, S, H, K] in the dtype of `query`.
    """
    reference.check_arguments(
        query,
        key,
        value,
        window=window,
        query_segment_ids=query_segment_ids,
        key_segment_ids=key_segment_ids,
        query_offset=query_offset,
        alibi_slopes=alibi_slopes,
    )
    if implementation not in get_args(Implementation):
        raise ValueError(f'no attention implementation is called {implementation!r}')
    if implementation == 'auto':
        # One token at a time (decoding) has nothing to cut up.
        implementation = 'chunked' if jax.default_backend() == 'cpu' and query.shape[1] > 1 else 'reference'
    attend = {'chunked': chunked, 'reference': reference}[implementation].dot_product_attention
    return attend(
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
        alibi_slopes=alibi_slopes,
    )
