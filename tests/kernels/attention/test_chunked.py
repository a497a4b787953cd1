import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.kernels.attention import chunked, reference
from llm.kernels.attention.masking import Options
from tests.kernels.attention.problems import OPTIONS, by_blocks, problems, value_and_gradients


def attend(size=64, max_runs=8):
    """The chunked implementation with blocks of `size`."""
    blocks = chunked.Blocks(size, max_runs)
    return by_blocks(
        functools.partial(chunked.forward, blocks=blocks), functools.partial(chunked.backward, blocks=blocks)
    )


@settings(max_examples=24, derandomize=True)
@given(problem=problems(), size=st.integers(1, 6), max_runs=st.integers(1, 3), extra=st.integers(0, 3))
def test_equals_reference_in_value_and_gradients(problem, size, max_runs, extra):
    arrays, options = problem
    rng = np.random.default_rng(size)
    if extra == 1:
        options = options | {'global_keys': rng.random(arrays[1].shape[:2]) < 0.3}
    if extra == 2:
        options = options | {'distance_bias': rng.standard_normal((arrays[0].shape[2], 2 * max_runs + 1))}
    ours = attend(size, max_runs)
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
    actual = value_and_gradients(attend(), arrays, options, jnp.float32)
    with jax.enable_x64():
        expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float64)
    for ours, exact in zip(actual, expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)


def test_bfloat16_is_as_good_as_its_rounding():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 70, 2, 8)), jnp.bfloat16) for _ in range(4)]
    options = OPTIONS | {'scale': 0.35}
    actual = value_and_gradients(attend(), arrays, options, jnp.bfloat16)
    expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float32)
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=2**-7, atol=2**-7)


def test_a_query_without_keys_gets_zeros_and_finite_gradients():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 6, 2, 4)) for _ in range(4)]
    options = OPTIONS | {'scale': 0.5, 'query_offset': -3}
    for blocks in ((2, 8), (4, 8), (2, 1)):
        ours = attend(*blocks)
        output, d_query, d_key, d_value = value_and_gradients(ours, arrays, options, jnp.float32)
        assert not np.any(output[0, :3])
        assert not np.any(d_query[0, :3])
        assert np.all(np.any(output[0, 3:], axis=-1))
        assert all(np.all(np.isfinite(x)) for x in (output, d_query, d_key, d_value))


def compiled(implementation, length, **more):
    shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def run(query, key, value):
        output, pullback = jax.vjp(lambda *x: implementation(*x, **OPTIONS | more, scale=0.25), query, key, value)
        return pullback(output)

    return jax.jit(run).lower(shape, shape, shape).compile()


def temporary_bytes(implementation, length, **more):
    return compiled(implementation, length, **more).memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_with_the_length():
    assert temporary_bytes(attend(), 8192) < 4.5 * temporary_bytes(attend(), 2048)
    assert temporary_bytes(reference.dot_product_attention, 8192) > 15 * temporary_bytes(
        reference.dot_product_attention, 2048
    )
    biased = {'distance_bias': jnp.ones((2, 257)), 'causal': False}
    assert temporary_bytes(attend(), 8192, **biased) < 4.5 * temporary_bytes(attend(), 2048, **biased)


def test_work_grows_linearly_with_the_length_under_a_window():
    """By the products in the compiled program: as many blocks as tokens ask for, each against its own window."""
    for causal in (True, False):
        text = compiled(attend(), 4096, window=100, causal=causal).as_text()
        widths = {int(size) for size in re.findall(r'f32\[(?:\d+,)*64,(\d+)\]', text)}
        assert max(widths) <= 64 + 2 * 99, widths


@pytest.mark.parametrize('window', [None, 5])
@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('offset', [-4, 0, 3, 30])
def test_ranges_hold_every_pair_that_attends_and_skip_what_they_can(causal, window, offset):
    queries, keys = 23, 19
    options = Options(1.0, causal, window, None, offset)
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
    runs = chunked.Blocks(block, max_runs).runs(size, Options(1.0, True, None, None, 0))
    assert [i for start, blocks, width in runs for i in range(start, start + blocks * width)] == list(range(size))
    assert len([run for run in runs if run[2] == block]) <= max_runs
