"""Attention that remembers the row before, by relative positions: Transformer-XL (Dai et al. 2019)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm.errors import UserError
from llm.kernels.attention.sequence_axis import SequenceAxis, in_order, pieces_of
from llm.models.attention import Attention, AttentionConfig, sequence_axis_of
from llm.models.context import Cache, Context, write_cache
from llm.models.parameters import Role, bias, parameter
from llm.models.position import PositionKind, sinusoids
from llm.parallel.sharding import Axes, map_shards, sequence_cut

MEMORY = 'memory'


@dataclasses.dataclass(frozen=True)
class RecurrentAttentionConfig(AttentionConfig):
    """One layer of it. Scores of all pairs are held: rows are short, and the memory makes them reach back.

    Attributes:
        memory_length: how many tokens before the row are seen, by what this layer read of them when they were trained
            on; no gradient goes there. With L layers a token is reached by what is L times as far away.
    """

    memory_length: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        where = 'RecurrentAttentionConfig'
        if self.memory_length < 1:
            raise UserError(f'memory_length is {self.memory_length}', where=where, fix='Use at least 1.')
        if not self.causal or self.num_kv_heads != self.num_heads:
            raise UserError(
                'recurrent attention is causal, with a key and value head for each query head',
                where=where,
                fix='Set causal = True and num_kv_heads = num_heads.',
            )
        for name in ('window', 'logit_soft_cap', 'qk_norm', 'sinks'):
            if getattr(self, name):
                raise UserError(f'recurrent attention knows no {name}', where=where, fix='Leave it out.')

    def build(self, d_model: int, position: PositionKind) -> 'RecurrentAttention':
        """The module, of shapes without values.

        Raises:
            UserError: the model has other positions besides.
        """
        if position != 'none':
            raise UserError(
                f'position is {position!r}, and recurrent attention has positions of its own',
                where='DecoderConfig.position',
                fix="Use 'none'.",
            )
        return RecurrentAttention(self, d_model)


class RecurrentAttention(Attention):
    """Self-attention over a row of tokens and the memory of those before. Shapes: x [B, S, D] -> [B, S, D].

    The score of query i and key j is (q_i + u) . k_j + (q_i + v) . W R_(i - j) (section 3.3): `content_bias` u,
    `position_bias` v, `relative_key` W, and R the sinusoids of the distance.
    """

    config: RecurrentAttentionConfig

    def __init__(self, config: RecurrentAttentionConfig, d_model: int) -> None:
        super().__init__(config, d_model, 'none')
        shape, axes = (d_model, config.num_heads, config.head_dim), ('embed', 'heads', 'head_dim')
        self.relative_key = parameter(shape, axes, Role.HIDDEN, inputs=(0,), outputs=(1, 2))
        self.content_bias = bias(shape[1:], axes[1:])
        self.position_bias = bias(shape[1:], axes[1:])

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None, repeat: jax.Array | int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Attend to the row and to what `cache` holds of those before it; store what the next one needs.

        Args:
            cache: entry `repeat` is this layer's: in training {'memory': what it read, [repeats, B, M, D]}, from
                DecoderConfig.init_memory; in decoding keys and values, from `init_cache`.
        """
        remembers = cache is not None and MEMORY in cache
        cut = sequence_cut() if cache is None or remembers else None
        axis = None if cut is None else sequence_axis_of(cut, context)
        query = self._project(x, self.query, self.query_bias, None, 'heads')
        arrays = {'query': checkpoint_name(query, 'query')} | self._keys_and_values(x)
        index: dict[str, jax.Array] = {}
        if cache is not None and remembers:
            if context.before is None:
                raise ValueError('a memory needs Context.before')
            memory = jax.lax.stop_gradient(cache[MEMORY][repeat].astype(x.dtype))
            kept = _last_tokens(memory, jax.lax.stop_gradient(x), axis).astype(cache[MEMORY].dtype)
            cache = {MEMORY: jax.lax.dynamic_update_index_in_dim(cache[MEMORY], kept, repeat, 0)}
            arrays |= {f'{MEMORY}_{name}': y for name, y in self._keys_and_values(memory).items()}
            index['before'] = context.before
        elif cache is not None:
            cache = {name: write_cache(cache[name], arrays[name], repeat, context.offset) for name in ('key', 'value')}
            arrays |= {name: cache[name][repeat].astype(x.dtype) for name in ('key', 'value')}
            offset = jnp.reshape(jnp.asarray(0 if context.offset is None else context.offset), (-1, 1))
            index['query_index'] = offset + jnp.arange(x.shape[1])
        if context.segment_ids is not None:
            index['segment_ids'] = context.segment_ids
        tokens = None if axis is None else 'sequence'
        rows: Axes = ('batch', tokens, 'heads', None)
        of_memory = memory_axes(arrays['memory_key'].shape[1])[2:3] if 'memory_key' in arrays else ()
        axes: dict[str, Axes] = dict.fromkeys(('query', 'key', 'value'), rows)
        axes |= {f'{MEMORY}_{name}': ('batch', *of_memory, 'heads', None) for name in ('key', 'value')}
        axes |= {
            'relative': (None, 'heads', None),
            'content_bias': ('heads', None),
            'position_bias': ('heads', None),
            'segment_ids': ('batch', tokens),
            'before': ('batch',),
            'query_index': ('batch' if index.get('query_index', x[:1]).shape[0] > 1 else None, None),
        }
        keys = sum(arrays[name].shape[1] for name in ('key', 'memory_key') if name in arrays)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        distances = sinusoids(jnp.arange(keys), x.shape[-1], dtype).astype(x.dtype)
        arrays |= {
            'relative': jnp.einsum('TD,DHK->THK', distances, self.relative_key[...].astype(x.dtype)),
            'content_bias': self.content_bias[...].astype(x.dtype),
            'position_bias': self.position_bias[...].astype(x.dtype),
        }
        run = functools.partial(
            _attend, scale=self.config.score_scale, axis=axis, memory_is_cut='sequence' in of_memory
        )
        return self._output(map_shards(run, arrays | index, axes, rows)), cache

    def _keys_and_values(self, x: jax.Array) -> dict[str, jax.Array]:
        key = self._project(x, self.key, self.key_bias, None, 'kv_heads')
        value = self._project(x, self.value, self.value_bias, None, 'kv_heads')
        return {'key': checkpoint_name(key, 'key'), 'value': checkpoint_name(value, 'value')}


