"""RMSNorm and LayerNorm; statistics are taken in at least float32."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm.errors import UserError
from llm.models.parameters import Role, bias, parameter


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Which normalisation, over the last axis.

    Attributes:
        kind: 'rms' divides by the root mean square (Zhang and Sennrich 2019, eq. 4); 'layer' also subtracts the mean
            (Ba et al. 2016, eq. 3).
        epsilon: added to the mean square or variance.
        bias: whether a learned bias is added.
        unit_offset: multiply by 1 + scale, with scale starting at 0, as Gemma does; otherwise by scale, from 1.
    """

    kind: Literal['rms', 'layer'] = 'rms'
    epsilon: float = 1e-5
    bias: bool = False
    unit_offset: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ('rms', 'layer'):
            raise UserError(f'kind is {self.kind!r}', where='NormConfig.kind', fix="Use 'rms' or 'layer'.")
        if not self.epsilon > 0:
            raise UserError(
                f'epsilon is {self.epsilon}', where='NormConfig.epsilon', fix='Use a small positive number.'
            )


class Norm(nnx.Module):
    """Normalisation over the last axis, or the last few. Shapes: x [..., *size] -> the same, in the dtype of x.

    Args:
        size: of the parameters, and of the last axes of x; `axis` names them.
        over: how many of the last axes are normalised together.
    """

    def __init__(
        self,
        config: NormConfig,
        size: int | tuple[int, ...],
        axis: str | tuple[str, ...] = 'embed',
        *,
        over: int = 1,
    ) -> None:
        self.config = config
        self.over = over
        shape, axes = (size,) if isinstance(size, int) else size, (axis,) if isinstance(axis, str) else axis
        outputs = tuple(range(len(shape)))
        self.scale = parameter(shape, axes, Role.VECTOR, outputs=outputs, constant=0.0 if config.unit_offset else 1.0)
        self.bias = bias(shape, axes) if config.bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # The backward pass keeps x and computes the statistics again.
        bias = None if self.bias is None else self.bias[...]
        return jax.checkpoint(self._normalize, prevent_cse=False)(x, self.scale[...], bias)

    def _normalize(self, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        dtype = x.dtype
        axes = tuple(range(-self.over, 0))
        x = x.astype(jnp.promote_types(dtype, jnp.float32))
        if self.config.kind == 'layer':
            x = x - jnp.mean(x, axis=axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + self.config.epsilon)
        scale = scale.astype(x.dtype)
        x = x * (1 + scale if self.config.unit_offset else scale)
        if bias is not None:
            x = x + bias.astype(x.dtype)
        return x.astype(dtype)
