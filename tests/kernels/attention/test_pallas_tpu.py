import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.kernels.attention import dot_product_attention, pallas_tpu, reference
from llm.kernels.attention.masking import Options, Positions
from tests.kernels.attention.problems import OPTIONS, by_blocks, problems, value_and_gradients


def attend(blocks, one_pass):
    """The kernel, interpreted, with blocks of so many queries and keys."""
    return by_blocks(
        functools.partial(pallas_tpu.forward, blocks=blocks),
        functools.partial(pallas_tpu.backward, blocks=blocks, one_pass=one_pass),
    )


@settings(max_examples=16, derandomize=True)
@given(problem=problems(), blocks=st.tuples(st.integers(1, 6), st.integers(1, 6)), one_pass=st.booleans())
def test_equals_reference_in_value_and_gradients(problem, blocks, one_pass):
    arrays, options = problem
    ours = attend(blocks, one_pass)
    with jax.enable_x64():
        expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float64)
        actual = value_and_gradients(ours, arrays, options, jnp.float64)
    for exact, double in zip(expected, actual, strict=True):
        np.testing.assert_allclose(double, exact, rtol=0, atol=1e-9 * max(1.0, np.abs(exact).max()))


@pytest.mark.parametrize('one_pass', [True, False])
def test_bfloat16_is_as_good_as_its_rounding(one_pass):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 70, 2, 8)), jnp.bfloat16) for _ in range(4)]
    options = OPTIONS | {'scale': 0.35}
    actual = value_and_gradients(attend((16, 32), one_pass), arrays, options, jnp.bfloat16)
    expected = value_and_gradients(reference.dot_product_attention, arrays, options, jnp.float32)
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), exact, rtol=2**-7, atol=2**-7)


TOPOLOGIES = {'v4': 'v4:2x2x1', 'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2', 'tpu7x': 'tpu7x:2x2x1'}
CASES = {
    'causal, grouped': ((1, 2048, 8, 2, 128), {}),
    'long, two passes': ((1, 65_536, 2, 1, 128), {}),
    'odd length, packed': ((2, 700, 4, 4, 64), {'segments': True}),
    'window, soft cap': ((1, 1024, 2, 1, 256), {'window': 300, 'soft_cap': 50.0}),
    'all at run time': ((2, 640, 4, 1, 80), {'slopes': True, 'sinks': True, 'at_run_time': True, 'causal': False}),
}


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ('chip', 'case'),
    [('v5e', case) for case in CASES] + [(chip, 'all at run time') for chip in TOPOLOGIES if chip != 'v5e'],
)
def test_compiles_in_memory_linear_in_the_length(chip, case):
    (batch, length, heads, kv_heads, size), wanted = CASES[case]
    devices = topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGIES[chip]).devices
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ('one',)), PartitionSpec())

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    traced = {}
    if wanted.get('segments'):
        traced |= dict.fromkeys(('query_segment_ids', 'key_segment_ids'), array(batch, length, dtype=jnp.int32))
    if wanted.get('slopes'):
        traced['alibi_slopes'] = array(heads, dtype=jnp.float32)
    if wanted.get('sinks'):
        traced['sinks'] = array(heads, dtype=jnp.float32)
    if wanted.get('at_run_time'):
        traced |= dict.fromkeys(('query_offset', 'key_lengths'), array(batch, dtype=jnp.int32))
    static = {name: x for name, x in wanted.items() if name in ('window', 'soft_cap', 'causal')}

    def run(query, key, value, d_output, traced):
        function = functools.partial(dot_product_attention, scale=0.1, device=devices[0], **static, **traced)
        output, pullback = jax.vjp(function, query, key, value)
        return output, pullback(d_output)

    q, kv = array(batch, length, heads, size), array(batch, length, kv_heads, size)
    compiled = jax.jit(run).lower(q, kv, kv, q, traced).compile()
    assert compiled.as_text().count('tpu_custom_call') >= (3 if length > 50_000 else 2)
    lanes = max(size, 128)  # a head takes whole lanes in memory
    arrays = 2 * batch * length * (3 * heads + 4 * kv_heads) * lanes
    ids = 4 * batch * length * 128 if traced.get('query_segment_ids') else 0
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * arrays + ids + 2**24


@pytest.mark.tpu_compile
@pytest.mark.parametrize(('length', 'passes'), [(6144, 1), (8192, 2)])
def test_gradients_of_a_piece_in_fp32_fit_on_the_chip(length, passes):
    """A ring adds up gradients of keys and values in fp32: they take the most of v5p's VMEM."""
    device = topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x1').devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ('one',)), PartitionSpec())

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def run(query, key, ids, offset, statistic):
        positions = Positions(ids, ids, offset, None, None)
        options, kind = Options(0.1, True, None, None, None), device.device_kind
        return pallas_tpu.backward(
            options, query, key, key, positions, statistic, statistic, query, dtype=jnp.float32, tpu=kind
        )

    arguments = array(1, length, 32, 128), array(1, length, 8, 128), array(1, length, dtype=jnp.int32)
    scalars = array(dtype=jnp.int32), array(1, 32, length, dtype=jnp.float32)
    assert (
        jax.jit(run).lower(*arguments, *scalars).compile().as_text().count('custom_call_target="tpu_custom_call"')
        == passes
    )
