"""One vector of a row, from the states of its tokens: what embeds a sentence.

states = model.encode(inputs, segment_ids=segment_ids)       # [B, S, D]
vectors = pool(states, segment_ids > 0, PoolingConfig('mean', normalize=True))
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from llm.errors import UserError

PoolingKind = Literal['mean', 'first', 'last']

# Of a vector that is divided by its length, as PyTorch has it.
_LEAST_LENGTH = 1e-12


@dataclasses.dataclass(frozen=True)
class PoolingConfig:
    """How the states of a row become one vector.

    Attributes:
        kind: 'mean' of all real tokens (Reimers and Gurevych 2019, section 3); 'first' real token, as BERT's [CLS];
            'last' real token, the only one of a causal model that has seen them all.
        normalize: whether the vector is divided by its Euclidean length, so that dot products are cosines.
    """

    kind: PoolingKind = 'mean'
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(PoolingKind):
            raise UserError(
                f'kind is {self.kind!r}',
                where='PoolingConfig.kind',
                fix=f'Use one of {", ".join(get_args(PoolingKind))}.',
            )


def pool(hidden: jax.Array, real: jax.Array, config: PoolingConfig = PoolingConfig()) -> jax.Array:
    """One vector of each row, in at least float32: [B, S, D] -> [B, D]. A row without real tokens gives zeros.

    Args:
        hidden: states of the tokens, wherever in the row they are.
        real: [B, S], whether a token is one of the text; padding is not.
    """
    x = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    real = real.astype(bool)
    weights = real.astype(x.dtype)
    if config.kind == 'mean':
        weights = weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1)
    else:
        index = jnp.arange(real.shape[1])
        chosen = (
            jnp.min(jnp.where(real, index, real.shape[1]), axis=1)
            if config.kind == 'first'
            else jnp.max(jnp.where(real, index, -1), axis=1)
        )
        weights = weights * (index == chosen[:, None])
    # A product with 0 would let an infinite state of padding through.
    vectors = jnp.einsum('BS,BSD->BD', weights, jnp.where(real[:, :, None], x, 0))
    if config.normalize:
        # The square root has no derivative at 0, where the maximum alone would give NaN.
        squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
        vectors = vectors * jax.lax.rsqrt(jnp.maximum(squares, _LEAST_LENGTH**2))
    return vectors
