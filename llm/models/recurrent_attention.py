"""Attention that remembers the row before, by relative positions: Transformer-XL (Dai et al. 2019)."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llm.errors import UserError
from llm.models.attention import Attention, AttentionConfig
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
        if cache is None and sequence_cut() is not None:
            raise UserError(
                'recurrent attention needs whole rows', where='MeshConfig.sequence', fix='Use 1, and shorter rows.'
            )
        source, before = x, None
        if cache is not None and MEMORY in cache:
            memory = jax.lax.stop_gradient(cache[MEMORY][repeat].astype(x.dtype))
            source, before = jnp.concatenate([memory, x], axis=1), memory.shape[1]
            kept = jax.lax.stop_gradient(source[:, -before:]).astype(cache[MEMORY].dtype)
            cache = {MEMORY: jax.lax.dynamic_update_index_in_dim(cache[MEMORY], kept, repeat, 0)}
        query = self._project(x, self.query, self.query_bias, None, 'heads')
        key = self._project(source, self.key, self.key_bias, None, 'kv_heads')
        value = self._project(source, self.value, self.value_bias, None, 'kv_heads')
        query, key, value = (checkpoint_name(y, n) for y, n in ((query, 'query'), (key, 'key'), (value, 'value')))
        arrays: dict[str, jax.Array] = {}
        if cache is not None and before is None:
            cache = {
                'key': write_cache(cache['key'], key, repeat, context.offset),
                'value': write_cache(cache['value'], value, repeat, context.offset),
            }
            key, value = (cache[name][repeat].astype(x.dtype) for name in ('key', 'value'))
            offset = jnp.reshape(jnp.asarray(0 if context.offset is None else context.offset), (-1, 1))
            arrays['query_index'] = offset + jnp.arange(x.shape[1])
        elif (shown := self._shown(x.shape[1], before or 0, context)) is not None:
            arrays['shown'] = shown
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        distances = sinusoids(jnp.arange(key.shape[1]), x.shape[-1], dtype).astype(x.dtype)
        arrays |= {
            'query': query,
            'key': key,
            'value': value,
            'relative': jnp.einsum('TD,DHK->THK', distances, self.relative_key[...].astype(x.dtype)),
            'content_bias': self.content_bias[...].astype(x.dtype),
            'position_bias': self.position_bias[...].astype(x.dtype),
        }
        rows: Axes = ('batch', None, 'heads', None)
        axes: dict[str, Axes] = {
            'query': rows,
            'key': rows,
            'value': rows,
            'relative': (None, 'heads', None),
            'content_bias': ('heads', None),
            'position_bias': ('heads', None),
            'shown': ('batch', None, None),
            'query_index': ('batch' if arrays.get('query_index', x[:1]).shape[0] > 1 else None, None),
        }

        def run(**parts: jax.Array) -> jax.Array:
            return relative_attention(**parts, scale=self.config.score_scale)

        return self._output(map_shards(run, arrays, axes, rows)), cache

    @staticmethod
    def _shown(length: int, before: int, context: Context) -> jax.Array | None:
        """Which keys there are for which query, the causal mask aside: bool [B, S, M + S]; None for all."""
        ids, first = context.segment_ids, context.before
        if before and first is None:
            raise ValueError('a memory needs Context.before')
        if ids is None and not before:
            return None
        conditions = []
        if ids is not None:  # the memory is what came before the first segment, and of it
            key_ids = jnp.concatenate([jnp.broadcast_to(ids[:, :1], (ids.shape[0], before)), ids], axis=1)
            conditions.append(ids[:, :, None] == key_ids[:, None, :])
        if before and first is not None:
            real = jnp.arange(before + length) >= before - first[:, None]
            conditions.append(jnp.broadcast_to(real[:, None], (first.shape[0], length, before + length)))
        return conditions[0] if len(conditions) == 1 else conditions[0] & conditions[1]


def relative_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    relative: jax.Array,
    content_bias: jax.Array,
    position_bias: jax.Array,
    *,
    scale: float,
    query_index: jax.Array | None = None,
    shown: jax.Array | None = None,
) -> jax.Array:
    """Causal attention with relative positions (Dai et al. 2019, section 3.3 and appendix B).

    Shapes: query [B, S, H, K]; key, value [B, T, H, K] -> [B, S, H, K].

    Args:
        relative: [T, H, K], what distances 0 to T - 1 are to queries. content_bias, position_bias: [H, K].
        query_index: [B or 1, S], index among the keys of each query; default: they are the last S.
        shown: [B, S, T], False where a key is none of the query's.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    queries, keys = query.shape[1], key.shape[1]
    content = jnp.einsum('BSHK,BTHK->BHST', query + content_bias, key, preferred_element_type=dtype)
    of_distance = jnp.einsum('BSHK,THK->BHST', query + position_bias, relative, preferred_element_type=dtype)
    index = jnp.arange(keys - queries, keys)[None] if query_index is None else query_index
    distance = index[:, :, None] - jnp.arange(keys)
    if query_index is None:
        # Query s wants distances from keys - queries + s downwards: rows that are one entry longer shift by one each.
        falling = jnp.pad(of_distance[..., ::-1], ((0, 0), (0, 0), (0, 0), (0, 1)))
        flat = falling.reshape(*falling.shape[:2], -1)[..., queries - 1 :][..., : queries * keys]
        position = flat.reshape(*falling.shape[:2], queries, keys)
    else:
        clipped = jnp.broadcast_to(jnp.maximum(distance, 0)[:, None], of_distance.shape)
        position = jnp.take_along_axis(of_distance, clipped, axis=-1)
    mask = distance >= 0 if shown is None else shown & (distance >= 0)
    scores = jnp.where(mask[:, None], (content + position) * scale, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    output = jnp.einsum('BHST,BTHK->BSHK', weights, value, preferred_element_type=dtype)
    return output.astype(query.dtype)
