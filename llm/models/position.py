"""How a model knows the order of its tokens: rotary, ALiBi, sinusoidal (learned and relative have parameters)."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llm.errors import UserError

PositionKind = Literal['rope', 'alibi', 'learned', 'sinusoidal', 'relative', 'none']
ScalingKind = Literal['none', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope']


@dataclasses.dataclass(frozen=True, order=True)
class RotaryScaling:
    """How rotation is slowed down for rows that are longer than those of pretraining.

    Attributes:
        kind:
            'linear': every frequency / factor (Chen et al. 2023, "Position Interpolation", eq. 4).
            'dynamic': from rows of `original_length` on, a larger base, so that the slowest frequency falls with the
            length of the row and the fastest stays (bloc97 and emozilla 2023, "dynamic NTK").
            'llama3': slow frequencies / factor, fast ones as they are, those between in part (Llama 3.1).
            'yarn': the same with a ramp over dimensions (Peng et al. 2023, YaRN, section 3.2).
            'longrope': each frequency / its own factor, one set for rows of up to `original_length`, one for longer
            ones (Ding et al. 2024, LongRoPE).
        factor: how many times as long rows may be.
        original_length: tokens of the rows of pretraining.
        attention_factor: cosines and sines are multiplied by it, so scores by its square (YaRN, eq. 22; LongRoPE).
        low_frequency_factor, high_frequency_factor: 'llama3': wavelengths over original_length / low are slow, those
            under original_length / high fast.
        beta_fast, beta_slow: 'yarn': the ramp runs between the dimensions that turn this often in original_length.
        truncate: 'yarn': whether the ends of the ramp are whole dimensions.
        short_factors, long_factors: 'longrope': a number for each pair of dimensions.
    """

    kind: ScalingKind = 'none'
    factor: float = 1.0
    original_length: int = 0
    attention_factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        where = 'RotaryScaling'
        if self.kind not in get_args(ScalingKind):
            raise UserError(
                f'kind is {self.kind!r}', where=where, fix=f'Use one of {", ".join(get_args(ScalingKind))}.'
            )
        if self.factor < 1 or self.attention_factor <= 0:
            raise UserError(
                f'factor is {self.factor}, attention_factor {self.attention_factor}',
                where=where,
                fix='Use a factor of at least 1 and a positive attention_factor.',
            )
        if self.kind in ('dynamic', 'llama3', 'yarn', 'longrope') and self.original_length < 1:
            raise UserError(
                f'original_length is {self.original_length}', where=where, fix='Set the length of pretraining.'
            )
        if self.kind == 'llama3' and not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise UserError(
                f'low_frequency_factor {self.low_frequency_factor} is not below high_frequency_factor '
                f'{self.high_frequency_factor}',
                where=where,
                fix='Let 0 < low < high.',
            )
        if self.kind == 'yarn' and not 0 < self.beta_slow < self.beta_fast:
            raise UserError(
                f'beta_slow {self.beta_slow} is not below beta_fast {self.beta_fast}',
                where=where,
                fix='Let 0 < beta_slow < beta_fast.',
            )
        factors = self.short_factors + self.long_factors
        if (self.kind == 'longrope') != bool(factors) or any(not factor > 0 for factor in factors):
            raise UserError(
                f'kind {self.kind!r} with {len(self.short_factors)} short_factors and {len(self.long_factors)} '
                'long_factors',
                where=where,
                fix="Give positive ones to 'longrope' and none to others.",
            )


@dataclasses.dataclass(frozen=True, order=True)
class Rotary:
    """Which rotary embedding (Su et al. 2021, section 3.2.2) a head gets; hashable, so that layers share one table.

    Attributes:
        head_dim: K.
        base: the wavelengths run from 2 pi to about 2 pi base.
        fraction: part of the head that is rotated; the rest carries no position (GPT-J, GPT-NeoX).
        scaling: for longer rows.
    """

    head_dim: int
    base: float
    fraction: float
    scaling: RotaryScaling = RotaryScaling()

    @property
    def size(self) -> int:
        """Number of rotated dimensions."""
        return int(self.head_dim * self.fraction)

    def slowing(self, length: int) -> np.ndarray:
        """What each frequency is multiplied by in rows of `length` tokens, [size / 2]. See RotaryScaling."""
        scaling, size = self.scaling, self.size
        exponents = np.arange(0, size, 2) / size
        match scaling.kind:
            case 'none':
                return np.ones(size // 2)
            case 'linear':
                return np.full(size // 2, 1 / scaling.factor)
            case 'dynamic':
                times = max(length, scaling.original_length) / scaling.original_length
                return (scaling.factor * times - (scaling.factor - 1)) ** (-exponents * size / (size - 2))
            case 'llama3':
                turns = scaling.original_length * self.base**-exponents / (2 * math.pi)
                low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
                kept = np.clip((turns - low) / (high - low), 0, 1)
            case 'yarn':
                # The dimension, counted in pairs, that turns so often in original_length.
                ends = [
                    size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))
                    for turns in (scaling.beta_fast, scaling.beta_slow)
                ]
                if scaling.truncate:
                    ends = [math.floor(ends[0]), math.ceil(ends[1])]
                low, high = max(ends[0], 0), min(ends[1], size - 1)
                # As the authors' code: a ramp of no length would divide by zero.
                kept = 1 - np.clip((np.arange(size // 2) - low) / (high - low or 0.001), 0, 1)
            case 'longrope':
                return 1 / np.array(scaling.long_factors if length > scaling.original_length else scaling.short_factors)
        return kept + (1 - kept) / scaling.factor


def rotary_table(
    rotary: Rotary, positions: jax.Array, dtype: jnp.dtype, length: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., S, size / 2] of the rotation angles at `positions` [..., S].

    Args:
        length: of the rows, for scalings that depend on it; default S. When decoding it must be one number from the
            first token to the last (the cache's length), or keys would be turned by other angles than queries.
    """
    exponents = jnp.arange(0, rotary.size, 2, dtype=dtype) / rotary.size
    frequencies = rotary.base**-exponents
    if rotary.scaling.kind != 'none':
        frequencies *= jnp.asarray(rotary.slowing(positions.shape[-1] if length is None else length), dtype)
    angles = positions[..., None].astype(dtype) * frequencies
    cosines, sines = jnp.cos(angles), jnp.sin(angles)
    factor = rotary.scaling.attention_factor
    return (cosines, sines) if factor == 1 else (cosines * factor, sines * factor)


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


def positions_of(inputs: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """From 0 in each segment, or in the row: [B or 1, S]."""
    if segment_ids is None:
        return jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
    return segment_positions(segment_ids)


def check_length(length: int, longest: int | None, where: str) -> None:
    """Raises UserError where a row is longer than the learned positions; None is no limit."""
    if longest is not None and length > longest:
        raise UserError(
            f'a sequence of {length} tokens is longer than the {longest} learned positions',
            where=where,
            fix='Shorten the sequences or raise max_positions.',
        )
