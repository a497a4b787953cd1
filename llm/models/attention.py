"""Self-attention: multi-head, grouped-query (Ainslie et al. 2023) and multi-query, one module for all."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm.errors import UserError
from llm.kernels.attention import Implementation, dot_product_attention
from llm.kernels.attention.sequence_axis import SequenceAxis
from llm.kernels.projection import project
from llm.models.context import CACHED_TOKENS, Cache, Context, write_cache
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import Role, bias, parameter
from llm.models.position import PositionKind, Rotary, RotaryScaling, alibi_slopes, rotate
from llm.parallel.sharding import Axes, SequenceCut, constrain, map_shards, sequence_cut, target_device


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One attention layer.

    Attributes:
        num_heads: H, query heads.
        num_kv_heads: G, key and value heads; H for multi-head, 1 for multi-query attention.
        head_dim: K.
        window: each token sees itself and the window - 1 before it; None for all.
        qkv_bias: biases on the query, key and value projections.
        output_bias: bias on the output projection.
        qk_norm: normalises queries and keys before the rotation (Dehghani et al. 2023, section 2).
        qk_norm_scope: 'head' each head by itself, with one scale for all heads (Qwen 3); 'each_head' the same with a
            scale for each (StableLM 2); 'all_heads' the heads of a token together (OLMo 2).
        logit_soft_cap: scores become cap * tanh(scores / cap) (Gemma 2, section 2).
        rotary_base: see Rotary; read when the decoder's position is 'rope'.
        rotary_fraction: see Rotary; 0 leaves this layer without positions.
        rotary_scaling: see RotaryScaling.
        scale: factor on the scores; None for 1 / sqrt(head_dim).
        base_head_dim: muP for heads that grow wider rather than more: K of the base model, where the factor is the
            usual one; elsewhere it is sqrt(base_head_dim) / K (Yang et al. 2022, definition 4.1).
        sinks: a learned score per head that takes part in the softmax and stands for no token (gpt-oss).
        causal: whether a token sees only those up to itself. Without, `window` reaches to both sides.
        implementation: which kernel of llm.kernels.attention runs; 'auto' picks by device and shape.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: NormConfig | None = None
    qk_norm_scope: Literal['head', 'each_head', 'all_heads'] = 'head'
    logit_soft_cap: float | None = None
    rotary_base: float = 10_000.0
    rotary_fraction: float = 1.0
    rotary_scaling: RotaryScaling = RotaryScaling()
    scale: float | None = None
    base_head_dim: int | None = None
    sinks: bool = False
    causal: bool = True
    implementation: Implementation = 'auto'

    def __post_init__(self) -> None:
        where = 'AttentionConfig'
        for name in ('num_heads', 'num_kv_heads', 'head_dim'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} is {getattr(self, name)}', where=where, fix='Use at least 1.')
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f'num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}',
                where=where,
                fix='Each key and value head serves the same number of query heads.',
            )
        if self.window is not None and self.window < 1:
            raise UserError(f'window is {self.window}', where=where, fix='Use at least 1, or None for no window.')
        if not 0 <= self.rotary_fraction <= 1 or self.rotary.size % 2:
            raise UserError(
                f'rotary_fraction {self.rotary_fraction} of head_dim {self.head_dim} is no even number of dimensions',
                where=where,
                fix='Dimensions are rotated in pairs: change head_dim or rotary_fraction.',
            )
        factors = (self.rotary_scaling.short_factors, self.rotary_scaling.long_factors)
        if self.rotary_scaling.kind == 'longrope' and any(2 * len(each) != self.rotary.size for each in factors):
            raise UserError(
                f'{len(factors[0])} short_factors and {len(factors[1])} long_factors for {self.rotary.size} rotated '
                'dimensions',
                where='RotaryScaling',
                fix=f'Give {self.rotary.size // 2} of each.',
            )
        if self.rotary_scaling.kind == 'dynamic' and self.rotary.size == 2:
            raise UserError('two rotated dimensions have no base to change', where='RotaryScaling', fix='Use linear.')
        if self.qk_norm_scope not in ('head', 'each_head', 'all_heads'):
            raise UserError(
                f'qk_norm_scope is {self.qk_norm_scope!r}', where=where, fix="Use 'head', 'each_head' or 'all_heads'."
            )
        if self.logit_soft_cap is not None and self.logit_soft_cap <= 0:
            raise UserError(f'logit_soft_cap is {self.logit_soft_cap}', where=where, fix='Use a positive cap, or None.')
        if self.implementation not in get_args(Implementation):
            choices = ', '.join(get_args(Implementation))
            raise UserError(f'implementation is {self.implementation!r}', where=where, fix=f'Use one of {choices}.')
        if self.scale is not None and self.base_head_dim is not None:
            raise UserError('scale and base_head_dim both set the factor on the scores', where=where, fix='Set one.')

    @property
    def rotary(self) -> Rotary:
        """The rotary embedding of this layer's queries and keys."""
        return Rotary(self.head_dim, self.rotary_base, self.rotary_fraction, self.rotary_scaling)

    @property
    def value_dim(self) -> int:
        """Of values, as of queries and keys."""
        return self.head_dim

    @property
    def score_scale(self) -> float:
        """Factor on the scores q . k."""
        if self.scale is not None:
            return self.scale
        return math.sqrt(self.base_head_dim or self.head_dim) / self.head_dim

    def build(self, d_model: int, position: PositionKind) -> 'Attention':
        """The module, of shapes without values."""
        return Attention(self, d_model, position)

    def scaled(self, ratio: Fraction) -> 'AttentionConfig':
        """The same layer in a model `ratio` times as wide: more heads (at least one), the same head size."""
        num_heads = max(1, round(self.num_heads * ratio))
        most = max(1, round(self.num_kv_heads * ratio))
        num_kv_heads = max(g for g in range(1, most + 1) if num_heads % g == 0)
        return dataclasses.replace(self, num_heads=num_heads, num_kv_heads=num_kv_heads)


