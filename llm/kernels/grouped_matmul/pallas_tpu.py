"""Grouped matrix product for TPUs: the Pallas kernels that come with JAX (megablox: Gale et al. 2022), and their tiles.

XLA:TPU has a kernel of its own for `jax.lax.ragged_dot`, but none for the gradient of the matrices, which it makes a
dense product of every row with every expert, masked; and it transposes a copy of the matrices for the gradient of the
rows. FLOPs of the three products over what is needed (`cost_analysis()`, v5e, bf16) and their HBM traffic with each
operand of a kernel once (`llm.scaling.program.hbm_bytes`), here and with `ragged_dot`:

    Mixtral-8x7B, 8,192 rows:       1.0 and  3.3;  4.19 and 5.54 GB
    OLMoE, 64 experts, 32,768 rows: 1.0 and 22.0;  1.74 and 1.88 GB
    Qwen3-30B, 128 experts, 32,768: 1.0 and 43.4;  1.98 and 2.52 GB

What tiles lose at the borders of groups is in neither: if groups have two tiles or more, a third of them at most.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

_WIDE = 1024  # columns of a tile
_MATRIX = 4 * 2**20  # bytes of one tile of a matrix; there are two of them in VMEM


def _tiles(rows: int, groups: int, inner: int, outer: int, itemsize: int) -> tuple[int, int, int]:
    """Rows, inner and outer columns of a tile: each group fills up its last tile of rows, so these follow its size."""
    wide = min(outer, _WIDE)
    whole = inner * wide * itemsize <= _MATRIX  # then a matrix is read once for all the rows of its group
    return _row_tile(rows, groups), inner if whole else min(inner, _WIDE), wide


def _row_tile(rows: int, groups: int) -> int:
    return next(size for size in (512, 256, 128) if size == 128 or size * groups * 2 <= rows)


def grouped_matmul(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, interpret: bool = False) -> jax.Array:
    """As `reference.grouped_matmul`.

    Args:
        interpret: run the kernels without a TPU.
    """
    rows = lhs.shape[0]
    filled = jnp.pad(lhs, ((0, -rows % _row_tile(rows, len(rhs))), (0, 0)))
    return _product(interpret, filled, rhs, sizes.astype(jnp.int32))[:rows]


def _of_groups(x: jax.Array, sizes: jax.Array) -> jax.Array:
    """Zeros in place of the rows after the last group, which the kernels never write."""
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), x, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(interpret: bool, lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
    groups, inner, outer = rhs.shape
    tiles = _tiles(len(lhs), groups, inner, outer, lhs.dtype.itemsize)
    return _of_groups(gmm(lhs, rhs, sizes, lhs.dtype, tiles, interpret=interpret), sizes)


def _forward(
    interpret: bool, lhs: jax.Array, rhs: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _product(interpret, lhs, rhs, sizes), (lhs, rhs, sizes)


def _backward(interpret: bool, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    lhs, rhs, sizes = kept
    groups, inner, outer = rhs.shape
    tiles = _tiles(len(lhs), groups, outer, inner, lhs.dtype.itemsize)
    d_lhs = gmm(gradient, rhs, sizes, lhs.dtype, tiles, transpose_rhs=True, interpret=interpret)
    tiles = _row_tile(len(lhs), groups), min(inner, _WIDE), min(outer, _WIDE)
    d_rhs = tgmm(lhs.swapaxes(0, 1), gradient, sizes, rhs.dtype, tiles, interpret=interpret)
    return _of_groups(d_lhs, sizes), d_rhs, None


_product.defvjp(_forward, _backward)
