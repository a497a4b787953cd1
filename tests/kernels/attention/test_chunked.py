import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.kernels.attention import chunked, reference

OPTIONS = {
    'causal': True,
    'window': None,
    'soft_cap': None,
    'query_segment_ids': None,
    'key_segment_ids': None,
    'query_offset': 0,
    'alibi_slopes': None,
}


@st.composite
def problems(draw):
    """Arrays, options and block sizes; small, so that every path through runs and blocks is met."""
    batch, group, kv_heads, head_size = (draw(st.integers(1, n)) for n in (2, 3, 2, 5))
    queries, keys = draw(st.integers(1, 13)), draw(st.integers(1, 13))
    options = {
        'causal': draw(st.booleans()),
        'window': draw(st.none() | st.integers(1, 8)),
        'soft_cap': draw(st.none() | st.floats(0.5, 5)),
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        options['query_segment_ids'] = np.sort(rng.integers(0, 3, (batch, queries)))
        options['key_segment_ids'] = np.sort(rng.integers(0, 3, (batch, keys)))
    if draw(st.booleans()):
        options['alibi_slopes'] = rng.uniform(0.05, 1, group * kv_heads)
    kind = draw(st.sampled_from(['static', 'scalar', 'row']))
    offset = draw(st.integers(-2, 8))
    options['query_offset'] = {'static': offset, 'scalar': np.int32(offset), 'row': offset + np.arange(batch)}[kind]
    shapes = [(batch, size, heads, head_size) for size, heads in ((queries, group * kv_heads), (keys, kv_heads))]
    arrays = [rng.standard_normal(shape) for shape in (shapes[0], shapes[1], shapes[1], shapes[0])]
    blocks = {'block': draw(st.integers(1, 6)), 'max_runs': draw(st.integers(1, 3))}
    return arrays, OPTIONS | options | {'scale': head_size**-0.5}, blocks


def value_and_gradients(implementation, arrays, options, dtype):
    """Output and the gradients of its sum weighted by the last of the arrays, compiled."""
    query, key, value, weight = (jnp.asarray(x, dtype) for x in arrays)
    static = {name: x for name, x in options.items() if not isinstance(x, np.ndarray | np.integer)}
    traced = {name: jnp.asarray(x) for name, x in options.items() if name not in static}

    @jax.jit
    def run(query, key, value, traced):
        function = functools.partial(implementation, **static, **traced)
        output, pullback = jax.vjp(function, query, key, value)
        return output, *pullback(weight)

    return [np.asarray(x) for x in run(query, key, value, traced)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problem=problems())
def test_equals_reference_in_value_and_gradients(problem):
    arrays, options, blocks = problem
    ours = functools.partial(chunked.dot_product_attention, **blocks)
    with jax.enable_x64():
        expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float64)
        actual = value_and_gradients(ours, arrays, options, jnp.float64)
    single = value_and_gradients(ours, arrays, options, jnp.float32)
    for exact, double, rounded in zip(expected, actual, single, strict=True):
        size = max(1.0, np.abs(exact).max())
        np.testing.assert_allclose(double, exact, rtol=0, atol=1e-9 * size)
        np.testing.assert_allclose(rounded, exact, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize('length', [64, 200, 256])
def test_default_blocks_at_the_lengths_of_training(length):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, length, heads, 16)) for heads in (4, 2, 2, 4)]
    ids = np.sort(rng.integers(1, 4, (2, length)))
    options = OPTIONS | {'scale': 0.25, 'query_segment_ids': ids, 'key_segment_ids': ids}
    actual = value_and_gradients(chunked.dot_product_attention, arrays, options, jnp.float32)
    with jax.enable_x64():
        expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float64)
    for ours, exact in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)


def test_bfloat16_is_as_good_as_its_rounding():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 70, 2, 8)), jnp.bfloat16) for _ in range(4)]
    options = OPTIONS | {'scale': 0.35}
    actual = value_and_gradients(chunked.dot_product_attention, arrays, options, jnp.bfloat16)
    expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float32)
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=2**-7, atol=2**-7)


def test_a_query_without_keys_gets_zeros_and_finite_gradients():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 6, 2, 4)) for _ in range(4)]
    options = OPTIONS | {'scale': 0.5, 'query_offset': -3}
    for blocks in ({'block': 2}, {'block': 4}, {'block': 2, 'max_runs': 1}):
        ours = functools.partial(chunked.dot_product_attention, **blocks)
        output, d_query, d_key, d_value = value_and_gradients(ours, arrays, options, jnp.float32)
        assert not np.any(output[0, :3])
        assert not np.any(d_query[0, :3])
        assert np.all(np.any(output[0, 3:], axis=-1))
        assert all(np.all(np.isfinite(x)) for x in (output, d_query, d_key, d_value))


def temporary_bytes(implementation, length):
    shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def run(query, key, value):
        output, pullback = jax.vjp(lambda *x: implementation(*x, **OPTIONS, scale=0.25), query, key, value)
        return pullback(output)

    return jax.jit(run).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_with_the_length():
    assert temporary_bytes(chunked.dot_product_attention, 8192) < 4.5 * temporary_bytes(
        chunked.dot_product_attention, 2048
    )
    assert temporary_bytes(reference.dot_product_attention, 8192) > 15 * temporary_bytes(
        reference.dot_product_attention, 2048
    )


@pytest.mark.parametrize('window', [None, 5])
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('offset', [-4, 0, 3, 30])
def test_ranges_hold_every_pair_that_attends_and_skip_what_they_can(causal, window, offset):
    queries, keys = 23, 19
    options = chunked._Options(1.0, causal, window, None, offset, 4, 8)
    distance = offset + np.arange(queries)[:, None] - np.arange(keys)
    allowed = np.ones((queries, keys), bool)
    if causal:
        allowed &= distance >= 0
    if window is not None:
        allowed &= (distance if causal else np.abs(distance)) < window
    for first in range(queries):
        for last in range(first + 1, queries + 1):
            used = np.flatnonzero(allowed[first:last].any(axis=0))
            low, high = options.keys_of(first, last, keys)
            assert (low, high) == (used[0], used[-1] + 1) if used.size else low == high
    for first in range(keys):
        for last in range(first + 1, keys + 1):
            used = np.flatnonzero(allowed[:, first:last].any(axis=1))
            low, high = options.queries_of(first, last, queries)
            assert (low, high) == (used[0], used[-1] + 1) if used.size else low == high


@pytest.mark.parametrize(('size', 'block', 'max_runs'), [(0, 4, 3), (3, 4, 3), (12, 4, 2), (31, 4, 3), (256, 64, 8)])
def test_runs_cover_everything_once_in_order(size, block, max_runs):
    runs = chunked._Options(1.0, True, None, None, 0, block, max_runs).runs(size)
    assert [i for start, blocks, width in runs for i in range(start, start + blocks * width)] == list(range(size))
    assert len([run for run in runs if run[2] == block]) <= max_runs
