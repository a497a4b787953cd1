"""What stands on an encoder: the head of a masked language model, the pooler, and a classifier on that."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llm.errors import UserError
from llm.models.feed_forward import ACTIVATIONS
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import Role, bias, parameter
from llm.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class MaskedLanguageModelHeadConfig:
    """The head of BERT (Devlin et al. 2019, appendix A.2, and its code): norm(act(dense(x))) @ embedding + bias.

    Attributes:
        activation: of the transform; one of feed-forward layers that gates nothing.
        norm: of the transform; None for none.
    """

    activation: str = 'gelu'
    norm: NormConfig | None = NormConfig('layer', 1e-12, bias=True)

    def __post_init__(self) -> None:
        plain = [name for name, (_, gated) in ACTIVATIONS.items() if not gated]
        if self.activation not in plain:
            raise UserError(
                f'activation is {self.activation!r}',
                where='MaskedLanguageModelHeadConfig',
                fix=f'Use one of {", ".join(plain)}.',
            )


class MaskedLanguageModelHead(nnx.Module):
    """The transform before the tied projection, and the projection's bias. Shapes: x [B, S, D] -> [B, S, size].

    Args:
        size: width of the embedding that the projection is tied to.
    """

    def __init__(self, config: MaskedLanguageModelHeadConfig, d_model: int, size: int, vocab_size: int) -> None:
        self.config = config
        self.dense = parameter((d_model, size), ('embed', 'embedding'), Role.HIDDEN, inputs=(0,), outputs=(1,))
        self.dense_bias = bias((size,), ('embedding',))
        self.norm = None if config.norm is None else Norm(config.norm, size, 'embedding')
        self.bias = bias((vocab_size,), ('vocab',))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.einsum('BSD,DF->BSF', x, self.dense[...].astype(x.dtype)) + self.dense_bias[...].astype(x.dtype)
        x = ACTIVATIONS[self.config.activation][0](x)
        x = x if self.norm is None else self.norm(x)
        return constrain(x, ('batch', 'residual', 'embed'))


class Pooler(nnx.Module):
    """One vector of a row: tanh(dense(first token)), as BERT has it. Shapes: x [B, S, D] -> [B, D]."""

    def __init__(self, d_model: int) -> None:
        self.dense = parameter((d_model, d_model), ('embed', 'pooled'), Role.HIDDEN, inputs=(0,), outputs=(1,))
        self.bias = bias((d_model,), ('pooled',))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.transform(x[:, :1])[:, 0]

    def transform(self, x: jax.Array) -> jax.Array:
        """The same of every token, for what is read at one of them: [B, S, D] -> [B, S, D]."""
        y = jnp.einsum('BSD,DF->BSF', x, self.dense[...].astype(x.dtype))
        return jnp.tanh(y + self.bias[...].astype(x.dtype))


class Classifier(nnx.Module):
    """Logits of a few classes, in at least float32. Shapes: x [..., D] -> [..., classes]."""

    def __init__(self, d_model: int, classes: int) -> None:
        self.kernel = parameter((d_model, classes), ('embed', 'classes'), Role.OUTPUT, inputs=(0,), outputs=(1,))
        self.bias = parameter((classes,), ('classes',), Role.VECTOR, outputs=(0,), constant=0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        logits = jnp.einsum('...D,DC->...C', x, self.kernel[...].astype(x.dtype), preferred_element_type=dtype)
        return logits + self.bias[...].astype(dtype)
