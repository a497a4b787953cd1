"""Traffic of kernels counted by hand, and that ours loads no block that the causal mask hides."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llm.kernels.attention.masking import Options, Positions
from llm.kernels.attention.pallas_tpu import forward
from tools.benchmarks.kernel_traffic import kernel_traffic


def test_product_of_matrices():
    """[4 x 8, 6 x 128] times [6 x 128, 2 x 128] in blocks of 8 and 128, the summed dimension last in the grid."""

    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def product(x, y):
        return pl.pallas_call(
            kernel,
            grid=(4, 2, 6),
            in_specs=[pl.BlockSpec((8, 128), lambda i, j, k: (i, k)), pl.BlockSpec((128, 128), lambda i, j, k: (k, j))],
            out_specs=pl.BlockSpec((8, 128), lambda i, j, k: (i, j)),
            out_shape=jax.ShapeDtypeStruct((32, 256), jnp.float32),
            name='product',
        )(x, y)

    shapes = jax.ShapeDtypeStruct((32, 768), jnp.float32), jax.ShapeDtypeStruct((768, 256), jnp.float32)
    (found,) = kernel_traffic(jax.jit(product), *shapes)
    assert (found.name, found.steps) == ('product', 48)
    # Each block of x for both columns, each block of y for all four rows; each result once.
    assert found.read == (2 * 32 * 768 * 4, 4 * 768 * 256 * 4)
    assert found.written == (32 * 256 * 4,)


def test_indices_read_from_a_table():
    """Blocks 0, 0, 2, 2, 1: three loads."""

    def kernel(table, x, out):
        out[...] = x[...]

    def run(x):
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(5,),
            in_specs=[pl.BlockSpec((None, 8, 128), lambda i, table: (table[i], 0, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, table: (0, 0)),
        )
        shape = jax.ShapeDtypeStruct((8, 128), x.dtype)
        return pl.pallas_call(kernel, grid_spec=grid, out_shape=shape)(jnp.array([0, 0, 2, 2, 1]), x)

    (found,) = kernel_traffic(run, jax.ShapeDtypeStruct((3, 8, 128), jnp.bfloat16))
    assert found.read == (3 * 8 * 128 * 2,) and found.written == (8 * 128 * 2,)


def test_indices_that_depend_on_the_data_are_refused():
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i, table: (table[i], 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, table: (0, 0)),
    )

    def run(table, x):
        shape = jax.ShapeDtypeStruct((8, 128), x.dtype)
        return pl.pallas_call(lambda table, x, out: None, grid_spec=grid, out_shape=shape)(table, x)

    with pytest.raises(ValueError, match='depend on the arguments'):
        kernel_traffic(run, jnp.array([0, 1]), jnp.zeros((16, 128)))


@pytest.mark.parametrize(('causal', 'pairs', 'loads'), [(False, 16, 16), (True, 10, 9)])
def test_attention_loads_visible_blocks_only(causal, pairs, loads):
    """Four blocks of queries and of keys. With the causal mask keys 0; 0, 1; 0 to 2; 0 to 3, and the second stays."""
    size, block = 64, 128
    options = Options(scale=1.0, causal=causal, window=None, soft_cap=None, offset=0)
    shape = jax.ShapeDtypeStruct((1, 4 * block, 1, size), jnp.bfloat16)

    def run(query, key, value):
        return forward(options, query, key, value, Positions(), blocks=(block, block))

    (found,) = kernel_traffic(run, shape, shape, shape)
    assert found.steps == pairs
    assert found.read == (4 * block * size * 2, loads * block * size * 2, loads * block * size * 2)
