"""The feed-forward layer, plain or gated."""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm.errors import UserError
from llm.kernels.projection import project
from llm.models.parameters import Role, bias, parameter
from llm.parallel.sharding import constrain


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _relu_squared(x: jax.Array) -> jax.Array:
    return jnp.square(jax.nn.relu(x))


Activation = Literal['swiglu', 'geglu', 'geglu_exact', 'gelu', 'gelu_tanh', 'relu', 'relu_squared']

# Name -> (function, whether it gates a second projection). Gated: Shazeer 2020, eq. 6. Squared ReLU: So et al. 2021.
ACTIVATIONS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool]] = {
    'swiglu': (jax.nn.silu, True),
    'geglu': (jax.nn.gelu, True),
    'geglu_exact': (_gelu, True),
    'gelu': (_gelu, False),
    'gelu_tanh': (jax.nn.gelu, False),
    'relu': (jax.nn.relu, False),
    'relu_squared': (_relu_squared, False),
}


@dataclasses.dataclass(frozen=True)
class FeedForwardConfig:
    """One feed-forward layer.

    Attributes:
        d_ff: F, size of the hidden layer.
        activation: 'swiglu', 'geglu' (tanh approximation) and 'geglu_exact' gate a second projection; the others stand
            alone.
        bias: biases on all projections.
    """

    d_ff: int
    activation: Activation = 'swiglu'
    bias: bool = False

    def __post_init__(self) -> None:
        if self.d_ff < 1:
            raise UserError(f'd_ff is {self.d_ff}', where='FeedForwardConfig', fix='Use at least 1.')
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f'activation {self.activation!r} does not exist',
                where='FeedForwardConfig',
                fix=f'Use one of {", ".join(ACTIVATIONS)}.',
            )

    @property
    def gated(self) -> bool:
        """Whether there is a gate projection beside the up projection."""
        return ACTIVATIONS[self.activation][1]

    def build(self, d_model: int) -> 'FeedForward':
        """The module, of shapes without values."""
        return FeedForward(self, d_model)

    def scaled(self, ratio: Fraction) -> 'FeedForwardConfig':
        """The same layer in a model `ratio` times as wide."""
        return dataclasses.replace(self, d_ff=max(1, round(self.d_ff * ratio)))


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate. Shapes: x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: FeedForwardConfig, d_model: int) -> None:
        self.config = config
        shape, axes = (d_model, config.d_ff), ('embed', 'mlp')
        self.gate = (
            None if not config.gated else parameter(shape, axes, Role.HIDDEN, inputs=(0,), outputs=(1,), branch=True)
        )
        self.up = parameter(shape, axes, Role.HIDDEN, inputs=(0,), outputs=(1,), branch=True)
        self.down = parameter(shape[::-1], axes[::-1], Role.HIDDEN, inputs=(0,), outputs=(1,), residual=True)
        self.up_bias = bias(shape[1:], axes[1:]) if config.bias else None
        self.down_bias = bias(shape[:1], axes[:1]) if config.bias else None
        self.gate_bias = bias(shape[1:], axes[1:]) if config.bias and config.gated else None

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = _project(x, self.up, self.up_bias)
        # The backward pass keeps only what goes in, and computes the activation again.
        activate = jax.checkpoint(self._activate, prevent_cse=False)
        hidden = activate(hidden) if self.gate is None else activate(hidden, _project(x, self.gate, self.gate_bias))
        hidden = checkpoint_name(constrain(hidden, ('batch', 'sequence', 'mlp')), 'feed_forward_hidden')
        return constrain(_project(hidden, self.down, self.down_bias), ('batch', 'residual', 'embed'))

    def _activate(self, hidden: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        activation, _ = ACTIVATIONS[self.config.activation]
        return activation(hidden) if gate is None else activation(gate) * hidden


def _project(x: jax.Array, weight: nnx.Param, offset: nnx.Param | None) -> jax.Array:
    y = project('BSD,DF->BSF', x, weight[...].astype(x.dtype))
    return y if offset is None else y + offset[...].astype(x.dtype)
