"""Self-attention for long rows: windows, with gaps perhaps, and global tokens (Longformer, Beltagy et al. 2020)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm.errors import UserError
from llm.kernels.attention.sequence_axis import SequenceAxis
from llm.kernels.attention.windowed import GlobalTokens, find, pick, windowed_attention, windowed_attention_to_cache
from llm.models.attention import Attention, AttentionConfig, sequence_axis_of
from llm.models.context import Cache, Context, write_cache
from llm.models.parameters import Role, bias, parameter
from llm.models.position import PositionKind, rotate
from llm.parallel.sharding import Axes, constrain, map_shards, rules_in_force, sequence_cut, target_device

# Logical axis of the heads of what has some.
_HEADS = {'query': 'heads', 'key': 'kv_heads', 'value': 'kv_heads'}
_HEADS |= {f'global_{name}': axis for name, axis in _HEADS.items()}
# What has an entry for each global token, and not for each of the row.
_OF_GLOBAL = ('global_places', 'global_real', 'global_query')


@dataclasses.dataclass(frozen=True)
class LongAttentionConfig(AttentionConfig):
    """One layer of it. Time and memory grow with S (window + global_tokens), never with S T.

    Attributes:
        window: as of AttentionConfig, and needed; Longformer's attention_window is 2 (window - 1).
        dilations: heads see every d-th token of a window d times as long (section 3.1); shared evenly, neighbours
            having the same. Their number divides that of the heads and of the key/value heads.
        global_tokens: most of them in a row; 0 for none. They see all of their segment, by projections of their own,
            and all of it sees them. With more of them a row's states are not a number (NaN).
    """

    dilations: tuple[int, ...] = (1,)
    global_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        where = 'LongAttentionConfig'
        if self.window is None:
            raise UserError('there is no window', where=where, fix='Set one, or use AttentionConfig.')
        if not self.dilations or min(self.dilations) < 1:
            raise UserError(f'dilations are {self.dilations}', where=where, fix='Use at least 1 each.')
        if self.num_kv_heads % len(self.dilations):
            raise UserError(
                f'{len(self.dilations)} dilations for {self.num_kv_heads} key/value heads',
                where=where,
                fix='Give a number of them that divides that of the heads.',
            )
        if self.global_tokens < 0:
            raise UserError(f'global_tokens is {self.global_tokens}', where=where, fix='Use at least 0.')
        if self.global_tokens and self.causal:
            raise UserError(
                'global tokens see what comes after them, and causal attention does not',
                where=where,
                fix='Use global_tokens = 0, or causal = False.',
            )
        if self.sinks:
            raise UserError('there are no sinks in long attention', where=where, fix='Use sinks = False.')

    def build(self, d_model: int, position: PositionKind) -> 'LongAttention':
        """The module, of shapes without values.

        Raises:
            UserError: positions are a bias on the scores.
        """
        if position in ('alibi', 'relative'):
            raise UserError(
                f'long attention has no bias on its scores, and position is {position!r}',
                where='LongAttentionConfig',
                fix="Use 'learned', 'rope', 'sinusoidal' or 'none'.",
            )
        return LongAttention(self, d_model, position)


class LongAttention(Attention):
    """Attention in windows, and to and from global tokens. Shapes: x [B, S, D] -> [B, S, D].

    `global_query`, `global_key` and `global_value` are what global tokens see their segment with; what other tokens see
    of a global one goes by the projections that all share.
    """

    config: LongAttentionConfig

    def __init__(self, config: LongAttentionConfig, d_model: int, position: PositionKind) -> None:
        super().__init__(config, d_model, position)
        counts = {'query': config.num_heads, 'key': config.num_kv_heads, 'value': config.num_kv_heads}

        def kernel(name: str) -> nnx.Param | None:
            if not config.global_tokens:
                return None
            shape, axes = (d_model, counts[name], config.head_dim), ('embed', _HEADS[name], 'head_dim')
            return parameter(shape, axes, Role.HIDDEN, inputs=(0,), outputs=(1, 2), branch=name == 'value')

        def offset(name: str) -> nnx.Param | None:
            if not (config.global_tokens and config.qkv_bias):
                return None
            return bias((counts[name], config.head_dim), (_HEADS[name], 'head_dim'))

        self.global_query, self.global_query_bias = kernel('query'), offset('query')
        self.global_key, self.global_key_bias = kernel('key'), offset('key')
        self.global_value, self.global_value_bias = kernel('value'), offset('value')

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None, repeat: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Attend within the row or, with `cache`, to the `repeat`-th entry of the cache after storing the row."""
        config = self.config
        if context.global_keys is not None:
            raise UserError(
                'a prefix is seen from everywhere, and windows do not reach it',
                where='LongAttentionConfig',
                fix='Use AttentionConfig.',
            )
        cut = sequence_cut() if cache is None else None
        axis = None if cut is None else sequence_axis_of(cut, context)
        query = self._rotated(self._project(x, self.query, self.query_bias, self.query_norm, 'heads'), context)
        key = self._rotated(self._project(x, self.key, self.key_bias, self.key_norm, 'kv_heads'), context)
        value = self._project(x, self.value, self.value_bias, None, 'kv_heads')
        query, key, value = (checkpoint_name(y, n) for y, n in ((query, 'query'), (key, 'key'), (value, 'value')))
        arrays = {'query': query, 'key': key, 'value': value}
        if cache is not None:
            cache = {name: write_cache(cache[name], arrays[name], repeat, context.offset) for name in ('key', 'value')}
        if cache is not None and not (isinstance(context.offset, int) and context.offset == 0):
            arrays |= {name: cache[name][repeat].astype(x.dtype) for name in ('key', 'value')}
            offset = jnp.reshape(jnp.asarray(0 if context.offset is None else context.offset), (-1, 1))
            arrays['query_index'] = offset + jnp.arange(x.shape[1])
            return self._output(self._by_dilation(windowed_attention_to_cache, arrays)), cache
        if context.segment_ids is not None:
            arrays['segment_ids'] = context.segment_ids
        arrays |= self._global(x, context, axis)
        run = functools.partial(
            _with_global_tokens,
            causal=config.causal,
            implementation=config.implementation,
            device=target_device(),
            sequence_axis=axis,
        )
        mixed = self._by_dilation(run, arrays, None if axis is None else 'sequence')
        if context.global_tokens is not None:
            many = jnp.sum(context.global_tokens, axis=1) > config.global_tokens
            mixed = jnp.where(many[:, None, None, None], jnp.nan, mixed)
        return self._output(mixed), cache

    def _by_dilation(
        self, function: Callable[..., jax.Array], arrays: dict[str, jax.Array], tokens: str | None = None
    ) -> jax.Array:
        """`function` on each device's part of the heads of one dilation after the other; `tokens`: axis of those."""
        config = self.config
        many, outputs = len(config.dilations), []
        axes: dict[str, Axes] = {
            name: ('batch' if x.shape[0] > 1 else None, None if name in _OF_GLOBAL else tokens)
            for name, x in arrays.items()
        }
        axes |= {name: (*axes[name], _HEADS[name], None) for name in arrays if name in _HEADS}
        for number, dilation in enumerate(config.dilations):
            part = {
                name: _with_all_heads(jnp.split(_with_all_heads(x), many, axis=2)[number])
                if many > 1 and name in _HEADS
                else x
                for name, x in arrays.items()
            }
            run = functools.partial(
                function,
                scale=config.score_scale,
                window=config.window,
                dilation=dilation,
                soft_cap=config.logit_soft_cap,
            )
            outputs.append(map_shards(run, part, axes, axes['query']))
        if many == 1:
            return outputs[0]
        return _with_all_heads(jnp.concatenate([_with_all_heads(x) for x in outputs], axis=2))

    def _rotated(
        self, x: jax.Array, context: Context, index: jax.Array | None = None, axis: SequenceAxis | None = None
    ) -> jax.Array:
        """Queries or keys turned by their positions, of tokens `index` [B, N] where they are not all of the row."""
        if self.position != 'rope' or not self.config.rotary.size:
            return x
        cosine, sine = context.rotary[self.config.rotary]
        if index is not None:
            shape = (index.shape[0], *cosine.shape[1:])
            cosine, sine = (_picked(jnp.broadcast_to(each, shape), index, axis) for each in (cosine, sine))
        return rotate(x, (cosine, sine))

    def _global(self, x: jax.Array, context: Context, axis: SequenceAxis | None) -> dict[str, jax.Array]:
        """The parts of GlobalTokens, by name; none where there are no global tokens."""
        mask, most = context.global_tokens, self.config.global_tokens
        if mask is None:
            return {}
        if self.global_query is None or self.global_key is None or self.global_value is None:
            raise ValueError('there are global tokens, and room for none')
        index, real = find(constrain(mask, ('batch', None)), most)
        query = self._project(
            _picked(x, index, axis), self.global_query, self.global_query_bias, self.query_norm, 'heads'
        )
        key = self._project(x, self.global_key, self.global_key_bias, self.key_norm, 'kv_heads')
        return {
            'global_mask': mask,
            'global_places': index,
            'global_real': real,
            'global_query': self._rotated(query, context, index, axis),
            'global_key': self._rotated(key, context),
            'global_value': self._project(x, self.global_value, self.global_value_bias, None, 'kv_heads'),
        }


def _picked(x: jax.Array, index: jax.Array, axis: SequenceAxis | None) -> jax.Array:
    """`pick`, where devices share rows too."""
    if axis is None:
        return pick(x, index)
    rest: Axes = (None,) * (x.ndim - 2)
    axes: dict[str, Axes] = {'x': ('batch', 'sequence', *rest), 'index': ('batch', None)}
    return map_shards(functools.partial(pick, axis=axis), {'x': x, 'index': index}, axes, ('batch', None, *rest))


def _with_all_heads(x: jax.Array) -> jax.Array:
    """x [B, S, H, K], whole where one stage of a pipeline would move some of its heads between its devices.

    On CPUs a collective-permute waits for all devices, those of other stages too; an all-gather does not.
    """
    current = rules_in_force()
    if current is None or not current[0].manual_axes or target_device().platform != 'cpu':
        return x
    return constrain(x, ('batch', 'sequence', None, None))


def _with_global_tokens(**arrays: Any) -> jax.Array:
    """`windowed_attention`, with the parts of GlobalTokens by name."""
    given = {name: arrays.pop(f'global_{name}', None) for name in GlobalTokens._fields}
    return windowed_attention(**arrays, global_tokens=None if given['mask'] is None else GlobalTokens(**given))
