import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.kernels.attention import dot_product_attention

B, S, H, G, K = 2, 7, 4, 2, 8
SCALE = K**-0.5


@pytest.fixture(params=['reference', 'chunked', 'pallas_gpu', 'pallas_tpu'])
def attend(request):
    return functools.partial(dot_product_attention, implementation=request.param)


def draw(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def qkv(queries=S, keys=S, kv_heads=G):
    return draw(B, queries, H, K, seed=1), draw(B, keys, kv_heads, K, seed=2), draw(B, keys, kv_heads, K, seed=3)


def by_hand(query, key, value, allowed, *, bias=None, soft_cap=None, sinks=None):
    """Loops over rows, heads and queries in float64; `allowed(b, s, t)`, `bias(h, s, t)`, `sinks[h]`."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    output = np.zeros_like(query)
    for b, s, h in np.ndindex(query.shape[:3]):
        keys = [t for t in range(key.shape[1]) if allowed(b, s, t)]
        if not keys:
            continue
        scores = np.array([SCALE * query[b, s, h] @ key[b, t, h // group] for t in keys])
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        if bias is not None:
            scores += np.array([bias(h, s, t) for t in keys])
        highest = scores.max()
        weights = np.exp(scores - highest)
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - highest))
        output[b, s, h] = weights / total @ value[b, keys, h // group]
    return output


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('causal', [True, False])
def test_grouped_heads(attend, kv_heads, causal):
    q, k, v = qkv(kv_heads=kv_heads)
    ours = attend(q, k, v, scale=SCALE, causal=causal)
    close(ours, by_hand(q, k, v, lambda b, s, t: t <= s or not causal))


@pytest.mark.parametrize('causal', [True, False])
def test_window(attend, causal):
    q, k, v = qkv()
    ours = attend(q, k, v, scale=SCALE, causal=causal, window=3)
    close(ours, by_hand(q, k, v, lambda b, s, t: abs(s - t) < 3 and (t <= s or not causal)))


def test_soft_cap_comes_before_bias_and_mask(attend):
    q, k, v = qkv()
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    ours = attend(q, k, v, scale=SCALE, soft_cap=0.7, alibi_slopes=jnp.asarray(slopes))
    close(ours, by_hand(q, k, v, lambda b, s, t: t <= s, bias=lambda h, s, t: -slopes[h] * (s - t), soft_cap=0.7))


def test_alibi_is_symmetric_without_causal(attend):
    q, k, v = qkv()
    slopes = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
    ours = attend(q, k, v, scale=SCALE, causal=False, alibi_slopes=jnp.asarray(slopes))
    close(ours, by_hand(q, k, v, lambda b, s, t: True, bias=lambda h, s, t: -slopes[h] * abs(s - t)))


def test_segments(attend):
    q, k, v = qkv()
    ids = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3]], np.int32)
    ours = attend(q, k, v, scale=SCALE, query_segment_ids=ids, key_segment_ids=ids)
    close(ours, by_hand(q, k, v, lambda b, s, t: t <= s and ids[b, s] == ids[b, t]))


def test_a_sink_takes_its_share_of_the_softmax(attend):
    q, k, v = qkv()
    sinks = np.array([-1.0, 0.0, 0.5, 3.0], np.float32)
    close(attend(q, k, v, scale=SCALE, sinks=sinks), by_hand(q, k, v, lambda b, s, t: t <= s, sinks=sinks))


def test_keys_past_their_length_are_padding(attend):
    q, k, v = qkv()
    lengths = np.array([4, 0])
    ours = attend(q, k, v, scale=SCALE, causal=False, key_lengths=lengths)
    close(ours, by_hand(q, k, v, lambda b, s, t: t < lengths[b]))


def test_query_offset_by_row_reads_a_cache(attend):
    q, k, v = qkv(queries=2, keys=9)
    offsets = np.array([3, 6])
    ours = attend(q, k, v, scale=SCALE, window=4, query_offset=jnp.asarray(offsets))
    close(ours, by_hand(q, k, v, lambda b, s, t: 0 <= offsets[b] + s - t < 4))


def test_one_step_with_offset_equals_the_last_row_of_the_whole(attend):
    q, k, v = qkv()
    whole = attend(q, k, v, scale=SCALE)
    for offset in (S - 1, jnp.int32(S - 1)):
        close(attend(q[:, -1:], k, v, scale=SCALE, query_offset=offset), whole[:, -1:])


def test_a_query_without_keys_gets_zeros_and_finite_gradients(attend):
    q, k, v = qkv()
    query_ids, key_ids = np.ones((B, S), np.int32), np.ones((B, S), np.int32)
    query_ids[0, 3] = 5

    def loss(q, k, v):
        output = attend(q, k, v, scale=SCALE, query_segment_ids=query_ids, key_segment_ids=key_ids)
        return jnp.sum(output**2), output

    gradients, output = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    assert not np.any(output[0, 3])
    assert not np.any(gradients[0][0, 3])
    assert all(np.all(np.isfinite(g)) for g in gradients)
    close(output, by_hand(q, k, v, lambda b, s, t: t <= s and (b, s) != (0, 3)))


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('causal', [True, False])
def test_value_and_gradient_equal_jax_nn(attend, kv_heads, causal):
    q, k, v = qkv(kv_heads=kv_heads)
    weight = draw(B, S, H, K, seed=4)

    def ours(q, k, v):
        return jnp.sum(weight * attend(q, k, v, scale=SCALE, causal=causal))

    def theirs(q, k, v):
        return jnp.sum(weight * jax.nn.dot_product_attention(q, k, v, scale=SCALE, is_causal=causal))

    a, b = (jax.value_and_grad(f, argnums=(0, 1, 2))(q, k, v) for f in (ours, theirs))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.oracle
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_value_and_gradient_equal_torch(attend, kv_heads):
    import torch

    arrays = qkv(kv_heads=kv_heads)
    weight = draw(B, S, H, K, seed=4)
    with jax.enable_x64():
        value, gradients = jax.value_and_grad(
            lambda q, k, v: jnp.sum(weight * attend(q, k, v, scale=SCALE)), argnums=(0, 1, 2)
        )(*(jnp.asarray(x, jnp.float64) for x in arrays))
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in arrays]
    output = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), is_causal=True, scale=SCALE, enable_gqa=True
    )
    loss = (output.transpose(1, 2) * torch.tensor(weight)).sum()
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-12)
    for ours, theirs in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_bfloat16_inputs_keep_an_fp32_softmax(attend):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv())
    ours = attend(q, k, v, scale=SCALE)
    assert ours.dtype == jnp.bfloat16
    exact = by_hand(*(np.asarray(x, np.float64) for x in (q, k, v)), lambda b, s, t: t <= s)
    np.testing.assert_allclose(np.asarray(ours, np.float64), exact, atol=2**-7 * np.abs(exact).max())


@pytest.mark.parametrize(
    'changes',
    [
        {'key': np.zeros((B, S, 3, K)), 'value': np.zeros((B, S, 3, K))},
        {'value': np.zeros((B, S + 1, G, K))},
        {'window': 0},
        {'query_segment_ids': np.ones((B, S), int)},
        {'query_segment_ids': np.ones((B, S), int), 'key_segment_ids': np.ones((B, S + 1), int)},
        {'query_offset': jnp.zeros(3, int)},
        {'alibi_slopes': jnp.zeros(3)},
        {'sinks': jnp.zeros(3)},
        {'key_lengths': jnp.zeros(3, int)},
        {'distance_bias': jnp.zeros((H, 6))},
        {'global_keys': jnp.zeros((B, S + 1), bool)},
        {'implementation': 'nothing'},
    ],
)
def test_arguments_that_do_not_fit_are_refused(attend, changes):
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r'.'):
        attend(**({'query': q, 'key': k, 'value': v, 'scale': SCALE} | changes))


@pytest.mark.parametrize('scale', [1e8, 1e9, 1e10])
def test_gradients_stay_finite_where_a_rounding_of_the_scores_is_more_than_exp_can_take(attend, scale):
    q, k, v = (jnp.asarray(x) for x in qkv())
    d = jnp.asarray(draw(B, S, H, K, seed=4))
    output, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, scale=scale), q, k, v)
    # Each query takes the value of one key, so no gradient of a value can exceed what all queries pass on.
    assert np.all(np.abs(output) <= np.max(np.abs(v)))
    d_q, d_k, d_v = pullback(d)
    assert all(np.all(np.isfinite(g)) for g in (d_q, d_k))
    assert np.all(np.abs(d_v) <= np.sum(np.abs(d)))


def test_what_overflows_for_a_hidden_pair_reaches_no_gradient(attend):
    q, k, v = (jnp.asarray(x) for x in qkv(kv_heads=H))
    d = draw(B, S, H, K, seed=4)
    d[:, :-1] *= 1e10
    d[:, -1] = 0  # the only query that may see the last key
    v = v.at[:, -1].set(1e30)
    gradients = jax.vjp(lambda q, k, v: attend(q, k, v, scale=SCALE), q, k, v)[1](jnp.asarray(d))
    assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize('implementation', ['auto', 'reference', 'chunked'])
def test_global_keys_are_exempt_from_mask_and_window_but_not_from_segments(implementation):
    q, k, v = qkv()
    ids = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 2, 2, 3]], np.int32)
    seen = np.array([[0, 0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 1, 0]], bool)
    ours = dot_product_attention(
        *(q, k, v),
        scale=SCALE,
        window=2,
        query_segment_ids=ids,
        key_segment_ids=ids,
        global_keys=jnp.asarray(seen),
        implementation=implementation,
    )
    close(ours, by_hand(q, k, v, lambda b, s, t: ids[b, s] == ids[b, t] and (0 <= s - t < 2 or seen[b, t])))


@pytest.mark.parametrize('implementation', ['reference', 'chunked'])
def test_a_bias_by_distance_is_added_to_the_scores(implementation):
    q, k, v = qkv()
    bias = draw(H, 7, seed=7)
    ours = dot_product_attention(
        q, k, v, scale=SCALE, causal=False, distance_bias=jnp.asarray(bias), implementation=implementation
    )
    close(ours, by_hand(q, k, v, lambda *_: True, bias=lambda h, s, t: bias[h, np.clip(t - s, -3, 3) + 3]))


@pytest.mark.parametrize(
    ('implementation', 'array'),
    [('pallas_tpu', 'distance_bias'), ('pallas_tpu', 'global_keys'), ('pallas_gpu', 'global_keys')],
)
def test_what_an_implementation_cannot_do_is_named(implementation, array):
    q, k, v = qkv()
    value = jnp.zeros((H, 7)) if array == 'distance_bias' else jnp.ones((B, S), bool)
    with pytest.raises(UserError, match=f'cannot do {array}'):
        dot_product_attention(q, k, v, scale=SCALE, implementation=implementation, **{array: value})
