"""What Mamba layers share: the short convolution, the scan on every device's part, a state of constant size."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm.errors import UserError
from llm.kernels.attention.sequence_axis import SequenceAxis
from llm.kernels.convolution import activated_convolution
from llm.models.context import Cache, Context
from llm.parallel.sharding import Axes, SequenceCut, map_shards, sequence_cut, target_device


def check_positive(config: Any, *names: str) -> None:
    """Raises UserError for a field of a configuration that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise UserError(f'{name} is {getattr(config, name)}', where=type(config).__name__, fix='Use at least 1.')


def check_implementation(config: Any, choices: tuple[str, ...]) -> None:
    """Raises UserError for an implementation that does not exist."""
    if config.implementation not in choices:
        raise UserError(
            f'implementation is {config.implementation!r}',
            where=type(config).__name__,
            fix=f'Use one of {", ".join(choices)}.',
        )


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """How one layer goes through the rows of one call: whole rows, pieces of them, or on from a cache.

    Attributes:
        context: of the call.
        cache: stacked states of the layers, entry `repeat` of which is this one's; None when training.
        cut: how devices share rows.
    """

    context: Context
    cache: Cache | None
    repeat: jax.Array | int
    cut: SequenceCut | None

    @classmethod
    def of(cls, context: Context, cache: Cache | None, repeat: jax.Array | int) -> 'Recurrence':
        """With the rules in force."""
        return cls(context, cache, repeat, sequence_cut() if cache is None else None)

    @property
    def _sequence(self) -> str | None:
        return None if self.cut is None else 'sequence'

    def _run(
        self, function: Callable[..., Any], arrays: dict[str, jax.Array], axes: dict[str, Axes], out: list[Axes]
    ) -> Any:
        """`function`, with segment ids and the sequence axis, on each device's part."""
        if self.cut is not None:
            zigzag = self.context.token_index is not None
            axis = SequenceAxis(self.cut.axis, self.cut.pieces, self.cut.method, zigzag)
            function = functools.partial(function, sequence_axis=axis)
        if self.context.segment_ids is not None:
            arrays = arrays | {'segment_ids': self.context.segment_ids}
            axes = axes | {'segment_ids': ('batch', self._sequence)}
        return map_shards(function, arrays, axes, out)

    def convolve(
        self, x: jax.Array, weight: jax.Array, bias: jax.Array | None, channels: Axes, name: str
    ) -> tuple[jax.Array, jax.Array | None]:
        """silu of the causal convolution, and what the cache keeps of x: its last inputs, [B, W - 1, ...].

        Args:
            x: [B, S, ...] with trailing logical axes `channels`. weight: [W, ...]. bias: [...].
            name: of the cache's array.
        """

        def convolution(**arrays: Any) -> list[jax.Array]:
            return [activated_convolution(**arrays, device=target_device())]

        arrays = {'x': x, 'weight': weight}
        axes: dict[str, Axes] = {'x': ('batch', self._sequence, *channels), 'weight': (None, *channels)}
        if bias is not None:
            arrays['bias'], axes['bias'] = bias, channels
        kept = None
        if self.cache is not None:
            history = self.cache[name][self.repeat].astype(x.dtype)
            arrays['history'], axes['history'] = history, ('batch', None, *channels)
            kept = self._last_inputs(jnp.concatenate([history, x], axis=1), history.shape[1])
        return self._run(convolution, arrays, axes, [axes['x']])[0], kept

    def _last_inputs(self, longer: jax.Array, width: int) -> jax.Array:
        lengths = self.context.lengths
        if lengths is None:
            return longer[:, longer.shape[1] - width :]
        index = lengths[:, None] + jnp.arange(width)
        return jnp.take_along_axis(longer, index.reshape(*index.shape, *(1,) * (longer.ndim - 2)), axis=1)

    def time_steps(self, raw: jax.Array, bias: jax.Array) -> jax.Array:
        """softplus(raw + bias) in at least fp32, and 0 at padding: [B, S, ...] and [...] -> [B, S, ...]."""
        dtype = jnp.promote_types(raw.dtype, jnp.float32)
        steps = jax.nn.softplus(raw.astype(dtype) + bias.astype(dtype))
        lengths = self.context.lengths
        if lengths is None:
            return steps
        real = jnp.arange(raw.shape[1]) < lengths[:, None]
        return jnp.where(real.reshape(*real.shape, *(1,) * (raw.ndim - 2)), steps, 0)

    def scan(
        self,
        function: Callable[..., tuple[jax.Array, jax.Array]],
        arrays: dict[str, jax.Array],
        axes: dict[str, Axes],
        state: Axes,
    ) -> tuple[jax.Array, jax.Array]:
        """(y, state) of a recurrence of llm.kernels.

        Args:
            function: with the arguments of `selective_scan`.
            axes: logical axes of the arrays, 'sequence' where tokens are; state: those of a state.
        """
        if self.cache is not None:
            arrays = arrays | {'initial_state': self.cache['state'][self.repeat]}
            axes = axes | {'initial_state': state}
        if self.cut is None:
            axes = {name: tuple(None if axis == 'sequence' else axis for axis in each) for name, each in axes.items()}
        function = functools.partial(function, device=target_device())

        def run(**parts: Any) -> list[jax.Array]:
            y, final = function(**parts)
            return [y] if self.cache is None else [y, final]

        y, *final = self._run(run, arrays, axes, [axes['x']] if self.cache is None else [axes['x'], state])
        return y, final[0] if final else y

    def updated(self, **entries: jax.Array | None) -> Cache | None:
        """The cache with these arrays as this layer's entry."""
        if self.cache is None:
            return None
        cache = dict(self.cache)
        for name, entry in entries.items():
            if entry is not None:
                whole = cache[name]
                cache[name] = jax.lax.dynamic_update_index_in_dim(whole, entry.astype(whole.dtype), self.repeat, 0)
        return cache
