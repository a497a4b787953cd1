"""Windows with gaps and global tokens against a full mask, in value and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from llm.errors import UserError
from llm.kernels.attention.sequence_axis import SequenceAxis, zigzag_order
from llm.kernels.attention.windowed import (
    GlobalTokens,
    find,
    pick,
    windowed_attention,
    windowed_attention_to_cache,
)

B, S, H, G, K, W, N = 2, 24, 4, 2, 4, 3, 3
IDS = np.array([[1] * 9 + [2] * 10 + [0] * 5, [1] * S])
MASK = np.zeros((B, S), bool)
MASK[0, [0, 9]] = MASK[1, [0, 4, 20]] = True


def draw(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


def arrays(dtype):
    """Query, key and value for all tokens, then those of global ones."""
    heads = (H, G, G) * 2
    return [jnp.asarray(draw(B, S, many, K, seed=i), dtype) for i, many in enumerate(heads)]


def masked(query, key, value, allowed):
    """Attention by all scores: allowed [B, S, T]."""
    key, value = (jnp.repeat(x, H // G, axis=2) for x in (key, value))
    scores = jnp.einsum('BSHK,BTHK->BHST', query, key) * 0.5
    weights = jax.nn.softmax(jnp.where(allowed[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum('BHST,BTHK->BSHK', weights, value)


def by_mask(parts, dilation, causal, has_global):
    """What it means (section 3.1): a full mask for all tokens, and one for global tokens."""
    query, key, value, *of_global = parts
    distance = np.arange(S)[:, None] - np.arange(S)
    steps, rest = np.divmod(distance, dilation)
    near = (rest == 0) & (np.abs(steps) < W) & ((distance >= 0) | (not causal))
    same = IDS[:, :, None] == IDS[:, None, :]
    if not has_global:
        return masked(query, key, value, near & same)
    output = masked(query, key, value, (near | MASK[:, None, :]) & same)
    return jnp.where(MASK[..., None, None], masked(*of_global, same), output)


def ours(parts, dilation, causal, has_global, implementation):
    return on_part([*parts, *map(jnp.asarray, (IDS, MASK))], dilation, causal, has_global, implementation)


def on_part(parts, dilation, causal, has_global, implementation, axis=None):
    """Of all tokens or, within `axis`, of one device's."""
    query, key, value, global_query, *global_sides, ids, mask = parts
    tokens = None
    if has_global:
        rows = mask if axis is None else jax.lax.all_gather(mask, axis.name, axis=1, tiled=True)
        places, real = find(rows, N)
        tokens = GlobalTokens(mask, places, real, pick(global_query, places, axis), *global_sides)
    return windowed_attention(
        query,
        key,
        value,
        scale=0.5,
        causal=causal,
        window=W,
        dilation=dilation,
        segment_ids=ids,
        global_tokens=tokens,
        implementation=implementation,
        sequence_axis=axis,
    )


def shared(parts, axis, *setting):
    """Of rows that devices share: each has a piece or, in zig-zag, two."""
    mesh = Mesh(np.array(jax.devices()[: axis.size]), (axis.name,))
    order = zigzag_order(S, axis.size) if axis.zigzag else np.arange(S)
    by_token = PartitionSpec(None, axis.name)
    output = jax.shard_map(
        lambda parts: on_part(parts, *setting, 'chunked', axis),
        mesh=mesh,
        in_specs=(by_token,),
        out_specs=by_token,
        check_vma=False,
    )([x[:, order] for x in (*parts, IDS, MASK)])
    return output[:, np.argsort(order)]


def value_and_gradients(function, parts):
    weight = jnp.asarray(draw(B, S, H, K, seed=9), parts[0].dtype)
    output, pullback = jax.vjp(jax.jit(function), parts)
    return output, *pullback(weight)[0]


@pytest.mark.parametrize(
    ('dilation', 'causal', 'has_global', 'implementation'),
    [
        (1, False, True, 'chunked'),
        (5, False, True, 'chunked'),
        (4, True, False, 'chunked'),
        (2, False, True, 'pallas_tpu'),
    ],
)
def test_is_attention_under_a_full_mask(dilation, causal, has_global, implementation):
    setting = (dilation, causal, has_global)
    double = implementation == 'chunked'
    with jax.enable_x64(double):
        parts = arrays(jnp.float64 if double else jnp.float32)
        expected = value_and_gradients(lambda parts: by_mask(parts, *setting), parts)
        actual = value_and_gradients(lambda parts: ours(parts, *setting, implementation), parts)
    for exact, found in zip(expected, actual, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-9 if double else 2e-5)


# Pieces of 3 and of 6 tokens, and windows that reach 10 and 8 of them to a side.
@pytest.mark.parametrize(
    ('axis', 'setting'),
    [
        (SequenceAxis('sequence', 4, 'ring', zigzag=True), (5, False, True)),
        (SequenceAxis('sequence', 4, 'ring', zigzag=False, permutes=False), (4, True, False)),
    ],
)
def test_pieces_of_rows_give_what_whole_rows_give(axis, setting):
    with jax.enable_x64():
        parts = arrays(jnp.float64)
        expected = value_and_gradients(lambda parts: by_mask(parts, *setting), parts)
        actual = value_and_gradients(lambda parts: shared(parts, axis, *setting), parts)
    for exact, found in zip(expected, actual, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-9)


def test_a_cache_is_read_as_the_row_is():
    query, key, value, *_ = arrays(jnp.float32)
    settings = {'scale': 0.5, 'window': W, 'dilation': 2, 'soft_cap': 1.5}
    whole = windowed_attention(query, key, value, causal=True, **settings)
    index = jnp.asarray([[5, 6], [20, 21]])
    some = windowed_attention_to_cache(pick(query, index), key, value, index, **settings)
    np.testing.assert_allclose(some, pick(whole, index), rtol=0, atol=1e-5)


def test_cudnn_cannot():
    run = functools.partial(windowed_attention, scale=1.0, causal=True, window=2, implementation='cudnn')
    with pytest.raises(UserError, match='windows with gaps'):
        run(*arrays(jnp.float32)[:3])
