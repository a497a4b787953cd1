"""The encoder-decoder: a bidirectional stack reads the inputs, a causal one that attends to it writes the targets.

T5 (Raffel et al. 2020), its version 1.1 and Flan-T5 are settings of it. Parameters are `encoder/layers/...` and
`decoder/layers/...`; see `llm.models.stack`. Decoding keeps the decoder's keys and values, and those of the encoder's
output, which are computed once:

    model = nnx.merge(graph, params)
    cache = model.init_cache(model.encode(encoder_inputs), length=64)
    logits, cache = model.decode(start, cache, 0)            # start [B, 1]
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from llm.errors import UserError
from llm.models.context import MEMORY_TOKENS, Cache, Context
from llm.models.decoder import ComputeType
from llm.models.dropout import Purpose, dropout
from llm.models.embedding import Embedding, Head, Projection
from llm.models.encoder import at_ratio, check_layers
from llm.models.initialization import Initialization
from llm.models.layer import LayerConfig
from llm.models.low_rank import LowRankConfig, adapt
from llm.models.position import PositionKind, positions_of
from llm.models.stack import Stack, StackConfig


@dataclasses.dataclass(frozen=True)
class EncoderDecoderConfig:
    """An encoder-decoder with one embedding for both sides.

    Attributes:
        vocab_size: V.
        d_model: D.
        encoder: its attention has causal = False. decoder: its layers have cross-attention, and any causal mixer.
        position: 'relative' needs a relative_bias where layers attend; 'rope' and 'none' work too.
        tied_embeddings: whether the logits reuse the token embedding; they are then times D ** -0.5, as in T5 1.0.
        dropout: rate on the embedded tokens.
        compute_dtype, initialization, mup_base_width, low_rank: see DecoderConfig.
    """

    batch_kind: ClassVar[Literal['encoder_decoder']] = 'encoder_decoder'

    vocab_size: int
    d_model: int
    encoder: StackConfig
    decoder: StackConfig
    position: PositionKind = 'relative'
    tied_embeddings: bool = False
    dropout: float = 0.0
    compute_dtype: ComputeType = 'float32'
    initialization: Initialization = Initialization()
    mup_base_width: int | None = None
    low_rank: LowRankConfig | None = None

    def __post_init__(self) -> None:
        where = 'EncoderDecoderConfig'
        for name in ('vocab_size', 'd_model', 'mup_base_width'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f'{name} is {value}', where=where, fix='Use at least 1.')
        if self.position not in ('relative', 'rope', 'none'):
            raise UserError(f'position is {self.position!r}', where=where, fix="Use 'relative', 'rope' or 'none'.")
        if self.compute_dtype not in get_args(ComputeType):
            choices = ', '.join(get_args(ComputeType))
            raise UserError(f'compute_dtype is {self.compute_dtype!r}', where=where, fix=f'Use one of {choices}.')
        if not 0 <= self.dropout < 1:
            raise UserError(f'dropout is {self.dropout}', where=where, fix='Use a rate in [0, 1).')
        check_layers(self.encoder.pattern, causal=False, cross=False, where=f'{where}.encoder')
        check_layers(self.decoder.pattern, causal=True, cross=True, where=f'{where}.decoder')

    @property
    def pattern(self) -> tuple[LayerConfig, ...]:
        """All kinds of layers."""
        return self.encoder.pattern + self.decoder.pattern

    @property
    def longest(self) -> int | None:
        """The longest row of tokens: any."""
        return None

    def build(self) -> 'EncoderDecoder':
        """The module, of shapes without values."""
        return EncoderDecoder(self)

    def at_width(self, d_model: int) -> 'EncoderDecoderConfig':
        """The same model at another width: heads and d_ff in proportion (rounded), head size and depth as they are."""
        ratio = Fraction(d_model, self.d_model)
        encoder, decoder = (at_ratio(stack, ratio) for stack in (self.encoder, self.decoder))
        return dataclasses.replace(self, d_model=d_model, encoder=encoder, decoder=decoder)


class EncoderDecoder(nnx.Module):
    """An encoder-decoder; see the module's docstring."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, 'vocab')
        # An axis of its own: a pipeline splits 'layers', and all of its stages run the encoder.
        self.encoder = Stack(config.encoder, config.d_model, config.position, axis='remainder')
        self.decoder = Stack(config.decoder, config.d_model, config.position)
        self.head = None if config.tied_embeddings else Head(config.d_model, config.vocab_size)
        if config.low_rank is not None:
            adapt(self, config.low_rank)

    def __call__(self, inputs: jax.Array, encoder_inputs: jax.Array, **more: jax.Array | None) -> jax.Array:
        """Logits of the token after each of `inputs`, in at least float32; see `hidden`. [B, S] -> [B, S, V]."""
        return self.projection()(self.hidden(inputs, encoder_inputs=encoder_inputs, **more))

    def hidden(self, inputs: jax.Array, **more: Any) -> jax.Array:
        """What the logits are computed from: [B, S] -> [B, S, D]; see `hidden_and_sums` for the arguments."""
        return self.hidden_and_sums(inputs, **more)[0]

    def hidden_and_sums(
        self,
        inputs: jax.Array,
        *,
        encoder_inputs: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        token_index: ArrayLike | None = None,
        encoder_token_index: ArrayLike | None = None,
        token_weights: jax.Array | None = None,
        encoder_token_weights: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """What the logits are computed from: [B, S] -> [B, S, D], and the sums of routers by stack; see Decoder.

        Args:
            inputs: [B, S] token ids that the decoder reads. encoder_inputs: [B, T].
            positions: [B or 1, S]; encoder_positions [B or 1, T]. Default: from 0 in each segment.
            segment_ids: [B, S] with encoder_segment_ids [B, T], or neither: a segment of the decoder attends to that of
                the same number in the encoder. Padding has 0 on both sides.
            dropout_key: of this step; without it nothing is dropped.
            token_index: [S] and encoder_token_index [T], index in the row of each token where they do not lie in order.
            token_weights: [B, S] and encoder_token_weights [B, T], for layers of experts; see Context.
        """
        if (segment_ids is None) != (encoder_segment_ids is None):
            raise ValueError('give both of segment_ids and encoder_segment_ids, or neither')
        memory, encoder_sums = self._encoded(
            encoder_inputs,
            positions=encoder_positions,
            segment_ids=encoder_segment_ids,
            dropout_key=dropout_key,
            token_index=encoder_token_index,
            token_weights=encoder_token_weights,
        )
        if positions is None:
            positions = positions_of(inputs, segment_ids)
        index = None if token_index is None else jnp.asarray(token_index)
        context = Context(
            segment_ids,
            token_index=index,
            token_ids=inputs if self.config.decoder.routed else None,
            token_weights=token_weights,
            memory=memory,
            memory_segment_ids=encoder_segment_ids,
        )
        x = self.embed(inputs, 1, dropout_key, index)
        first = self.config.encoder.num_layers
        hidden, _, sums = self.decoder(x, positions, context, dropout_key, first=first)
        stacks = {'encoder': encoder_sums, 'decoder': sums}
        return hidden, {f'{side}/{group}': each for side, found in stacks.items() for group, each in found.items()}

    def encode(self, inputs: jax.Array, **more: Any) -> jax.Array:
        """The output of the encoder: [B, T] -> [B, T, D]; arguments as of `hidden_and_sums`."""
        return self._encoded(inputs, **more)[0]

    def _encoded(
        self,
        inputs: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        token_index: ArrayLike | None = None,
        token_weights: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        if positions is None:
            positions = positions_of(inputs, segment_ids)
        index = None if token_index is None else jnp.asarray(token_index)
        x = self.embed(inputs, 0, dropout_key, index)
        ids = inputs if self.config.encoder.routed else None
        context = Context(segment_ids, token_index=index, token_ids=ids, token_weights=token_weights)
        memory, _, sums = self.encoder(x, positions, context, dropout_key)
        return memory, sums

    def projection(self) -> Projection:
        """What makes logits of the hidden states."""
        width, base = self.config.d_model, self.config.mup_base_width or self.config.d_model
        multiplier = base / width
        if self.head is None:
            return Projection(self.embedding.table[...].T, ('vocab', 'embed'), multiplier / math.sqrt(base), None)
        return Projection(self.head.kernel[...], ('embed', 'vocab'), multiplier, None)

    def init_cache(
        self, memory: jax.Array, length: int, segment_ids: jax.Array | None = None, dtype: jnp.dtype | None = None
    ) -> Cache:
        """What decoding starts from: no tokens, and the keys and values of cross-attention.

        Args:
            memory: [B, T, D] from `encode`. length: most tokens that the decoder will read.
            segment_ids: [B, T] of the encoder, one segment a row: 1, and 0 on padding; default: no padding.
            dtype: of keys and values; default: the compute dtype.
        """
        dtype = jnp.dtype(self.config.compute_dtype) if dtype is None else dtype
        cache = {'layers': self.decoder.init_cache(memory.shape[0], length, dtype, memory)}
        return cache if segment_ids is None else cache | {'memory_segment_ids': segment_ids}

    def cache_axes(self) -> Cache:
        """Logical axes of each array of `init_cache` with segment ids, in dicts like it."""
        return {'layers': self.decoder.cache_axes(), 'memory_segment_ids': ('batch', MEMORY_TOKENS)}

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits in at least float32: [B, S, D] -> [B, S, V]. Losses do without them; see `projection`."""
        return self.projection()(hidden)

    def decode(self, inputs: jax.Array, cache: Cache, offset: jax.Array | int) -> tuple[jax.Array, Cache]:
        """Logits [B, S, V] of `inputs` [B, S], and the cache that holds them too; see `decode_hidden`."""
        hidden, cache = self.decode_hidden(inputs, cache, offset)
        return self.logits(hidden), cache

    def decode_hidden(
        self, inputs: jax.Array, cache: Cache, offset: jax.Array | int, *, lengths: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Run `inputs` of the decoder after what `cache` holds: [B, S] -> [B, S, D], and the cache that holds them too.

        Args:
            offset: [] or [B] number of tokens that the cache holds; see Decoder.decode_hidden.
            lengths: as there.
        """
        positions = jnp.reshape(jnp.asarray(offset, jnp.int32), (-1, 1)) + jnp.arange(inputs.shape[1], dtype=jnp.int32)
        ids = inputs if self.config.decoder.routed else None
        memory_ids = cache.get('memory_segment_ids')
        context = Context(offset=offset, lengths=lengths, token_ids=ids, memory_segment_ids=memory_ids)
        x = self.embed(inputs, 1, None, None)
        hidden, layers, _ = self.decoder(x, positions, context, None, cache['layers'])
        return hidden, cache | {'layers': layers}

    def embed(
        self, inputs: jax.Array, side: int, dropout_key: jax.Array | None, token_index: jax.Array | None
    ) -> jax.Array:
        """Embedded tokens of the encoder (side 0) or the decoder (1): [B, S] -> [B, S, D]."""
        config = self.config
        # Dropout counts the embeddings as layers after the last.
        number = config.encoder.num_layers + config.decoder.num_layers + side
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
        x = self.embedding(inputs, jnp.dtype(config.compute_dtype))
        return dropout(x, config.dropout, key, Purpose.EMBEDDING, token_index)
