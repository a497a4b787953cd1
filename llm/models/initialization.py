"""How parameters start: a table of specs becomes a nested dict of arrays."""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from llm.errors import UserError
from llm.models.parameters import ParameterSpec, Role, Start, named_specs

Scheme = Literal['gpt2', 'fan_in', 't_fixup', 't5', 'mup']
MAXIMUM_FLAT_DRAW = 2**26  # elements; a quarter of a gigabyte in float32


@dataclasses.dataclass(frozen=True)
class Initialization:
    """Which distribution each parameter is drawn from; parameters with a constant start at it under every scheme.

    Attributes:
        scheme:
            'gpt2': `std` everywhere, / sqrt(residual branches, 2L) on what ends a residual branch (Radford et al.
            2019, section 2.3).
            'fan_in': 1 / sqrt(fan-in) on matrices, `std` on embeddings.
            't_fixup': Huang et al. 2020, section 3.2: Xavier, embeddings of D^-1/2; then value, output and
            feed-forward matrices times 0.67 L^-1/4 (a decoder without cross-attention has the two branches of the
            paper's encoder), embeddings times (9 L)^-1/4.
            't5': as T5's code (Mesh TensorFlow), with std = 1: `std` on embeddings, 1 / sqrt(fan-in) on matrices, with
            1 / sqrt(K) besides on queries, whose scores lack it, and std / sqrt(D) on the relative bias.
            'mup': Yang et al. 2022, table 8: 1 / sqrt(fan-in) on hidden matrices, `std` on embeddings and `output_std`
            on the output projection at every width. Routers start as hidden matrices do.
        std: standard deviation; see scheme.
        output_std: standard deviation of an untied output projection under 'mup'; 0 starts it at zero, which makes
            the start independent of the width (Yang et al. 2022, appendix D.2).
        truncated: cut normal draws at two standard deviations, keeping the standard deviation as asked.
    """

    scheme: Scheme = 'gpt2'
    std: float = 0.02
    output_std: float = 0.0
    truncated: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise UserError(
                f'scheme {self.scheme!r} does not exist',
                where='Initialization',
                fix=f'Use one of {", ".join(get_args(Scheme))}.',
            )
        if self.std < 0 or self.output_std < 0:
            raise UserError(
                f'std is {self.std}, output_std {self.output_std}', where='Initialization', fix='Use at least 0.'
            )

    def standard_deviation(self, spec: ParameterSpec, branches: int) -> float:
        """Standard deviation of a parameter that has no constant.

        Args:
            branches: number of residual branches in the model, usually 2L.
        """
        embedding = spec.role is Role.EMBEDDING
        match self.scheme:
            case 'gpt2':
                return self.std / math.sqrt(branches) if spec.residual else self.std
            case 'fan_in':
                return self.std if embedding else 1 / math.sqrt(spec.fan_in)
            case 't_fixup':
                layers = branches / 2
                if embedding:
                    return spec.fan_out**-0.5 * (9 * layers) ** -0.25
                xavier = math.sqrt(2 / (spec.fan_in + spec.fan_out))
                return xavier * (0.67 * layers**-0.25 if spec.residual or spec.branch else 1.0)
            case 't5':
                return spec.gain * (self.std if embedding else 1 / math.sqrt(spec.fan_in))
            case 'mup':
                outside = {Role.EMBEDDING: self.std, Role.OUTPUT: self.output_std}
                return outside.get(spec.role, 1 / math.sqrt(spec.fan_in))


def _time_step_bias(key: jax.Array, spec: ParameterSpec) -> jax.Array:
    low, high = math.log(1e-3), math.log(1e-1)
    step = jnp.exp(jax.random.uniform(key, spec.shape, jnp.float32, low, high))
    return step + jnp.log(-jnp.expm1(-step))


def _uniform(key: jax.Array, spec: ParameterSpec) -> jax.Array:
    bound = spec.fan_in**-0.5
    return jax.random.uniform(key, spec.shape, jnp.float32, -bound, bound)


def _log_range(key: jax.Array, spec: ParameterSpec) -> jax.Array:
    return jnp.broadcast_to(jnp.log(jnp.arange(1, spec.shape[-1] + 1, dtype=jnp.float32)), spec.shape)


def _log_uniform(key: jax.Array, spec: ParameterSpec) -> jax.Array:
    return jnp.log(jax.random.uniform(key, spec.shape, jnp.float32, 1, 16))


# 'uniform': within 1 / sqrt(fan-in), as PyTorch starts a convolution and Mamba its time steps' projection.
# 'time_step': softplus of it is log-uniform from 0.001 to 0.1 (Gu and Dao 2023, section 3.6).
# 'log_range': log of 1, 2, ..., N, S4D-Real (the same). 'log_uniform': log of what is uniform from 1 to 16 (Mamba-2).
STARTS: dict[Start, Callable[[jax.Array, ParameterSpec], jax.Array]] = {
    'uniform': _uniform,
    'time_step': _time_step_bias,
    'log_range': _log_range,
    'log_uniform': _log_uniform,
}


def residual_branches(specs: dict[str, Any]) -> int:
    """Number of matrices that end a residual branch, counting every layer of a stack: 2L for a plain Transformer.

    Those of multi-token prediction stand beside the decoder, and change nothing in it.
    """
    stacks = ('layers', 'remainder')
    residual = [spec for _, spec in named_specs(specs) if spec.residual and spec.axes[0] != 'depths']
    return sum(spec.shape[0] if spec.axes[0] in stacks else 1 for spec in residual)


def initialize(
    specs: dict[str, Any], initialization: Initialization, seed: int | jax.Array, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Draw parameters: a nested dict of arrays that mirrors `specs`.

    Each draw is keyed by (seed, path) and is the same in any order and on any mesh. For a model larger than one
    device: jax.jit(functools.partial(initialize, specs, initialization), out_shardings=...)(seed).

    Args:
        dtype: of the arrays; draws are made in float32 and cast, so that float64 starts from the same values.
    """
    branches = residual_branches(specs)
    root = jax.random.key(seed, impl='threefry2x32')

    def draw(name: str, spec: ParameterSpec) -> jax.Array:
        if spec.constant is not None:
            return jnp.full(spec.shape, spec.constant, dtype)
        std = initialization.standard_deviation(spec, branches)
        key = jax.random.fold_in(root, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], 'little'))
        if spec.start is not None:
            return STARTS[spec.start](key, spec).astype(dtype)
        # Threefry counts elements in row-major order, so the flat draw has the same bits; on CPU it compiles ten times
        # faster. Large arrays are drawn in their own shape, which the compiler can divide over any mesh.
        size = math.prod(spec.shape)
        shape = (size,) if size <= MAXIMUM_FLAT_DRAW else spec.shape
        if initialization.truncated:
            # The standard normal cut at +-2 has standard deviation 0.8796.
            values = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) / 0.87962566103423978
        else:
            values = jax.random.normal(key, shape, jnp.float32)
        return (values * std).astype(dtype).reshape(spec.shape)

    values = [draw(name, spec) for name, spec in named_specs(specs)]
    return jax.tree.unflatten(jax.tree.structure(specs), values)
