"""The Mamba-2 layer: heads of one decay each, so that chunks are products of matrices (Dao and Gu 2024, section 7)."""

import dataclasses
import functools
from fractions import Fraction
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm.errors import UserError
from llm.kernels.projection import project
from llm.kernels.scan_dispatch import Implementation
from llm.kernels.ssd import ssd
from llm.models.context import Cache, Context
from llm.models.parameters import Role, bias, parameter
from llm.models.position import PositionKind
from llm.models.recurrence import Recurrence, check_implementation, check_positive
from llm.parallel.sharding import Axes, constrain, split_over


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """One Mamba-2 layer.

    Attributes:
        num_heads: H; num_heads * head_dim is usually twice the model's width.
        head_dim: K.
        state_size: N; a head's state is K x N.
        num_groups: G, heads of b and c, which the others share; also groups of the norm before the last projection.
        convolution_width: tokens that the convolution before the recurrence sees.
        convolution_bias: whether it has a bias.
        bias: biases on the projections into and out of the layer.
        norm_epsilon: of that norm, which is an RMS norm of y * silu(gate).
        implementation: which kernel of llm.kernels.ssd runs; 'auto' picks by device and length.
    """

    num_heads: int
    head_dim: int = 64
    state_size: int = 128
    num_groups: int = 1
    convolution_width: int = 4
    convolution_bias: bool = True
    bias: bool = False
    norm_epsilon: float = 1e-5
    implementation: Implementation = 'auto'

    def __post_init__(self) -> None:
        check_positive(self, 'num_heads', 'head_dim', 'state_size', 'num_groups', 'convolution_width')
        check_implementation(self, get_args(Implementation))
        if self.num_heads % self.num_groups:
            raise UserError(
                f'num_heads {self.num_heads} is not divisible by num_groups {self.num_groups}',
                where='Mamba2Config',
                fix='Each group of b and c serves the same number of heads.',
            )

    @property
    def state_elements(self) -> int:
        """Scalars of the state."""
        return self.num_heads * self.head_dim * self.state_size

    def build(self, d_model: int, position: PositionKind) -> 'Mamba2':
        """The module, of shapes without values; it needs no position."""
        return Mamba2(self, d_model)

    def scaled(self, ratio: Fraction) -> 'Mamba2Config':
        """The same layer in a model `ratio` times as wide: more heads (at least a group's), of the same sizes."""
        heads_per_group = max(1, round(self.num_heads * ratio / self.num_groups))
        return dataclasses.replace(self, num_heads=heads_per_group * self.num_groups)