def memory_axes(length: int) -> Axes:
    """Logical axes of a memory of `length` tokens, [repeats, B, M, D]: devices share it as they share rows."""
    cut = sequence_cut()
    return None, 'batch', 'sequence' if cut is not None and length % cut.pieces == 0 else None, None


def _last_tokens(memory: jax.Array, x: jax.Array, axis: SequenceAxis | None) -> jax.Array:
    """What the next row remembers, as many tokens as this one did: [B, M, D], [B, S, D] -> [B, M, D]."""
    size, row = memory.shape[1], x.shape[1]
    if axis is None:
        return jnp.concatenate([memory, x], axis=1)[:, -size:]
    _, batch, tokens, _ = memory_axes(size)

    def placed(y: jax.Array, place: jax.Array) -> jax.Array:
        empty = jnp.zeros((y.shape[0], size, y.shape[2]), y.dtype)
        return empty.at[:, jnp.where(place >= 0, place, size)].set(y, mode='drop')

    def run(memory: jax.Array, x: jax.Array) -> jax.Array:
        rank, length = jax.lax.axis_index(axis.name), x.shape[1] // axis.parts
        own = jnp.concatenate([piece * length + jnp.arange(length) for piece in pieces_of(axis)])
        found = placed(x, size - row + own)
        if size > row:
            first = rank * memory.shape[1] if tokens else 0
            mine = memory if tokens else jnp.where(rank == 0, memory, 0)
            found += placed(mine, first + jnp.arange(memory.shape[1]) - row)
        if not tokens:
            return jax.lax.psum(found, axis.name)
        return jax.lax.psum_scatter(found, axis.name, scatter_dimension=1, tiled=True)

    axes: dict[str, Axes] = {'memory': (batch, tokens, None), 'x': (batch, 'sequence', None)}
    return map_shards(run, {'memory': memory, 'x': x}, axes, axes['memory'])


