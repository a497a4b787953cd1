"""The Mamba layer: a gated selective state space (Gu and Dao 2023, section 3.4 and figure 3)."""

import dataclasses
import functools
from fractions import Fraction
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm.kernels.projection import project
from llm.kernels.scan_dispatch import Implementation
from llm.kernels.selective_scan import selective_scan
from llm.models.context import Cache, Context
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import Role, bias, parameter
from llm.models.position import PositionKind
from llm.models.recurrence import Recurrence, check_implementation, check_positive
from llm.parallel.sharding import Axes, constrain


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """One Mamba layer.

    Attributes:
        d_inner: F, channels of the scan; usually twice the model's width.
        dt_rank: rank of the projection that gives each channel its time step; usually 1/16 of the model's width.
        state_size: N, per channel.
        convolution_width: tokens that the convolution before the scan sees.
        convolution_bias: whether it has a bias.
        bias: biases on the projections into and out of the layer.
        state_norm: normalises time steps (before their projection), b and c (Jamba, Lieber et al. 2024, section 6.4).
        implementation: which kernel of llm.kernels.selective_scan runs; 'auto' picks by device and length.
    """

    d_inner: int
    dt_rank: int
    state_size: int = 16
    convolution_width: int = 4
    convolution_bias: bool = True
    bias: bool = False
    state_norm: NormConfig | None = None
    implementation: Implementation = 'auto'

    def __post_init__(self) -> None:
        check_positive(self, 'd_inner', 'dt_rank', 'state_size', 'convolution_width')
        check_implementation(self, get_args(Implementation))

    @property
    def state_elements(self) -> int:
        """Scalars of the state."""
        return self.d_inner * self.state_size

    def build(self, d_model: int, position: PositionKind) -> 'Mamba':
        """The module, of shapes without values; it needs no position."""
        return Mamba(self, d_model)

    def scaled(self, ratio: Fraction) -> 'MambaConfig':
        """The same layer in a model `ratio` times as wide: channels and rank in proportion, the same state."""
        d_inner, dt_rank = (max(1, round(size * ratio)) for size in (self.d_inner, self.dt_rank))
        return dataclasses.replace(self, d_inner=d_inner, dt_rank=dt_rank)


