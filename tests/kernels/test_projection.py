import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.kernels.projection import project

SIZES = {'B': 2, 'S': 3, 'D': 4, 'H': 5, 'K': 6}


@pytest.mark.parametrize('equation', ['BSD,DHK->BSHK', 'BSHK,HKD->BSD'])
def test_gradients_are_those_of_einsum_without_transposed_products(equation):
    rng = np.random.default_rng(0)
    of_x, of_weight, output = equation.replace('->', ',').split(',')
    x, weight, gradient = (rng.standard_normal([SIZES[i] for i in each]) for each in (of_x, of_weight, output))

    def gradients(function):
        return lambda x, weight, gradient: jax.vjp(function, x, weight)[1](gradient)

    own, by_jax = (gradients(lambda x, weight, f=f: f(equation, x, weight)) for f in (project, jnp.einsum))
    with jax.enable_x64():
        expected = (
            np.einsum(f'{output},{of_weight}->{of_x}', gradient, weight),
            np.einsum(f'{of_x},{output}->{of_weight}', x, gradient),
        )
        for actual, exact in zip(jax.jit(own)(x, weight, gradient), expected, strict=True):
            np.testing.assert_allclose(actual, exact, rtol=1e-12, atol=1e-12)
        # Transposing a product is what XLA:CPU makes a slow one of.
        programs = [str(jax.make_jaxpr(run)(x, weight, gradient)) for run in (own, by_jax)]
        assert ['transpose[' in each for each in programs] == [False, True]
