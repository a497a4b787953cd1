import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from llm.kernels.ssd import chunked, pallas_tpu, reference, ssd
from tests.kernels.scan_problems import TOPOLOGIES, assert_close, kernel_calls, ssds, value_and_gradients

IMPLEMENTATIONS = {
    'chunked': functools.partial(chunked.ssd, chunk=4),
    'pallas_tpu': functools.partial(pallas_tpu.ssd, chunk=4),
}


@pytest.fixture
def short_chunks(monkeypatch):
    for module, name in ((chunked, 'chunked'), (pallas_tpu, 'pallas_tpu')):
        monkeypatch.setattr(module, 'ssd', IMPLEMENTATIONS[name])


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_equals_reference_in_value_and_gradients(short_chunks, name):
    @settings(max_examples=7, derandomize=True)
    @given(ssds())
    def check(arrays):
        with jax.enable_x64():
            expected = value_and_gradients(functools.partial(ssd, implementation='reference'), arrays, jnp.float64)
            actual = value_and_gradients(functools.partial(ssd, implementation=name), arrays, jnp.float64)
        assert_close(actual, expected, 1e-10)

    check()


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_bfloat16_is_as_good_as_its_rounding(short_chunks, name):
    rng = np.random.default_rng(0)
    x, b, c = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 14, 4, 8), *((2, 14, 1, 8),) * 2)
    )
    dt, a = jnp.asarray(rng.uniform(0, 1, (2, 14, 4)), jnp.float32), jnp.asarray(-rng.uniform(0.1, 3, 4), jnp.float32)
    y, final = ssd(x, dt, a, b, c, implementation=name)
    exact, _ = ssd(*(each.astype(jnp.float32) for each in (x, dt, a, b, c)), implementation='reference')
    assert y.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    np.testing.assert_allclose(y.astype(np.float32), exact, rtol=0, atol=2**-6 * float(jnp.abs(exact).max()))


def test_the_recurrence_of_one_head_by_hand():
    """h = exp(-1) h + dt x b^T: with two tokens, N = K = 1."""
    x, dt = jnp.array([2.0, 3.0]).reshape(1, 2, 1, 1), jnp.ones((1, 2, 1))
    b, c = jnp.array([5.0, 7.0]).reshape(1, 2, 1, 1), jnp.array([1.0, 2.0]).reshape(1, 2, 1, 1)
    y, final = reference.ssd(x, dt, -jnp.ones(1), b, c, jnp.zeros((1, 2), bool), jnp.ones((1, 1, 1, 1)))
    first = np.exp(-1) + 10
    second = np.exp(-1) * first + 21
    np.testing.assert_allclose(y.ravel(), [first, 2 * second], rtol=1e-6)
    np.testing.assert_allclose(final.ravel(), [second], rtol=1e-6)


@pytest.mark.tpu_compile
@pytest.mark.parametrize('chip', TOPOLOGIES)
def test_compiles(chip):
    bf16, f32 = jnp.bfloat16, jnp.float32
    arrays = {
        'x': (2, 300, 16, 64, bf16),
        'dt': (2, 300, 16, f32),
        'a': (16, f32),
        'b': (2, 300, 1, 128, bf16),
        'c': (2, 300, 1, 128, bf16),
    }
    assert kernel_calls(ssd, chip, arrays, (2, 16, 64, 128)) == 2


@pytest.mark.tpu_compile
def test_compiles_in_fp32_with_few_heads_to_a_group():
    f32 = jnp.float32
    arrays = {'x': (1, 128, 6, 16, f32), 'dt': (1, 128, 6, f32), 'a': (6, f32)}
    arrays |= dict.fromkeys('bc', (1, 128, 2, 16, f32))
    assert kernel_calls(ssd, 'v5e', arrays, (1, 6, 16, 16)) == 2