class Mamba2(nnx.Module):
    """out(norm(ssd(silu(convolution(input(x)))) * silu(gate(x)))). Shapes: x [B, S, D] -> [B, S, D].

    What Mamba-2 computes in one projection and one convolution is several here, so that heads are divided over devices
    while b and c, which all heads share, are on each, and muP and Muon see matrices. muP: see Mamba.
    """

    def __init__(self, config: Mamba2Config, d_model: int) -> None:
        self.config = config
        h, k, g, n, w = (
            config.num_heads,
            config.head_dim,
            config.num_groups,
            config.state_size,
            config.convolution_width,
        )
        heads = ('heads', 'head_dim')
        groups = ('groups', 'state')

        def into(sizes: tuple[int, ...], axes: tuple[str, ...], branch: bool = False) -> nnx.Param:
            outputs = tuple(range(1, len(sizes) + 1))
            return parameter(
                (d_model, *sizes), ('embed', *axes), Role.HIDDEN, inputs=(0,), outputs=outputs, branch=branch
            )

        def convolution(sizes: tuple[int, int], axes: tuple[str, ...]) -> nnx.Param:
            return parameter(
                (w, *sizes), ('convolution', *axes), Role.VECTOR, inputs=(0,), outputs=(1, 2), start='uniform'
            )

        self.input, self.gate = into((h, k), heads, branch=True), into((h, k), heads, branch=True)
        self.b, self.c = into((g, n), groups), into((g, n), groups)
        self.dt = into((h,), heads[:1])
        self.output = parameter(
            (h, k, d_model), (*heads, 'embed'), Role.HIDDEN, inputs=(0, 1), outputs=(2,), residual=True
        )
        biased = config.bias
        self.input_bias, self.gate_bias = (bias((h, k), heads) if biased else None for _ in range(2))
        self.b_bias, self.c_bias = (bias((g, n), groups) if biased else None for _ in range(2))
        # Beside dt_bias it adds nothing but what checkpoints have.
        self.dt_projection_bias = bias((h,), heads[:1]) if biased else None
        self.output_bias = bias((d_model,), ('embed',)) if biased else None
        self.input_convolution = convolution((h, k), heads)
        self.b_convolution, self.c_convolution = convolution((g, n), groups), convolution((g, n), groups)
        biased = config.convolution_bias
        self.input_convolution_bias = bias((h, k), heads) if biased else None
        self.b_convolution_bias, self.c_convolution_bias = (bias((g, n), groups) if biased else None for _ in range(2))
        self.dt_bias = parameter((h,), heads[:1], Role.VECTOR, outputs=(0,), start='time_step')
        self.a_log = parameter((h,), heads[:1], Role.VECTOR, outputs=(0,), start='log_uniform')
        self.skip = parameter((h,), heads[:1], Role.VECTOR, outputs=(0,), constant=1.0)
        self.norm_scale = parameter((h, k), heads, Role.VECTOR, outputs=(0, 1), constant=1.0)

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None, repeat: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Run over the row or, with `cache`, on from the state in its `repeat`-th entry, which is then the last."""
        row = Recurrence.of(context, cache, repeat)
        heads: Axes = ('heads', 'head_dim')
        groups: Axes = ('groups', 'state')
        tokens: Axes = ('batch', 'sequence', *heads)
        gate = checkpoint_name(self._project(x, self.gate, self.gate_bias, heads), 'recurrence_gate')
        inner = checkpoint_name(self._project(x, self.input, self.input_bias, heads), 'recurrence_input')
        mixed, last = {}, {}
        for name, projected, weight, offset, axes in (
            ('input', inner, self.input_convolution, self.input_convolution_bias, heads),
            ('b', self._project(x, self.b, self.b_bias, groups), self.b_convolution, self.b_convolution_bias, groups),
            ('c', self._project(x, self.c, self.c_bias, groups), self.c_convolution, self.c_convolution_bias, groups),
        ):
            added = None if offset is None else offset[...]
            mixed[name], last[name] = row.convolve(projected, weight[...], added, axes, name)
        raw = project('BSD,DH->BSH', x, self.dt[...].astype(x.dtype))
        if self.dt_projection_bias is not None:
            raw = raw + self.dt_projection_bias[...].astype(x.dtype)
        raw = constrain(raw, ('batch', 'sequence', 'heads'))
        dt = row.time_steps(raw, self.dt_bias[...])

        b, c = mixed['b'], mixed['c']
        shared: Axes = ('batch', 'sequence', None, None)
        if self.config.num_groups > 1 and split_over('heads', parameters=False):
            # A device has some of the heads, which may be of any groups.
            b, c = (jnp.repeat(each, self.config.num_heads // self.config.num_groups, axis=2) for each in (b, c))
            shared = ('batch', 'sequence', 'heads', None)
        a_log = self.a_log[...]
        y, state = row.scan(
            functools.partial(ssd, implementation=self.config.implementation),
            {
                'x': mixed['input'],
                'dt': dt,
                'a': -jnp.exp(a_log.astype(jnp.promote_types(a_log.dtype, jnp.float32))),
                'b': b,
                'c': c,
            },
            {'x': tokens, 'dt': tokens[:3], 'a': ('heads',), 'b': shared, 'c': shared},
            ('batch', 'heads', None, None),
        )
        y = checkpoint_name(constrain(y, tokens), 'recurrence')
        # The backward pass keeps what goes in, and computes gate and norm again.
        finish = jax.checkpoint(self._gate_and_norm, prevent_cse=False)
        y = constrain(finish(y, mixed['input'], gate, self.skip[...], self.norm_scale[...]), tokens)
        out = project('BSHK,HKD->BSD', y, self.output[...].astype(x.dtype))
        if self.output_bias is not None:
            out = out + self.output_bias[...].astype(x.dtype)
        return constrain(out, ('batch', 'residual', 'embed')), row.updated(state=state, **last)

    def _gate_and_norm(
        self, y: jax.Array, x: jax.Array, gate: jax.Array, skip: jax.Array, scale: jax.Array
    ) -> jax.Array:
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        y = (y + skip.astype(x.dtype)[:, None] * x).astype(dtype) * jax.nn.silu(gate.astype(dtype))
        grouped = y.reshape(*y.shape[:2], self.config.num_groups, -1, y.shape[-1])
        squares = jnp.mean(jnp.square(grouped), axis=(-2, -1), keepdims=True)
        normed = (grouped * jax.lax.rsqrt(squares + self.config.norm_epsilon)).reshape(y.shape)
        return (normed * scale.astype(dtype)).astype(x.dtype)

    def init_cache(self, repeats: int, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Zeros: the last inputs of the convolutions, [repeats, B, W - 1, ...], and the state [repeats, B, H, K, N]."""
        config = self.config
        before = (repeats, batch, config.convolution_width - 1)
        shape = (repeats, batch, config.num_heads, config.head_dim, config.state_size)
        return {
            'input': jnp.zeros((*before, config.num_heads, config.head_dim), dtype),
            'b': jnp.zeros((*before, config.num_groups, config.state_size), dtype),
            'c': jnp.zeros((*before, config.num_groups, config.state_size), dtype),
            'state': jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32)),
        }

    def cache_axes(self) -> dict[str, Axes]:
        """Logical axes of the arrays of `init_cache`."""
        shared: Axes = (None, 'batch', None, None, None)
        return {
            'input': (None, 'batch', None, 'heads', None),
            'b': shared,
            'c': shared,
            'state': (None, 'batch', 'heads', None, None),
        }

    def _project(self, x: jax.Array, weight: nnx.Param, offset: nnx.Param | None, axes: Axes) -> jax.Array:
        y = project('BSD,DHK->BSHK', x, weight[...].astype(x.dtype))
        if offset is not None:
            y = y + offset[...].astype(x.dtype)
        return constrain(y, ('batch', 'sequence', *axes))
