"""How a model knows the order of its tokens: rotary, ALiBi, sinusoidal (learned and relative have parameters)."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

PositionKind = Literal['rope', 'alibi', 'learned', 'sinusoidal', 'relative', 'none']


@dataclasses.dataclass(frozen=True, order=True)
class Rotary:
    """Which rotary embedding (Su et al. 2021, section 3.2.2) a head gets; hashable, so that layers share one table.

    Attributes:
        head_dim: K.
        base: the wavelengths run from 2 pi to about 2 pi base.
        fraction: part of the head that is rotated; the rest carries no position (GPT-J, GPT-NeoX).
    """

    head_dim: int
    base: float
    fraction: float

    @property
    def size(self) -> int:
        """Number of rotated dimensions."""
        return int(self.head_dim * self.fraction)


def rotary_table(rotary: Rotary, positions: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., S, size / 2] of the rotation angles at `positions` [..., S]."""
    exponents = jnp.arange(0, rotary.size, 2, dtype=dtype) / rotary.size
    angles = positions[..., None].astype(dtype) * rotary.base**-exponents
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the first dimensions of each head by the angles of `rotary_table`.

    Dimension i is paired with i + size / 2, as in GPT-NeoX and Hugging Face's Llama (Su et al. pair neighbours; the
    two differ by a permutation of the rows of the query and key projections).

    Shapes: x [B, S, H, K], table of [B or 1, S, size / 2] -> [B, S, H, K], in the dtype of x.
    """
    cosines, sines = (t[:, :, None, :] for t in table)
    half = cosines.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(cosines.dtype), second.astype(cosines.dtype)
    rotated = (first * cosines - second * sines, second * cosines + first * sines)
    return jnp.concatenate([*(r.astype(x.dtype) for r in rotated), rest], axis=-1)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """Slope of each head's linear distance penalty (Press et al. 2022, section 3): geometric from 2^(-8/H) to 2^-8.

    When H is no power of two, the slopes of the power of two below come first, then every other slope of the one
    above, as in the authors' code.
    """
    below = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    slopes += [2 ** (-8 * (i + 1) / (2 * below)) for i in range(0, 2 * below, 2)]
    return tuple(slopes[:num_heads])


def sinusoids(positions: jax.Array, d_model: int, dtype: jnp.dtype) -> jax.Array:
    """Sinusoidal position encoding [..., S, D] at `positions` [..., S] (Vaswani et al. 2017, section 3.5)."""
    angles = positions[..., None].astype(dtype) * 10_000.0 ** (-jnp.arange(0, d_model, 2, dtype=dtype) / d_model)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, d_model)


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Position of each token within its segment: segment_ids [B, S], equal ids contiguous -> [B, S] from 0."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
