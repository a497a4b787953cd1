import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.kernels.convolution import activated_convolution, causal_convolution


@pytest.mark.parametrize('options', [(), ('segment_ids', 'history', 'bias')])
def test_row_by_row_equals_the_plain_sum_in_value_and_gradients(options):
    """Channels of two dimensions, segments that begin within a row and within the reach of the taps."""
    rng = np.random.default_rng(0)
    given = {'x': (2, 7, 3, 2), 'weight': (4, 3, 2), 'bias': (3, 2), 'history': (2, 3, 3, 2)}
    arrays = {n: rng.standard_normal(shape) for n, shape in given.items() if n in ('x', 'weight', *options)}
    ids = jnp.asarray([[1, 1, 2, 2, 2, 3, 3], [1, 2, 3, 3, 3, 3, 0]]) if 'segment_ids' in options else None
    gradient = rng.standard_normal(given['x'])

    @jax.jit
    def both(arrays):
        def plain(arrays):
            return jax.nn.silu(causal_convolution(**arrays, segment_ids=ids))

        def row_by_row(arrays):
            return activated_convolution(**arrays, segment_ids=ids, device=jax.devices()[0])

        found = []
        for function in (plain, row_by_row):
            y, pullback = jax.vjp(function, arrays)
            found.append((y, pullback(jnp.asarray(gradient))[0]))
        return found

    with jax.enable_x64():
        expected, actual = both(arrays)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-12, atol=1e-12)
