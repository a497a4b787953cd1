import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import UserError
from llm.kernels.attention import choose, flash, pallas_gpu, reference
from llm.kernels.attention.masking import Options, Positions
from tests.kernels.attention.problems import OPTIONS, by_blocks, problems, value_and_gradients


def attend(blocks):
    """The kernels, interpreted, with blocks of so many queries and keys."""
    return by_blocks(
        functools.partial(pallas_gpu.forward, blocks=blocks), functools.partial(pallas_gpu.backward, blocks=blocks)
    )


@settings(max_examples=8, derandomize=True)
@given(problem=problems(), blocks=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_equals_reference_in_value_and_gradients(problem, blocks):
    arrays, options = problem
    with jax.enable_x64():
        expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float64)
        actual = value_and_gradients(attend(blocks), arrays, options, jnp.float64)
    for exact, double in zip(expected, actual, strict=True):
        np.testing.assert_allclose(double, exact, rtol=0, atol=1e-9 * max(1.0, np.abs(exact).max()))


def test_bfloat16_is_as_good_as_its_rounding():
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 70, 2, 8)), jnp.bfloat16) for _ in range(4)]
    options = OPTIONS | {'scale': 0.35}
    actual = value_and_gradients(attend((16, 32)), arrays, options, jnp.bfloat16)
    expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float32)
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=2**-7, atol=2**-7)


PLAIN = {'causal': True, 'window': None, 'soft_cap': None, 'offset': 0}
LENGTHS = {'key_lengths': np.zeros(2, np.int32), 'offset': np.zeros(2, np.int32)}
CASES = {
    'head size 64': ((2, 512, 4, 2, 64), PLAIN, {}, jnp.bfloat16),
    'head size 80': ((2, 512, 4, 4, 80), PLAIN, {}, jnp.bfloat16),
    'head size 128, packed': ((2, 512, 8, 1, 128), PLAIN, {'segments': True}, jnp.bfloat16),
    'head size 256, odd length': ((2, 700, 4, 2, 256), PLAIN | {'causal': False, 'window': 99}, {}, jnp.float16),
    'all at run time': (
        (2, 500, 6, 2, 96),
        PLAIN | {'window': 99, 'soft_cap': 50.0, 'offset': None},
        {'segments': True, 'slopes': np.zeros(6, np.float32), **LENGTHS},
        jnp.bfloat16,
    ),
    'float32': ((1, 96, 2, 1, 128), PLAIN, {}, jnp.float32),
}


@pytest.mark.parametrize(
    ('gpu', 'case'), [('9.0', case) for case in CASES] + [(gpu, 'all at run time') for gpu in ('8.0', '8.9')]
)
def test_becomes_three_triton_kernels(gpu, case):
    (batch, length, heads, kv_heads, size), options, wanted, dtype = CASES[case]
    ids = np.zeros((batch, length), np.int32) if wanted.get('segments') else None
    positions = Positions(ids, ids, wanted.get('offset'), wanted.get('key_lengths'), wanted.get('slopes'))
    implementation = flash.Implementation(
        functools.partial(pallas_gpu.forward, gpu=gpu), functools.partial(pallas_gpu.backward, gpu=gpu)
    )

    def run(query, key, value, d_output, positions):
        def attention(query, key, value):
            inputs = flash.Inputs(query, key, value, positions, None)
            return flash.attention(implementation, Options(0.1, **options), inputs)

        output, pullback = jax.vjp(attention, query, key, value)
        return output, pullback(d_output)

    q, kv = (jax.ShapeDtypeStruct((batch, length, n, size), dtype) for n in (heads, kv_heads))
    device = jax.sharding.AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=None, platform='gpu')
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ('one',), abstract_device=device)):
        traced = jax.jit(run).trace(q, kv, kv, q, positions)
        lowered = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert lowered.count('__gpu$xla.gpu.triton') == 3
    # Nothing as large as the scores of one head is made outside of the kernels.
    assert f'{length}x{length}x' not in lowered


@pytest.mark.parametrize('gpu', ['8.0', '8.6', '9.0', '10.0', '12.0'])
@pytest.mark.parametrize('size', [16, 64, 128, 256])
@pytest.mark.parametrize('kernel', ['forward', 'backward_queries', 'backward_keys'])
@pytest.mark.parametrize('bytes_each', [2, 4])
def test_blocks_fit_in_shared_memory(gpu, size, kernel, bytes_each):
    blocks = pallas_gpu.blocks_for(gpu, kernel, size, bytes_each)
    rows = blocks.own * (1 if kernel == 'forward' else 2) + 2 * blocks.stages * blocks.loop
    shared = {'8.0': 163, '8.6': 99, '9.0': 227, '10.0': 227, '12.0': 99}[gpu]  # KiB, from NVIDIA's table
    assert rows * size * bytes_each <= shared * 1024
    assert min(blocks.own, blocks.loop) >= 16
    assert blocks.own & (blocks.own - 1) == blocks.loop & (blocks.loop - 1) == 0


class _Device:
    """As much of a jax.Device as decides which attention runs on it."""

    def __init__(self, platform: str, compute_capability: str):
        self.platform, self.compute_capability = platform, compute_capability


@pytest.mark.parametrize(
    ('capability', 'expected'),
    [('8.0', 'pallas_gpu'), ('12.0', 'pallas_gpu'), ('7.5', 'chunked'), ('gfx942', 'chunked')],
)
def test_gpus_get_the_kernel_that_runs_on_them(capability, expected):
    device = _Device('gpu', capability)
    assert choose('auto', device, queries=2) == expected
    assert choose('auto', device, queries=1) == 'reference'
    if expected != 'pallas_gpu':
        with pytest.raises(UserError, match=capability):
            choose('pallas_gpu', device, queries=2)
