"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are made of one small vector a token."""

import dataclasses
import math
from fractions import Fraction
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm.errors import UserError
from llm.kernels.attention import Implementation
from llm.kernels.projection import project
from llm.models.attention import attend
from llm.models.context import CACHED_TOKENS, Cache, Context, write_cache
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import Role, parameter
from llm.models.position import PositionKind, Rotary, RotaryScaling, rotate
from llm.parallel.sharding import Axes, constrain, sequence_cut


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig:
    """One layer of latent attention.

    Attributes:
        num_heads: H.
        latent: R, size of the vector that keys and values are made of, and that a cache holds.
        query_latent: the same for queries; None makes them of the token itself.
        plain_dim: of each head's query and key, without positions.
        rotary_dim: of each head's query and key, rotated; the key's is one for all heads, and not made of the latent.
        value_dim: of each head's value.
        norm: of the latents.
        rotary_base, rotary_scaling: see Rotary.
        rotary_neighbours: rotated dimensions are paired with their neighbours, as in DeepSeek's checkpoints, rather
            than first half with second.
        scale: factor on the scores; None for 1 / sqrt(plain_dim + rotary_dim).
        implementation: which kernel of llm.kernels.attention runs; 'auto' picks by device and shape.
    """

    num_heads: int
    latent: int
    plain_dim: int
    rotary_dim: int
    value_dim: int
    query_latent: int | None = None
    norm: NormConfig = NormConfig()
    rotary_base: float = 10_000.0
    rotary_scaling: RotaryScaling = RotaryScaling()
    rotary_neighbours: bool = False
    scale: float | None = None
    implementation: Implementation = 'auto'

    def __post_init__(self) -> None:
        where = 'LatentAttentionConfig'
        for name in ('num_heads', 'latent', 'plain_dim', 'rotary_dim', 'value_dim', 'query_latent'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f'{name} is {value}', where=where, fix='Use at least 1.')
        if self.rotary_dim % 2:
            raise UserError(f'rotary_dim {self.rotary_dim} is odd', where=where, fix='Dimensions are rotated in pairs.')
        if self.value_dim > self.head_dim:
            raise UserError(
                f'value_dim {self.value_dim} is more than plain_dim and rotary_dim together, {self.head_dim}',
                where=where,
                fix='Use at most that.',
            )
        if self.implementation not in get_args(Implementation):
            choices = ', '.join(get_args(Implementation))
            raise UserError(f'implementation is {self.implementation!r}', where=where, fix=f'Use one of {choices}.')

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return self.plain_dim + self.rotary_dim

    @property
    def num_kv_heads(self) -> int:
        """Every head has its own keys and values, once they are made."""
        return self.num_heads

    @property
    def window(self) -> None:
        """Each token sees all before it."""
        return None

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding of this layer's queries and keys."""
        return Rotary(self.rotary_dim, self.rotary_base, 1.0, self.rotary_scaling)

    @property
    def score_scale(self) -> float:
        """Factor on the scores q . k."""
        return 1 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    def build(self, d_model: int, position: PositionKind) -> 'LatentAttention':
        """The module, of shapes without values.

        Raises:
            UserError: the model has other positions than rotary ones.
        """
        if position != 'rope':
            raise UserError(
                f'position is {position!r}, and latent attention has rotary_dim',
                where='DecoderConfig.position',
                fix="Use 'rope'.",
            )
        return LatentAttention(self, d_model)

    def scaled(self, ratio: Fraction) -> 'LatentAttentionConfig':
        """The same layer in a model `ratio` times as wide: more heads, wider latents, the same head sizes."""
        wider = {'num_heads': self.num_heads, 'latent': self.latent, 'query_latent': self.query_latent}
        sizes: dict[str, Any] = {name: max(1, round(n * ratio)) for name, n in wider.items() if n is not None}
        return dataclasses.replace(self, **sizes)


