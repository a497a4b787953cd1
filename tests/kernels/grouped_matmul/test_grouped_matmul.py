"""The grouped product against its definition, forward and backward, over numbers of rows that groups may have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm.kernels.grouped_matmul import blocked, grouped_matmul, pallas_tpu, reference
from tests.kernels.scan_problems import TOPOLOGIES
from tests.models.small_decoders import compiled

D, F, ROWS = 3, 5, 300


@compiled  # once for all sizes
def both(lhs, rhs, weights, sizes):
    return [
        jax.value_and_grad(lambda lhs, rhs, f=f: jnp.sum(jnp.sin(f(lhs, rhs, sizes)) * weights), (0, 1))(lhs, rhs)
        for f in (blocked.grouped_matmul, reference.grouped_matmul)
    ]


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 140), min_size=4, max_size=4).filter(lambda sizes: sum(sizes) <= ROWS))
def test_blocks_equal_the_definition(sizes):
    with jax.enable_x64():
        lhs, rhs, weights = (
            jax.random.normal(jax.random.key(i), shape, jnp.float64)
            for i, shape in enumerate([(ROWS, D), (4, D, F), (ROWS, F)])
        )

        (value, gradients), (expected, expected_gradients) = both(lhs, rhs, weights, jnp.asarray(sizes))
        np.testing.assert_allclose(value, expected, atol=1e-10)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradients, expected_gradients)


@pytest.mark.parametrize('sizes', [[0, 0, 0], [7, 0, 2], [0, 0, 9]])
def test_rows_after_the_last_group_are_zero(sizes):
    lhs, rhs = jnp.ones((12, D)), jnp.ones((3, D, F))
    product = grouped_matmul(lhs, rhs, jnp.asarray(sizes), jax.devices('cpu')[0])
    np.testing.assert_array_equal(product, np.where(np.arange(12)[:, None] < sum(sizes), D, 0) * np.ones(F))
    np.testing.assert_array_equal(product, jax.lax.ragged_dot(lhs, rhs, jnp.asarray(sizes)))


@pytest.mark.parametrize('sizes', [[0, 140, 37, 0], [128, 0, 0, 172]])
def test_the_kernel_equals_the_definition(sizes):
    """Groups without rows, rows after the last group, and columns and rows that fill no tile."""
    lhs, rhs, weights = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(ROWS, 24), (4, 24, 40), (ROWS, 40)])
    )

    def value_and_gradients(function):
        return jax.value_and_grad(
            lambda lhs, rhs: jnp.sum(jnp.sin(function(lhs, rhs, jnp.array(sizes))) * weights), (0, 1)
        )

    found = value_and_gradients(lambda *each: pallas_tpu.grouped_matmul(*each, interpret=True))(lhs, rhs)
    expected = value_and_gradients(reference.grouped_matmul)(lhs, rhs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.tpu_compile
@pytest.mark.parametrize('chip', TOPOLOGIES)
def test_costs_what_is_needed(chip):
    """Of 16 experts, one each for a row: forward and backward, where ragged_dot multiplies each row by all of them."""
    device = topologies.get_topology_desc(platform='tpu', topology_name=TOPOLOGIES[chip]).devices[0]
    sharding = NamedSharding(Mesh(np.array([device]), ('one',)), PartitionSpec())
    experts, rows, inner, outer = 16, 2048, 1536, 384

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def cost(function):
        def both(lhs, rhs, sizes, gradient):
            y, pullback = jax.vjp(lambda lhs, rhs: function(lhs, rhs, sizes), lhs, rhs)
            return y, pullback(gradient)

        arguments = (
            array(rows, inner),
            array(experts, inner, outer),
            array(experts, dtype=jnp.int32),
            array(rows, outer),
        )
        flops = jax.jit(both).lower(*arguments).compile().cost_analysis()['flops']
        return flops / (3 * 2 * rows * inner * outer)

    assert cost(lambda *each: grouped_matmul(*each, device)) < 1.01
