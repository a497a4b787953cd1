"""From token ids to width, and from width to logits."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llm.models.parameters import Role, parameter
from llm.parallel.lookup import lookup
from llm.parallel.sharding import Axes, constrain


class Embedding(nnx.Module):
    """A learned vector per id: tokens (axis 'vocab') or positions (axis 'positions')."""

    def __init__(self, size: int, d_model: int, axis: str) -> None:
        self.table = parameter((size, d_model), (axis, 'embed'), Role.EMBEDDING, inputs=(0,), outputs=(1,))

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """ids [B, S] -> [B, S, D] in `dtype`. Ids outside the table are clamped into it."""
        axes = self.table.get_metadata('spec').axes
        x = lookup(self.table[...], ids, axes, dtype)
        return x if ids.shape[0] == 1 else constrain(x, ('batch', 'residual', 'embed'))


class Head(nnx.Module):
    """An output projection: to the vocabulary, where the embedding is not tied to it, or to other outputs."""

    def __init__(self, d_model: int, size: int, axis: str = 'vocab') -> None:
        self.kernel = parameter((d_model, size), ('embed', axis), Role.OUTPUT, inputs=(0,), outputs=(1,))


@dataclasses.dataclass(frozen=True)
class Projection:
    """From width to vocabulary: logits are cap(multiplier * hidden @ kernel + bias).

    Attributes:
        kernel: [D, V].
        axes: logical axes of the parameter that it is: ('embed', 'vocab'), or of the tied table ('vocab', 'embed');
            'outputs' instead of 'vocab' for other outputs.
        multiplier: factor on the logits before the cap.
        soft_cap: logits become cap * tanh(logits / cap) (Gemma 2, section 2); None for no cap.
        bias: [V], or None.
    """

    kernel: jax.Array
    axes: Axes
    multiplier: float
    soft_cap: float | None
    bias: jax.Array | None = None

    @property
    def output_axis(self) -> str:
        """The logical axis of the outputs."""
        return next(str(axis) for axis in self.axes if axis != 'embed')

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Logits in at least float32: [B, S, D] -> [B, S, V]."""
        dtype = jnp.promote_types(hidden.dtype, jnp.float32)
        kernel = self.kernel.astype(hidden.dtype)
        logits = jnp.einsum('BSD,DV->BSV', hidden, kernel, preferred_element_type=dtype)
        logits = constrain(logits, ('batch', 'sequence', self.output_axis))
        if self.multiplier != 1:
            logits = logits * self.multiplier
        if self.bias is not None:
            logits = logits + self.bias.astype(dtype)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)