class Attention(nnx.Module):
    """Self-attention over a row of tokens. Shapes: x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: AttentionConfig, d_model: int, position: PositionKind) -> None:
        self.config, self.position = config, position
        h, g, k = config.num_heads, config.num_kv_heads, config.head_dim
        heads, kv_heads = ('embed', 'heads', 'head_dim'), ('embed', 'kv_heads', 'head_dim')
        # T5 does not scale its scores, and starts with smaller queries instead.
        gain = 1 / (math.sqrt(k) * config.score_scale)
        self.query = parameter((d_model, h, k), heads, Role.HIDDEN, inputs=(0,), outputs=(1, 2), gain=gain)
        self.key = parameter((d_model, g, k), kv_heads, Role.HIDDEN, inputs=(0,), outputs=(1, 2))
        self.value = parameter((d_model, g, k), kv_heads, Role.HIDDEN, inputs=(0,), outputs=(1, 2), branch=True)
        self.output = parameter(
            (h, k, d_model), ('heads', 'head_dim', 'embed'), Role.HIDDEN, inputs=(0, 1), outputs=(2,), residual=True
        )
        self.query_bias = bias((h, k), heads[1:]) if config.qkv_bias else None
        self.key_bias = bias((g, k), kv_heads[1:]) if config.qkv_bias else None
        self.value_bias = bias((g, k), kv_heads[1:]) if config.qkv_bias else None
        self.output_bias = bias((d_model,), ('embed',)) if config.output_bias else None
        self.sinks = bias((h,), ('heads',)) if config.sinks else None
        self.query_norm = self._norm(h, 'heads')
        self.key_norm = self._norm(g, 'kv_heads')

    def _norm(self, heads: int, axis: str) -> Norm | None:
        config = self.config
        if config.qk_norm is None:
            return None
        if config.qk_norm_scope == 'head':
            return Norm(config.qk_norm, config.head_dim, 'head_dim')
        over = 2 if config.qk_norm_scope == 'all_heads' else 1
        return Norm(config.qk_norm, (heads, config.head_dim), (axis, 'head_dim'), over=over)

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None, repeat: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Attend to the row itself or, with `cache`, to the `repeat`-th entry of the cache after storing the row."""
        query = self._project(x, self.query, self.query_bias, self.query_norm, 'heads')
        key = self._project(x, self.key, self.key_bias, self.key_norm, 'kv_heads')
        value = self._project(x, self.value, self.value_bias, None, 'kv_heads')
        if self.position == 'rope' and self.config.rotary.size:
            table = context.rotary[self.config.rotary]
            query, key = rotate(query, table), rotate(key, table)
        query, key, value = (checkpoint_name(y, n) for y, n in ((query, 'query'), (key, 'key'), (value, 'value')))
        if cache is not None:
            cache = {
                'key': write_cache(cache['key'], key, repeat, context.offset),
                'value': write_cache(cache['value'], value, repeat, context.offset),
            }
            key, value = (cache[name][repeat].astype(x.dtype) for name in ('key', 'value'))
        cut = sequence_cut() if cache is None else None
        return self._output(self._attend(query, key, value, context, cut)), cache

    def _output(self, mixed: jax.Array) -> jax.Array:
        """What is added to the residual stream: [B, S, H, K] -> [B, S, D]."""
        mixed = checkpoint_name(constrain(mixed, ('batch', 'sequence', 'heads', 'head_dim')), 'attention')
        y = project('BSHK,HKD->BSD', mixed, self.output[...].astype(mixed.dtype))
        if self.output_bias is not None:
            y = y + self.output_bias[...].astype(mixed.dtype)
        return constrain(y, ('batch', 'residual', 'embed'))

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        context: Context,
        cut: SequenceCut | None,
        **sides: Any,
    ) -> jax.Array:
        """`attend` with what this layer is configured to do."""
        config = self.config
        extra: dict[str, jax.Array] = {}
        if self.position == 'relative':
            if context.distance_bias is None:
                raise ValueError("position 'relative' needs a bias in the context")
            extra['distance_bias'] = context.distance_bias
        if self.position == 'alibi':
            dtype = jnp.promote_types(query.dtype, jnp.float32)
            extra['alibi_slopes'] = jnp.asarray(alibi_slopes(config.num_heads), dtype)
        if self.sinks is not None:
            extra['sinks'] = self.sinks[...]
        return attend(
            query,
            key,
            value,
            context,
            cut,
            extra,
            causal=config.causal,
            scale=config.score_scale,
            window=config.window,
            soft_cap=config.logit_soft_cap,
            implementation=config.implementation,
            **sides,
        )

    def init_cache(self, repeats: int, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Zeros of keys and values, [repeats, B, T, G, K] each."""
        shape = (repeats, batch, length, self.config.num_kv_heads, self.config.head_dim)
        return {'key': jnp.zeros(shape, dtype), 'value': jnp.zeros(shape, dtype)}

    def cache_axes(self) -> dict[str, Axes]:
        """Logical axes of the arrays of `init_cache`."""
        return dict.fromkeys(('key', 'value'), (None, 'batch', CACHED_TOKENS, 'kv_heads', None))

    def _project(
        self, x: jax.Array, weight: nnx.Param, offset: nnx.Param | None, norm: Norm | None, heads: str
    ) -> jax.Array:
        y = project('BSD,DHK->BSHK', x, weight[...].astype(x.dtype))
        if offset is not None:
            y = y + offset[...].astype(x.dtype)
        y = constrain(y, ('batch', 'sequence', heads, 'head_dim'))
        return y if norm is None else norm(y)


def sequence_axis_of(cut: SequenceCut, context: Context) -> SequenceAxis:
    """The axis that rows are cut along, for kernels."""
    permutes = cut.in_step or target_device().platform != 'cpu'
    return SequenceAxis(cut.axis, cut.pieces, cut.method, context.token_index is not None, permutes)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    context: Context,
    cut: SequenceCut | None,
    extra: Mapping[str, jax.Array] | None = None,
    *,
    memory_segment_ids: jax.Array | None = None,
    whole_keys: bool = False,
    **options: Any,
) -> jax.Array:
    """Softmax attention on each device's rows, tokens and heads. Shapes: as dot_product_attention.

    Args:
        cut: how rows are cut up, if they are. extra: alibi_slopes, sinks and distance_bias of dot_product_attention, as
            are options.
        memory_segment_ids: [B, T], of the keys where they are not those of the queries.
        whole_keys: where rows are cut along a mesh axis, whether each device gets all keys.
    """
    arrays = {'query': query, 'key': key, 'value': value, **(extra or {})}
    if context.segment_ids is not None:
        key_ids = context.segment_ids if memory_segment_ids is None else memory_segment_ids
        arrays |= {'query_segment_ids': context.segment_ids, 'key_segment_ids': key_ids}
    if context.global_keys is not None:
        arrays['global_keys'] = context.global_keys
    device = target_device()
    run = functools.partial(dot_product_attention, device=device, **options)
    sequence = None if cut is None else 'sequence'
    if cut is not None and not whole_keys:
        run = functools.partial(run, sequence_axis=sequence_axis_of(cut, context))
    if context.offset is not None:
        arrays['query_offset'] = jnp.asarray(context.offset)
    keys = None if whole_keys else sequence
    # A key that all heads share is whole on every device.
    kv_heads = 'kv_heads' if key.shape[2] > 1 else None
    axes: dict[str, Axes] = {
        'query': ('batch', sequence, 'heads', 'head_dim'),
        'key': ('batch', keys, kv_heads, 'head_dim'),
        'value': ('batch', keys, kv_heads, 'head_dim'),
        'query_segment_ids': ('batch', sequence),
        'key_segment_ids': ('batch', keys),
        'global_keys': ('batch', keys),
        'distance_bias': ('heads', None),
        'alibi_slopes': ('heads',),
        'sinks': ('heads',),
        'query_offset': ('batch',) * jnp.ndim(0 if context.offset is None else context.offset),
    }
    return map_shards(run, arrays, axes, axes['query'])
