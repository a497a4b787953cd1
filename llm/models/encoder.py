"""The bidirectional encoder: embeddings, a stack of layers, the head of a masked language model.

BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and ALBERT (Lan et al. 2020) are settings of it. Parameters of the
layers are `encoder/layers/<position>/...`; see `llm.models.stack`.

    encoder = Encoder(config)                                # shapes, no values
    graph, _ = nnx.split(encoder)
    logits = nnx.merge(graph, params)(inputs)                # [B, S, V], of every token itself
    states = nnx.merge(graph, params).encode(inputs)         # [B, S, D]
"""

import dataclasses
from fractions import Fraction
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.context import Context
from llm.models.decoder import ComputeType
from llm.models.dropout import Purpose, dropout
from llm.models.embedding import Embedding, Projection
from llm.models.heads import Classifier, MaskedLanguageModelHead, MaskedLanguageModelHeadConfig, Pooler
from llm.models.initialization import Initialization
from llm.models.layer import LayerConfig
from llm.models.long_attention import LongAttentionConfig
from llm.models.low_rank import LowRankConfig, adapt
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import Role, bias, mark_below, parameter
from llm.models.position import PositionKind, check_length, positions_of, sinusoids
from llm.models.stack import Stack, StackConfig
from llm.parallel.sharding import constrain


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional encoder.

    Attributes:
        vocab_size: V.
        d_model: D.
        layers: the stack; its attention has causal = False.
        embedding_size: width of the embeddings where it is not D, which they are then projected to (ALBERT).
        position: how tokens know their order; 'learned' needs max_positions.
        max_positions: size of the table of learned positions. first_position: its entry for the first token (2 in
            RoBERTa, which keeps the entries before it for padding).
        token_types: kinds of tokens that have an embedding, the two sentences of BERT; 0 for none.
        embedding_norm: on the sum of the embeddings; None for none.
        embedding_dropout: rate after it.
        first_is_global: whether the first token of every segment (but padding, 0) is global; see LongAttentionConfig.
        head: of the masked language model; None makes logits of the last states as they are.
        pooler: whether there is a vector of the whole row: for what is trained on it, and to hold published weights.
        next_sentence: whether the pooler's vector is classified as BERT does: 0 where the second part follows.
        compute_dtype, initialization, mup_base_width, low_rank: see DecoderConfig.
        num_outputs: what the model says of a token if not which one it is: so many classes or tags, or one number, of
            the last states, or of what the pooler makes of them, after dropout at `embedding_dropout`, as in BERT's
            classifiers. Then there is no head; with 0 there is no output either: states are what it is for.
    """

    # What its `hidden` reads: the kind of objective that it trains on.
    batch_kind: ClassVar[Literal['encoder']] = 'encoder'

    vocab_size: int
    d_model: int
    layers: StackConfig
    embedding_size: int | None = None
    position: PositionKind = 'learned'
    max_positions: int | None = None
    first_position: int = 0
    token_types: int = 0
    embedding_norm: NormConfig | None = None
    embedding_dropout: float = 0.0
    first_is_global: bool = False
    head: MaskedLanguageModelHeadConfig | None = MaskedLanguageModelHeadConfig()
    pooler: bool = False
    next_sentence: bool = False
    compute_dtype: ComputeType = 'float32'
    initialization: Initialization = Initialization()
    mup_base_width: int | None = None
    num_outputs: int | None = None
    low_rank: LowRankConfig | None = None

    def __post_init__(self) -> None:
        where = 'EncoderConfig'
        for name in ('vocab_size', 'd_model', 'embedding_size', 'mup_base_width'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f'{name} is {value}', where=where, fix='Use at least 1.')
        if self.compute_dtype not in get_args(ComputeType):
            choices = ', '.join(get_args(ComputeType))
            raise UserError(f'compute_dtype is {self.compute_dtype!r}', where=where, fix=f'Use one of {choices}.')
        if self.position == 'learned' and (self.max_positions or 0) <= self.first_position:
            raise UserError(
                f'learned positions from {self.first_position} on need max_positions of more than that',
                where=where,
                fix='Set max_positions to the longest sequence, and first_position more.',
            )
        if self.num_outputs is not None and (self.num_outputs < 0 or self.next_sentence):
            raise UserError(
                f'num_outputs is {self.num_outputs}, next_sentence {self.next_sentence}',
                where=where,
                fix='Use at least 0 and next_sentence = False, or num_outputs = None.',
            )
        if self.head is None and self.embedding_size is not None and self.num_outputs is None:
            raise UserError(
                'logits of a factorized embedding need a head', where=where, fix='Set head, or embedding_size = None.'
            )
        if self.next_sentence and not self.pooler:
            raise UserError('next_sentence classifies what the pooler gives', where=where, fix='Set pooler = True.')
        if not 0 <= self.embedding_dropout < 1:
            raise UserError(f'embedding_dropout is {self.embedding_dropout}', where=where, fix='Use a rate in [0, 1).')
        check_layers(self.layers.pattern, causal=False, cross=False, where=f'{where}.layers')
        if self.first_is_global:
            self.check_global_tokens()

    @property
    def pattern(self) -> tuple[LayerConfig, ...]:
        """All kinds of layers."""
        return self.layers.pattern

    def check_global_tokens(self) -> None:
        """Raises UserError where a layer has no room for global tokens."""
        for layer in self.layers.pattern:
            if not isinstance(layer.mixer, LongAttentionConfig) or not layer.mixer.global_tokens:
                raise UserError(
                    'there are global tokens, and layers without room for them',
                    where='EncoderConfig.layers',
                    fix='Use LongAttentionConfig, with global_tokens of at least 1.',
                )

    @property
    def longest(self) -> int | None:
        """The longest row of tokens; None for any."""
        if self.position != 'learned' or self.max_positions is None:
            return None
        return self.max_positions - self.first_position

    def build(self) -> 'Encoder':
        """The module, of shapes without values."""
        return Encoder(self)

    def at_width(self, d_model: int) -> 'EncoderConfig':
        """The same model at another width: heads and d_ff in proportion (rounded), head size and depth as they are."""
        return dataclasses.replace(self, d_model=d_model, layers=at_ratio(self.layers, Fraction(d_model, self.d_model)))


def check_layers(pattern: tuple[LayerConfig, ...], *, causal: bool, cross: bool, where: str) -> None:
    """Raises UserError where mixers are not as causal as they should be, or cross-attention not where it should be."""
    for layer in pattern:
        if not causal and not isinstance(layer.mixer, AttentionConfig):
            raise UserError(
                f'{type(layer.mixer).__name__} reads in one direction alone, and an encoder in both',
                where=where,
                fix='Use AttentionConfig with causal = False; in a decoder any mixer will do.',
            )
        if isinstance(layer.mixer, AttentionConfig) and layer.mixer.causal != causal:
            raise UserError(
                f'attention has causal = {layer.mixer.causal}',
                where=where,
                fix=f'Set AttentionConfig.causal = {causal}.',
            )
        if (layer.cross is not None) != cross:
            raise UserError(
                f'a layer has {"no " if cross else ""}cross-attention',
                where=where,
                fix=f'Set LayerConfig.cross{"" if cross else " = None"}.',
            )


def at_ratio(config: StackConfig, ratio: Fraction) -> StackConfig:
    """The same layers in a model `ratio` times as wide."""
    return dataclasses.replace(config, pattern=tuple(layer.scaled(ratio) for layer in config.pattern))


def _picked(states: jax.Array, index: jax.Array, token_index: ArrayLike | None) -> jax.Array:
    """The states of some tokens of each row: [B, S, D], index [B, M] -> [B, M, D]; see `Encoder.encode`."""
    if token_index is not None:
        index = jnp.argsort(jnp.asarray(token_index))[index]
    # Any token of a row may be wanted by any device that shares it.
    states = constrain(states, ('batch', None, 'embed'))
    return constrain(jnp.take_along_axis(states, index[..., None], axis=1), ('batch', 'residual', 'embed'))


class Encoder(nnx.Module):
    """A bidirectional encoder; see the module's docstring."""

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        size = config.embedding_size or config.d_model
        learned = config.max_positions if config.position == 'learned' else None
        self.embedding = Embedding(config.vocab_size, size, 'vocab')
        self.positions = None if learned is None else Embedding(learned, size, 'positions')
        self.token_types = Embedding(config.token_types, size, 'token_types') if config.token_types else None
        self.embedding_norm = None if config.embedding_norm is None else Norm(config.embedding_norm, size)
        shape, axes, factorized = (size, config.d_model), ('embedding', 'embed'), config.embedding_size is not None
        self.widen = parameter(shape, axes, Role.HIDDEN, inputs=(0,), outputs=(1,)) if factorized else None
        self.widen_bias = bias(shape[1:], axes[1:]) if factorized else None
        self.encoder = Stack(config.layers, config.d_model, config.position)
        self.head = (
            None
            if config.head is None or config.num_outputs is not None
            else MaskedLanguageModelHead(config.head, config.d_model, size, config.vocab_size)
        )
        self.pooler = Pooler(config.d_model) if config.pooler else None
        self.next_sentence = Classifier(config.d_model, 2) if config.next_sentence else None
        self.classifier = Classifier(config.d_model, config.num_outputs) if config.num_outputs else None
        mark_below(self, ('embedding_norm', 'widen', 'widen_bias'))
        if config.low_rank is not None:
            # A pooler below a classifier may be of the base or not; it is small, and BERT's learns with the classifier.
            adapt(self, config.low_rank, new=(self.classifier, self.pooler if config.num_outputs else None))

    def __call__(self, inputs: jax.Array, **more: jax.Array | None) -> jax.Array:
        """Logits of each of the tokens, in at least float32; see `hidden`. [B, S] -> [B, S, V]."""
        return self.projection()(self.hidden(inputs, **more))

    def hidden(self, inputs: jax.Array, *, predicted: jax.Array | None = None, **more: Any) -> jax.Array:
        """What the logits are computed from: the states after the head's transform. See `encode` for other arguments.

        Args:
            predicted: [B, M], indices in the row of the tokens whose logits are wanted; default: all. [B, M, D].
        """
        return self.transformed(self.encode(inputs, **more), predicted, **more)

    def hidden_and_pair_logits(
        self, inputs: jax.Array, *, predicted: jax.Array | None = None, **more: Any
    ) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
        """`hidden`; whether the second part of each row follows the first; sums of routers."""
        states, sums = self.encode_and_sums(inputs, **more)
        # The row's first token is the first also where devices share rows.
        pairs = self.next_sentence_logits(states)
        return self.transformed(states, predicted, **more), pairs, sums

    def transformed(
        self,
        states: jax.Array,
        predicted: jax.Array | None,
        token_index: ArrayLike | None = None,
        dropout_key: jax.Array | None = None,
        **_: Any,
    ) -> jax.Array:
        """What the logits are computed from, of the states of the last layer; see `hidden`."""
        if predicted is not None:
            states = _picked(states, predicted, token_index)
        if self.classifier is None:
            return states if self.head is None else self.head(states)
        if self.pooler is not None:
            states = constrain(self.pooler.transform(states), ('batch', 'residual', 'embed'))
        # Dropout counts what is above the layers as one more, after the embeddings.
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, self.config.layers.num_layers + 1)
        index = None if token_index is None else jnp.asarray(token_index)
        return dropout(states, self.config.embedding_dropout, key, Purpose.OUTPUT, index)

    def hidden_and_sums(
        self, inputs: jax.Array, *, predicted: jax.Array | None = None, **more: Any
    ) -> tuple[jax.Array, dict[str, Any]]:
        """`hidden`, and the sums of the layers' routers; see `encode_and_sums`."""
        states, sums = self.encode_and_sums(inputs, **more)
        return self.transformed(states, predicted, **more), sums

    def encode(self, inputs: jax.Array, **more: Any) -> jax.Array:
        """States of the last layer: [B, S] -> [B, S, D]; see `encode_and_sums` for the arguments."""
        return self.encode_and_sums(inputs, **more)[0]

    def encode_and_sums(
        self,
        inputs: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        token_types: jax.Array | None = None,
        global_tokens: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        token_index: ArrayLike | None = None,
        token_weights: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """States of the last layer: [B, S] -> [B, S, D], and the sums of routers by group of layers; see Decoder.

        Args:
            inputs: [B, S] token ids.
            positions: [B, S] or [1, S]; default: from 0 in each segment.
            segment_ids: [B, S]; tokens attend within their own segment only, padding is one too. Default: a row is one.
            token_types: [B, S]; default: 0.
            global_tokens: [B, S], not 0 on tokens that see and are seen by all of their segment (Longformer); default:
                none, or those that `first_is_global` names.
            dropout_key: of this step; without it nothing is dropped.
            token_index: [S], index in the row of each token where they do not lie in order; needs `positions`.
            token_weights: [B, S], for layers of experts; see Context.

        Raises:
            UserError: S is more than the learned positions; there are global tokens, and layers without them.
        """
        config = self.config
        check_length(inputs.shape[1], config.longest, 'EncoderConfig.max_positions')
        if positions is None:
            positions = positions_of(inputs, segment_ids)
        index = None if token_index is None else jnp.asarray(token_index)
        x = self.embed(inputs, positions, token_types, dropout_key, index)
        ids = inputs if config.layers.routed else None
        context = Context(
            segment_ids,
            token_index=index,
            token_ids=ids,
            token_weights=token_weights,
            global_tokens=self.global_tokens(global_tokens, segment_ids, inputs),
        )
        states, _, sums = self.encoder(x, positions, context, dropout_key)
        return states, sums

    def global_tokens(
        self, given: jax.Array | None, segment_ids: jax.Array | None, inputs: jax.Array
    ) -> jax.Array | None:
        """Which tokens are global, [B, S]; None for none. See `encode_and_sums` for the arguments."""
        if given is None and self.config.first_is_global:
            segment_ids = jnp.ones_like(inputs) if segment_ids is None else segment_ids
            before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
            given = (segment_ids != before) & (segment_ids != 0)
        if given is None:
            return None
        self.config.check_global_tokens()
        return given != 0

    def projection(self) -> Projection:
        """What makes logits of the hidden states."""
        config = self.config
        if self.classifier is not None:
            multiplier = 1.0 if config.mup_base_width is None else config.mup_base_width / config.d_model
            kernel = self.classifier.kernel[...]
            return Projection(kernel, ('embed', 'classes'), multiplier, None, self.classifier.bias[...])
        if config.num_outputs is not None:
            raise ValueError('the model has no output')
        scaled = config.mup_base_width is not None and config.embedding_size is None
        multiplier = (config.mup_base_width or 1) / config.d_model if scaled else 1.0
        offset = None if self.head is None else self.head.bias[...]
        return Projection(self.embedding.table[...].T, ('vocab', 'embed'), multiplier, None, offset)

    def pooled(self, states: jax.Array) -> jax.Array:
        """The vector of a row, from its states: [B, S, D] -> [B, D]."""
        if self.pooler is None:
            raise ValueError('the model has no pooler')
        return self.pooler(states)

    def next_sentence_logits(self, states: jax.Array) -> jax.Array:
        """Whether the second part of the row follows the first (class 0): [B, S, D] -> [B, 2]."""
        if self.next_sentence is None:
            raise ValueError('the model does not predict the next sentence')
        return self.next_sentence(self.pooled(states))

    def embed(
        self,
        inputs: jax.Array,
        positions: jax.Array,
        token_types: jax.Array | None,
        dropout_key: jax.Array | None,
        token_index: jax.Array | None,
    ) -> jax.Array:
        """What the first layer reads: [B, S] -> [B, S, D]; see `encode_and_sums` for the arguments."""
        config, dtype = self.config, jnp.dtype(self.config.compute_dtype)
        x = self.embedding(inputs, dtype)
        if self.positions is not None:
            x = x + self.positions(positions + config.first_position, dtype)
        if self.token_types is not None:
            x = x + self.token_types(jnp.zeros_like(inputs) if token_types is None else token_types, dtype)
        if config.position == 'sinusoidal':
            x = x + sinusoids(positions, x.shape[-1], jnp.promote_types(dtype, jnp.float32)).astype(dtype)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, config.layers.num_layers)
        x = dropout(x, config.embedding_dropout, key, Purpose.EMBEDDING, token_index)
        if self.widen is not None and self.widen_bias is not None:
            x = jnp.einsum('BSF,FD->BSD', x, self.widen[...].astype(dtype)) + self.widen_bias[...].astype(dtype)
            x = constrain(x, ('batch', 'residual', 'embed'))
        return x
