"""The grouped product against its definition, forward and backward, over numbers of rows that groups may have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.kernels.grouped_matmul import blocked, grouped_matmul, reference

D, F, ROWS = 3, 5, 300


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 140), min_size=4, max_size=4).filter(lambda sizes: sum(sizes) <= ROWS))
def test_blocks_equal_the_definition(sizes):
    with jax.enable_x64():
        lhs, rhs, weights = (
            jax.random.normal(jax.random.key(i), shape, jnp.float64)
            for i, shape in enumerate([(ROWS, D), (4, D, F), (ROWS, F)])
        )

        @jax.jit
        def both(lhs, rhs, sizes):
            return [
                jax.value_and_grad(lambda lhs, rhs, f=f: jnp.sum(jnp.sin(f(lhs, rhs, sizes)) * weights), (0, 1))(
                    lhs, rhs
                )
                for f in (blocked.grouped_matmul, reference.grouped_matmul)
            ]

        (value, gradients), (expected, expected_gradients) = both(lhs, rhs, jnp.asarray(sizes))
        np.testing.assert_allclose(value, expected, atol=1e-10)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradients, expected_gradients)


@pytest.mark.parametrize('sizes', [[0, 0, 0], [7, 0, 2], [0, 0, 9]])
def test_rows_after_the_last_group_are_zero(sizes):
    lhs, rhs = jnp.ones((12, D)), jnp.ones((3, D, F))
    product = grouped_matmul(lhs, rhs, jnp.asarray(sizes), jax.devices('cpu')[0])
    np.testing.assert_array_equal(product, np.where(np.arange(12)[:, None] < sum(sizes), D, 0) * np.ones(F))
    np.testing.assert_array_equal(product, jax.lax.ragged_dot(lhs, rhs, jnp.asarray(sizes)))