class Mamba(nnx.Module):
    """out(scan(silu(convolution(input(x)))) * silu(gate(x))). Shapes: x [B, S, D] -> [B, S, D].

    muP: b and c go from width to N, which is finite, and back into the width: they are hidden matrices, of a standard
    deviation and an Adam rate that fall with their fan-in.
    """

    def __init__(self, config: MambaConfig, d_model: int) -> None:
        self.config = config
        f, n, r, w = config.d_inner, config.state_size, config.dt_rank, config.convolution_width
        into, hidden = ('embed', 'mlp'), Role.HIDDEN
        self.input = parameter((d_model, f), into, hidden, inputs=(0,), outputs=(1,), branch=True)
        self.gate = parameter((d_model, f), into, hidden, inputs=(0,), outputs=(1,), branch=True)
        self.output = parameter((f, d_model), into[::-1], hidden, inputs=(0,), outputs=(1,), residual=True)
        self.input_bias = bias((f,), ('mlp',)) if config.bias else None
        self.gate_bias = bias((f,), ('mlp',)) if config.bias else None
        self.output_bias = bias((d_model,), ('embed',)) if config.bias else None
        self.convolution = parameter(
            (w, f), ('convolution', 'mlp'), Role.VECTOR, inputs=(0,), outputs=(1,), start='uniform'
        )
        self.convolution_bias = bias((f,), ('mlp',)) if config.convolution_bias else None
        self.dt_down = parameter((f, r), ('mlp', 'dt_rank'), hidden, inputs=(0,), outputs=(1,))
        self.dt_up = parameter((r, f), ('dt_rank', 'mlp'), hidden, inputs=(0,), outputs=(1,), start='uniform')
        self.dt_bias = parameter((f,), ('mlp',), Role.VECTOR, outputs=(0,), start='time_step')
        self.b = parameter((f, n), ('mlp', 'state'), hidden, inputs=(0,), outputs=(1,))
        self.c = parameter((f, n), ('mlp', 'state'), hidden, inputs=(0,), outputs=(1,))
        self.a_log = parameter((f, n), ('mlp', 'state'), Role.VECTOR, outputs=(0, 1), start='log_range')
        self.skip = parameter((f,), ('mlp',), Role.VECTOR, outputs=(0,), constant=1.0)
        norm = config.state_norm
        self.dt_norm = None if norm is None else Norm(norm, r, 'dt_rank')
        self.b_norm = None if norm is None else Norm(norm, n, 'state')
        self.c_norm = None if norm is None else Norm(norm, n, 'state')

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None, repeat: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Run over the row or, with `cache`, on from the state in its `repeat`-th entry, which is then the last."""
        row = Recurrence.of(context, cache, repeat)
        inner = checkpoint_name(self._project(x, self.input, self.input_bias), 'recurrence_input')
        gate = checkpoint_name(self._project(x, self.gate, self.gate_bias), 'recurrence_gate')
        convolution_bias = None if self.convolution_bias is None else self.convolution_bias[...]
        mixed, last_inputs = row.convolve(inner, self.convolution[...], convolution_bias, ('mlp',), 'convolution')

        # One product: the three are narrow, and where devices share the channels they are summed together.
        parts = self.dt_down, self.b, self.c
        small = project('BSF,FR->BSR', mixed, jnp.concatenate([p[...] for p in parts], axis=1).astype(x.dtype))
        rank, state = self.config.dt_rank, self.config.state_size
        small = constrain(small, ('batch', 'sequence', None))
        dt, b, c = jnp.split(small, (rank, rank + state), axis=-1)
        if self.dt_norm is not None and self.b_norm is not None and self.c_norm is not None:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        dt = project('BSR,RF->BSF', dt, self.dt_up[...].astype(x.dtype))
        dt = row.time_steps(constrain(dt, ('batch', 'sequence', 'mlp')), self.dt_bias[...])

        a_log = self.a_log[...]
        a = -jnp.exp(a_log.astype(jnp.promote_types(a_log.dtype, jnp.float32)))
        tokens: Axes = ('batch', 'sequence', 'mlp')
        y, state_after = row.scan(
            functools.partial(selective_scan, implementation=self.config.implementation),
            {'x': mixed, 'dt': dt, 'a': a, 'b': b, 'c': c},
            {'x': tokens, 'dt': tokens, 'a': ('mlp', None), **dict.fromkeys('bc', ('batch', 'sequence', None))},
            ('batch', None, 'mlp'),
        )
        y = checkpoint_name(constrain(y, tokens), 'recurrence')
        # The backward pass keeps what goes in, and computes the gate again.
        gated = jax.checkpoint(_gated, prevent_cse=False)(y, mixed, gate, self.skip[...])
        out = project('BSF,FD->BSD', gated, self.output[...].astype(x.dtype))
        if self.output_bias is not None:
            out = out + self.output_bias[...].astype(x.dtype)
        cache = row.updated(convolution=last_inputs, state=state_after)
        return constrain(out, ('batch', 'residual', 'embed')), cache

    def init_cache(self, repeats: int, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Zeros: the last inputs of the convolution [repeats, B, W - 1, F] and the state [repeats, B, N, F]."""
        f, config = self.config.d_inner, self.config
        return {
            'convolution': jnp.zeros((repeats, batch, config.convolution_width - 1, f), dtype),
            'state': jnp.zeros((repeats, batch, config.state_size, f), jnp.promote_types(dtype, jnp.float32)),
        }

    def cache_axes(self) -> dict[str, Axes]:
        """Logical axes of the arrays of `init_cache`."""
        return dict.fromkeys(('convolution', 'state'), (None, 'batch', None, 'mlp'))

    def _project(self, x: jax.Array, weight: nnx.Param, offset: nnx.Param | None) -> jax.Array:
        y = project('BSD,DF->BSF', x, weight[...].astype(x.dtype))
        if offset is not None:
            y = y + offset[...].astype(x.dtype)
        return constrain(y, ('batch', 'sequence', 'mlp'))


def _gated(y: jax.Array, x: jax.Array, gate: jax.Array, skip: jax.Array) -> jax.Array:
    return (y + skip.astype(x.dtype) * x) * jax.nn.silu(gate)