def _attend(
    *,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    axis: SequenceAxis | None,
    memory_is_cut: bool,
    memory_key: jax.Array | None = None,
    memory_value: jax.Array | None = None,
    before: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    query_index: jax.Array | None = None,
    **more: Any,
) -> jax.Array:
    """`relative_attention` of this device's queries to all keys of the row and the memory.

    Args:
        axis: the mesh axis that rows are cut along, if they are; memory_is_cut: whether the memory is, too.
        before: [B], see Context; with memory_key and memory_value [B, M, H, K].
        more: of `relative_attention`.
    """
    ids = segment_ids
    if axis is not None:
        key, value = in_order(key, axis), in_order(value, axis)
        ids = None if ids is None else in_order(ids, axis)
    remembered = 0
    if memory_key is not None and memory_value is not None:
        memory = memory_key, memory_value
        if axis is not None and memory_is_cut:
            memory = jax.lax.all_gather(memory, axis.name, axis=1, tiled=True)
        remembered = memory[0].shape[1]
        key, value = (jnp.concatenate(each, axis=1) for each in zip(memory, (key, value), strict=True))
    conditions = []
    if before is not None:
        real = jnp.arange(key.shape[1]) >= remembered - before[:, None]
        conditions.append(jnp.broadcast_to(real[:, None], (query.shape[0], query.shape[1], key.shape[1])))
    if ids is not None and segment_ids is not None:  # the memory is what came before the first segment, and of it
        key_ids = jnp.concatenate([jnp.broadcast_to(ids[:, :1], (ids.shape[0], remembered)), ids], axis=1)
        conditions.append(segment_ids[:, :, None] == key_ids[:, None, :])
    shown = functools.reduce(jnp.logical_and, conditions) if conditions else None
    if axis is None:
        return relative_attention(query, key, value, query_index=query_index, shown=shown, **more)
    length, outputs = query.shape[1] // axis.parts, []
    for part, piece in enumerate(pieces_of(axis)):
        mine = slice(part * length, (part + 1) * length)
        seen = None if shown is None else shown[:, mine]
        first = remembered + piece * length
        outputs.append(relative_attention(query[:, mine], key, value, first=first, shown=seen, **more))
    return jnp.concatenate(outputs, axis=1)


def relative_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    relative: jax.Array,
    content_bias: jax.Array,
    position_bias: jax.Array,
    *,
    scale: float,
    first: jax.Array | None = None,
    query_index: jax.Array | None = None,
    shown: jax.Array | None = None,
) -> jax.Array:
    """Causal attention with relative positions (Dai et al. 2019, section 3.3 and appendix B).

    Shapes: query [B, S, H, K]; key, value [B, T, H, K] -> [B, S, H, K].

    Args:
        relative: [T, H, K], what distances 0 to T - 1 are to queries. content_bias, position_bias: [H, K].
        first: [], index among the keys of the first query; default: they are the last S.
        query_index: [B or 1, S], that of each query where they do not go on from one another in all rows alike.
        shown: [B, S, T], False where a key is none of the query's.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    queries, keys = query.shape[1], key.shape[1]
    content = jnp.einsum('BSHK,BTHK->BHST', query + content_bias, key, preferred_element_type=dtype)
    of_distance = jnp.einsum('BSHK,THK->BHST', query + position_bias, relative, preferred_element_type=dtype)
    start = keys - queries if first is None else first
    index = start + jnp.arange(queries)[None] if query_index is None else query_index
    distance = index[:, :, None] - jnp.arange(keys)
    if query_index is None:
        # Query s wants distances from start + s downwards: rows that are one entry longer shift by one each.
        falling = jnp.pad(of_distance[..., ::-1], ((0, 0), (0, 0), (0, 0), (0, 1)))
        flat = falling.reshape(*falling.shape[:2], -1)
        if first is not None:  # after the last query may come as many as there are keys
            flat = jnp.pad(flat, ((0, 0), (0, 0), (0, keys)))
        shifted = jax.lax.dynamic_slice_in_dim(flat, keys - 1 - start, queries * keys, axis=2)
        position = shifted.reshape(*falling.shape[:2], queries, keys)
    else:
        clipped = jnp.broadcast_to(jnp.maximum(distance, 0)[:, None], of_distance.shape)
        position = jnp.take_along_axis(of_distance, clipped, axis=-1)
    mask = distance >= 0 if shown is None else shown & (distance >= 0)
    scores = jnp.where(mask[:, None], (content + position) * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    output = jnp.einsum('BHST,BTHK->BSHK', weights, value, preferred_element_type=dtype)
    return output.astype(query.dtype)
