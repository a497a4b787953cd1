"""From token ids to width, and from width to logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from llm.models.parameters import Role, parameter
from llm.parallel.sharding import constrain
from llm.parallel.vocabulary import lookup


class Embedding(nnx.Module):
    """A learned vector per id: tokens (axis 'vocab') or positions (axis 'positions')."""

    def __init__(self, size: int, d_model: int, axis: str) -> None:
        self.axis = axis
        self.table = parameter((size, d_model), (axis, 'embed'), Role.EMBEDDING, inputs=(0,), outputs=(1,))

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """ids [B, S] -> [B, S, D] in `dtype`. Ids outside the table are clamped into it."""
        x = lookup(self.table[...], ids, self.axis, dtype)
        return constrain(x, ('batch', 'sequence', 'embed'))


class Head(nnx.Module):
    """The output projection of a model whose embedding is not tied to it."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        self.kernel = parameter((d_model, vocab_size), ('embed', 'vocab'), Role.OUTPUT, inputs=(0,), outputs=(1,))


def project_to_vocabulary(
    hidden: jax.Array, kernel: jax.Array, *, multiplier: float, soft_cap: float | None
) -> jax.Array:
    """Logits in at least float32.

    Shapes: hidden [B, S, D], kernel [D, V] -> [B, S, V].

    Args:
        multiplier: factor on the logits before the cap.
        soft_cap: logits become cap * tanh(logits / cap) (Gemma 2, section 2); None for no cap.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum('BSD,DV->BSV', hidden, kernel.astype(hidden.dtype), preferred_element_type=dtype)
    logits = constrain(logits, ('batch', 'sequence', 'vocab'))
    if multiplier != 1:
        logits = logits * multiplier
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