class LatentAttention(nnx.Module):
    """Causal self-attention through latents. Shapes: x [B, S, D] -> [B, S, D].

    A cache holds R + rotary_dim numbers a token. For a few new tokens the projections from the latent are applied to
    the queries and to the result instead of to all that is cached (DeepSeek-V2, section 2.1.3, "absorbed").
    """

    def __init__(self, config: LatentAttentionConfig, d_model: int) -> None:
        self.config = config
        h, r, k = config.num_heads, config.latent, config.head_dim
        heads = ('heads', 'head_dim')

        def inward(size: int, axes: tuple[str, ...], *outputs: int, branch: bool = False) -> nnx.Param:
            many = tuple(range(1, 1 + len(outputs)))
            return parameter((size, *outputs), axes, Role.HIDDEN, inputs=(0,), outputs=many, branch=branch)

        first = config.query_latent
        self.query_down = None if first is None else inward(d_model, ('embed', 'latent'), first)
        self.query_norm = None if first is None else Norm(config.norm, first, 'latent')
        self.query = inward(d_model, ('embed', *heads), h, k) if first is None else None
        self.query_up = None if first is None else inward(first, ('latent', *heads), h, k)
        self.latent = inward(d_model, ('embed', 'latent'), r, branch=True)
        self.latent_norm = Norm(config.norm, r, 'latent')
        self.rotary_key = inward(d_model, ('embed', 'head_dim'), config.rotary_dim)
        self.key = inward(r, ('latent', *heads), h, config.plain_dim)
        self.value = inward(r, ('latent', *heads), h, config.value_dim, branch=True)
        self.output = parameter(
            (h, config.value_dim, d_model), (*heads, 'embed'), Role.HIDDEN, inputs=(0, 1), outputs=(2,), residual=True
        )

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None, repeat: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Attend to the row itself or, with `cache`, to the `repeat`-th entry of the cache after storing the row."""
        config, dtype = self.config, x.dtype
        table = context.rotary[config.rotary]
        query = constrain(self._query(x), ('batch', 'sequence', 'heads', 'head_dim'))
        plain, rotated = query[..., : config.plain_dim], query[..., config.plain_dim :]
        rotated = self._rotate(rotated, table)
        latent = self.latent_norm(project('BSD,DR->BSR', x, self.latent[...].astype(dtype)))
        rotary_key = project('BSD,DK->BSK', x, self.rotary_key[...].astype(dtype))
        rotary_key = self._rotate(rotary_key[:, :, None], table)[:, :, 0]
        if cache is not None:
            cache = {
                'latent': write_cache(cache['latent'], latent, repeat, context.offset),
                'rotary_key': write_cache(cache['rotary_key'], rotary_key, repeat, context.offset),
            }
            latent, rotary_key = (cache[name][repeat].astype(dtype) for name in ('latent', 'rotary_key'))
        if cache is not None and self._absorbing(x.shape[1]):
            mixed = self._absorbed(plain, rotated, latent, rotary_key, context)
        else:
            mixed = self._expanded(plain, rotated, latent, rotary_key, context, cached=cache is not None)
        mixed = checkpoint_name(constrain(mixed, ('batch', 'sequence', 'heads', 'head_dim')), 'attention')
        y = project('BSHK,HKD->BSD', mixed, self.output[...].astype(dtype))
        return constrain(y, ('batch', 'residual', 'embed')), cache

    def _query(self, x: jax.Array) -> jax.Array:
        if self.query is not None:
            return project('BSD,DHK->BSHK', x, self.query[...].astype(x.dtype))
        assert self.query_down is not None and self.query_norm is not None and self.query_up is not None
        latent = self.query_norm(project('BSD,DR->BSR', x, self.query_down[...].astype(x.dtype)))
        return project('BSR,RHK->BSHK', latent, self.query_up[...].astype(x.dtype))

    def _absorbing(self, queries: int) -> bool:
        """Whether products with the latent itself are fewer than making all keys and values anew."""
        made = self.config.plain_dim + self.config.value_dim
        return queries * (2 * self.config.latent - made) < self.config.latent * made

    def _expanded(
        self,
        plain: jax.Array,
        rotated: jax.Array,
        latent: jax.Array,
        rotary_key: jax.Array,
        context: Context,
        *,
        cached: bool,
    ) -> jax.Array:
        config, dtype = self.config, plain.dtype
        key = project('BTR,RHK->BTHK', latent, self.key[...].astype(dtype))
        value = project('BTR,RHK->BTHK', latent, self.value[...].astype(dtype))
        shared = jnp.broadcast_to(rotary_key[:, :, None], (*key.shape[:3], config.rotary_dim))
        query, key = jnp.concatenate([plain, rotated], -1), jnp.concatenate([key, shared], -1)
        axes = ('batch', 'sequence', 'heads', 'head_dim')
        query, key, value = (
            checkpoint_name(constrain(y, axes), name)
            for y, name in ((query, 'query'), (key, 'key'), (_wide(value, config.head_dim), 'value'))
        )
        cut = None if cached else sequence_cut()
        mixed = attend(
            query,
            key,
            value,
            context,
            cut,
            causal=True,
            scale=config.score_scale,
            implementation=config.implementation,
        )
        return mixed[..., : config.value_dim]

    def _absorbed(
        self, plain: jax.Array, rotated: jax.Array, latent: jax.Array, rotary_key: jax.Array, context: Context
    ) -> jax.Array:
        """As multi-query attention: one key, the latent and the rotary key; the latent is the value too."""
        config, dtype = self.config, plain.dtype
        query = jnp.einsum('BSHK,RHK->BSHR', plain, self.key[...].astype(dtype))
        query = jnp.concatenate([query, rotated], -1)
        key = jnp.concatenate([latent, rotary_key], -1)[:, :, None]
        value = _wide(latent, key.shape[-1])[:, :, None]
        mixed = attend(
            query,
            key,
            value,
            context,
            None,
            causal=True,
            scale=config.score_scale,
            implementation=config.implementation,
        )
        return jnp.einsum('BSHR,RHK->BSHK', mixed[..., : config.latent], self.value[...].astype(dtype))

    def _rotate(self, x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
        if self.config.rotary_neighbours:
            x = x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)
        return rotate(x, table)

    def init_cache(self, repeats: int, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Zeros of latents [repeats, B, T, R] and rotary keys."""
        sizes = {'latent': self.config.latent, 'rotary_key': self.config.rotary_dim}
        return {name: jnp.zeros((repeats, batch, length, size), dtype) for name, size in sizes.items()}

    def cache_axes(self) -> dict[str, Axes]:
        """Logical axes of the arrays of `init_cache`."""
        return dict.fromkeys(('latent', 'rotary_key'), (None, 'batch', CACHED_TOKENS, None))


def _wide(x: jax.Array, size: int) -> jax.Array:
    """With zeros up to `size` in the last dimension: kernels want values as large as keys."""
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, size - x.shape[-1]),))
