import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from llm.kernels.selective_scan import pallas_tpu, reference, selective_scan
from tests.kernels.scan_problems import TOPOLOGIES, assert_close, kernel_calls, selective_scans, value_and_gradients

IMPLEMENTATIONS = ('chunked', 'pallas_tpu')


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(pallas_tpu, 'selective_scan', functools.partial(pallas_tpu.selective_scan, chunk=16))


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_equals_reference_in_value_and_gradients(short_chunks, name):
    @settings(max_examples=7, derandomize=True)
    @given(selective_scans())
    def check(arrays):
        with jax.enable_x64():
            run = functools.partial(selective_scan, implementation='reference')
            expected = value_and_gradients(run, arrays, jnp.float64)
            actual = value_and_gradients(functools.partial(selective_scan, implementation=name), arrays, jnp.float64)
        assert_close(actual, expected, 1e-10)

    check()


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_bfloat16_is_as_good_as_its_rounding(short_chunks, name):
    rng = np.random.default_rng(0)
    x, b, c = (jnp.asarray(rng.standard_normal((2, 20, size)), jnp.bfloat16) for size in (128, 4, 4))
    dt = jnp.asarray(rng.uniform(0, 1, x.shape), jnp.float32)
    a = jnp.asarray(-rng.uniform(0.1, 3, (128, 4)), jnp.float32)
    y, final = selective_scan(x, dt, a, b, c, implementation=name)
    exact, _ = selective_scan(*(each.astype(jnp.float32) for each in (x, dt, a, b, c)), implementation='reference')
    assert y.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(np.float32), exact, rtol=0, atol=2**-7 * float(jnp.abs(exact).max()))


def test_the_recurrence_of_one_channel_by_hand():
    """h = exp(dt a) h + dt x b with N = 1, and a segment that begins at the third token."""
    x, dt = jnp.array([2.0, 3.0, 4.0]).reshape(1, 3, 1), jnp.array([1.0, 0.5, 1.0]).reshape(1, 3, 1)
    b, c = jnp.array([5.0, 7.0, 1.0]).reshape(1, 3, 1), jnp.array([1.0, 2.0, 3.0]).reshape(1, 3, 1)
    starts = jnp.array([[False, False, True]])
    y, final = reference.selective_scan(x, dt, -jnp.ones((1, 1)), b, c, starts, jnp.ones((1, 1, 1)))
    first = np.exp(-1) + 10
    second = np.exp(-0.5) * first + 10.5
    np.testing.assert_allclose(y.ravel(), [first, 2 * second, 12], rtol=1e-6)
    np.testing.assert_allclose(final.ravel(), [4], rtol=1e-6)


@pytest.mark.tpu_compile
@pytest.mark.parametrize('chip', TOPOLOGIES)
def test_compiles(chip):
    bf16, f32 = jnp.bfloat16, jnp.float32
    arrays = {'x': (2, 700, 1536, bf16), 'dt': (2, 700, 1536, f32), 'a': (1536, 16, f32)}
    arrays |= dict.fromkeys('bc', (2, 700, 16, bf16))
    assert kernel_calls(selective_scan, chip, arrays, (2, 16, 1536)) == 2


@pytest.mark.tpu_compile
def test_compiles_in_fp32_with_channels_that_fill_no_lanes():
    f32 = jnp.float32
    arrays = {
        'x': (1, 128, 80, f32),
        'dt': (1, 128, 80, f32),
        'a': (80, 8, f32),
        **dict.fromkeys('bc', (1, 128, 8, f32)),
    }
    assert kernel_calls(selective_scan, 'v5e', arrays, (1, 8, 80)) == 2
