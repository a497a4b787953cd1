"""The decoder-only language model: embedding, a stack of layers, logits. Where layers are stored: see LayerLayout.

decoder = Decoder(config)                                   # shapes, no values
specs = parameter_specs(decoder)
params = initialize(specs, config.initialization, seed=0)   # a nested dict of arrays
graph, _ = nnx.split(decoder)
logits = nnx.merge(graph, params)(inputs)                   # [B, S, V]
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from llm.errors import UserError
from llm.models.context import CACHED_TOKENS, Cache, Context
from llm.models.dropout import Purpose, dropout
from llm.models.embedding import Embedding, Head, Projection
from llm.models.initialization import Initialization
from llm.models.layer import AttendingConfig, Layer, LayerConfig
from llm.models.layer_layout import LayerLayout
from llm.models.layer_stack import Auxiliary, run_layers
from llm.models.low_rank import LowRankConfig, adapt
from llm.models.moe import MoeConfig
from llm.models.multi_token import MultiToken, MultiTokenConfig, run_head
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import stack
from llm.models.position import PositionKind, Rotary, check_length, positions_of, rotary_table, sinusoids
from llm.models.recurrent_attention import MEMORY, RecurrentAttentionConfig
from llm.models.remat import RematKind, check_remat, rematerialized

_LONGEST = 'DecoderConfig.max_positions'
ComputeType = Literal['float32', 'bfloat16', 'float16', 'float64']
Auxiliaries = dict[str, Auxiliary]  # by group of stacked layers


@dataclasses.dataclass(frozen=True)
class DecoderConfig(LayerLayout):
    """A decoder-only language model.

    Attributes:
        vocab_size: V.
        d_model: D.
        num_layers: L.
        pattern: the layers that repeat; see LayerLayout.
        final_norm: normalisation after the last layer; None for none (post-norm models).
        position: how tokens know their order; 'learned' needs max_positions.
        max_positions: longest sequence of learned positions.
        tied_embeddings: whether the logits reuse the token embedding.
        embedding_multiplier: factor on the token embedding; None for sqrt(d_model) (Vaswani et al. 2017, section 3.4).
        final_logit_soft_cap: see Projection.
        embedding_dropout: rate on the sum of token and position embedding.
        compute_dtype: type of activations; parameters are cast to it where they are used.
        scan_layers: run repeats by jax.lax.scan (compiles one) rather than unrolled (compiles all).
        remat: what the backward pass computes again; see llm.models.remat.
        remat_names: activations that remat 'names' keeps, or 'offload' moves to the host; from REMAT_NAMES.
        initialization: how parameters start.
        num_outputs: what the model says of a token if not its successor: so many classes or tags, or one
            number; 0 for nothing: states are what it is for.
        low_rank: adapters beside matrices, which are trained in their place; see llm.models.low_rank.
        mup_base_width: width at which muP equals the standard parametrization (Yang et al. 2022, table 8); None for
            the standard one. Here it scales the logits by mup_base_width / d_model; initialisation and learning rates
            are set where those are.
        leading: layers before those of the pattern, which num_layers counts too.
        multi_token: parts that predict further tokens, for training alone; see llm.models.multi_token.
    """

    # What its `hidden` reads: the kind of objective that it trains on.
    batch_kind: ClassVar[Literal['decoder']] = 'decoder'

    vocab_size: int
    d_model: int
    num_layers: int
    pattern: tuple[LayerConfig, ...]
    final_norm: NormConfig | None = NormConfig()
    position: PositionKind = 'rope'
    max_positions: int | None = None
    tied_embeddings: bool = False
    embedding_multiplier: float | None = 1.0
    final_logit_soft_cap: float | None = None
    embedding_dropout: float = 0.0
    compute_dtype: ComputeType = 'float32'
    scan_layers: bool = True
    remat: RematKind = 'none'
    remat_names: tuple[str, ...] = ()
    initialization: Initialization = Initialization()
    mup_base_width: int | None = None
    leading: tuple[LayerConfig, ...] = ()
    num_outputs: int | None = None
    low_rank: LowRankConfig | None = None
    multi_token: MultiTokenConfig | None = None

    def __post_init__(self) -> None:
        where = 'DecoderConfig'
        for name in ('vocab_size', 'd_model', 'num_layers'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} is {getattr(self, name)}', where=where, fix='Use at least 1.')
        for name, choices in (('position', get_args(PositionKind)), ('compute_dtype', get_args(ComputeType))):
            if getattr(self, name) not in choices:
                raise UserError(
                    f'{name} is {getattr(self, name)!r}', where=where, fix=f'Use one of {", ".join(choices)}.'
                )
        if not self.pattern:
            raise UserError('pattern is empty', where=where, fix='Give at least one LayerConfig.')
        if len(self.leading) > self.num_layers:
            raise UserError(
                f'{len(self.leading)} leading layers of {self.num_layers}', where=where, fix='Raise num_layers.'
            )
        if self.position == 'learned' and not self.max_positions:
            raise UserError('learned positions need max_positions', where=where, fix='Set the longest sequence.')
        if self.position == 'sinusoidal' and self.d_model % 2:
            raise UserError(f'd_model {self.d_model} is odd', where=where, fix='Sinusoidal positions come in pairs.')
        if not 0 <= self.embedding_dropout < 1:
            raise UserError(f'embedding_dropout is {self.embedding_dropout}', where=where, fix='Use a rate in [0, 1).')
        lengths = {getattr(layer.mixer, 'memory_length', 0) for layer in (*self.leading, *self.pattern)}
        if len(lengths) > 1:
            raise UserError(
                f'layers remember {sorted(lengths)} tokens',
                where='DecoderConfig.pattern',
                fix='Give all layers a RecurrentAttentionConfig of one memory_length, or none of them.',
            )
        if max(lengths) and self.multi_token is not None:
            raise UserError(
                'multi-token prediction of a model that remembers the row before',
                where=f'{where}.multi_token',
                fix='Use None, or layers without memory.',
            )
        check_remat(self.remat, self.remat_names, where)
        if self.num_outputs is not None and self.num_outputs < 0:
            raise UserError(f'num_outputs is {self.num_outputs}', where=where, fix='Use at least 0, or None.')
        if self.num_outputs is not None and self.multi_token is not None:
            raise UserError(
                'multi-token prediction is of tokens, and num_outputs of something else',
                where=f'{where}.multi_token',
                fix='Use None.',
            )
        if self.mup_base_width is not None and self.mup_base_width < 1:
            raise UserError(f'mup_base_width is {self.mup_base_width}', where=where, fix='Use at least 1, or None.')

    @property
    def routed(self) -> bool:
        """Whether there are layers of experts."""
        layers = (*self.leading, *self.pattern, *self.further_layers)
        return any(isinstance(layer.feed_forward, MoeConfig) for layer in layers)

    @property
    def further_layers(self) -> tuple[LayerConfig, ...]:
        """Those of multi-token prediction, which num_layers does not count."""
        if self.multi_token is None:
            return ()
        return (self.multi_token.layer or self.layer(self.num_layers - 1),) * self.multi_token.depths

    @property
    def memory_length(self) -> int:
        """Tokens before the row that layers remember; 0 for models without (see RecurrentAttentionConfig)."""
        mixer = self.pattern[0].mixer
        return mixer.memory_length if isinstance(mixer, RecurrentAttentionConfig) else 0

    def init_memory(self, batch: int) -> Cache:
        """What `batch` rows remember before the first: nothing. {} for models without a memory."""
        shape, dtype = (batch, self.memory_length, self.d_model), jnp.dtype(self.compute_dtype)
        if not self.memory_length:
            return {}
        counts = {'leading': len(self.leading), 'layers': len(self.pattern), 'remainder': len(self.remainder)}
        return {
            group: {str(p): {MEMORY: jnp.zeros((repeats, *shape), dtype)} for p in range(counts[group])}
            for group, repeats, _ in self.groups()
            if repeats and counts[group]
        }

    @property
    def longest(self) -> int | None:
        """The longest row of tokens; None for any."""
        return self.max_positions if self.position == 'learned' else None

    def build(self) -> 'Decoder':
        """The module, of shapes without values."""
        return Decoder(self)

    def at_width(self, d_model: int) -> 'DecoderConfig':
        """The same model at another width: heads and d_ff in proportion (rounded), head size and depth as they are."""
        ratio = Fraction(d_model, self.d_model)
        pattern, leading = (tuple(layer.scaled(ratio) for layer in each) for each in (self.pattern, self.leading))
        further = None if self.multi_token is None else self.multi_token.scaled(ratio)
        return dataclasses.replace(self, d_model=d_model, pattern=pattern, leading=leading, multi_token=further)


class Decoder(nnx.Module):
    """A decoder-only language model; see the module's docstring."""

    def __init__(self, config: DecoderConfig) -> None:
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, 'vocab')
        learned = config.max_positions if config.position == 'learned' else None
        self.positions = None if learned is None else Embedding(learned, config.d_model, 'positions')
        self.layers: nnx.Dict[Layer] = nnx.Dict()
        if config.repeats:
            for p, layer in enumerate(config.pattern):
                self.layers[str(p)] = stack(Layer(layer, config.d_model, config.position), config.repeats)
        # An axis of its own: a pipeline splits 'layers', and cannot split these.
        self.leading: nnx.Dict[Layer] = nnx.Dict()
        self.remainder: nnx.Dict[Layer] = nnx.Dict()
        for group, some in ((self.leading, config.leading), (self.remainder, config.remainder)):
            for p, layer in enumerate(some):
                group[str(p)] = stack(Layer(layer, config.d_model, config.position), 1, axis='remainder')
        self.final_norm = Norm(config.final_norm, config.d_model) if config.final_norm else None
        if config.num_outputs is not None:
            self.head: Head | None = Head(config.d_model, config.num_outputs, 'outputs') if config.num_outputs else None
        else:
            self.head = None if config.tied_embeddings else Head(config.d_model, config.vocab_size)
        self.multi_token = (
            None
            if config.multi_token is None
            else MultiToken(
                config.multi_token, config.further_layers[0], config.final_norm, config.d_model, config.position
            )
        )
        if config.low_rank is not None:
            adapt(self, config.low_rank, new=(self.head if config.num_outputs else None,))

    def __call__(self, inputs: jax.Array, **more: Any) -> jax.Array:
        """Logits of the token after each of `inputs`, in at least float32; see `hidden`. [B, S] -> [B, S, V]."""
        return self.logits(self.hidden(inputs, **more))

    def hidden(self, inputs: jax.Array, **more: Any) -> jax.Array:
        """What the logits are computed from: [B, S] -> [B, S, D]; see `hidden_sums_and_memory` for the arguments."""
        return self.hidden_and_sums(inputs, **more)[0]

    def hidden_and_sums(self, inputs: jax.Array, **more: Any) -> tuple[jax.Array, Auxiliaries]:
        """`hidden`, and the sums of the layers' routers; see `hidden_sums_and_memory` for the arguments."""
        hidden, sums, _ = self.hidden_sums_and_memory(inputs, {}, **more)
        return hidden, sums

    def hidden_sums_and_memory(
        self,
        inputs: jax.Array,
        memory: Cache,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        token_index: ArrayLike | None = None,
        token_weights: jax.Array | None = None,
        prefix: jax.Array | None = None,
        tokens_ahead: Sequence[jax.Array] | None = None,
    ) -> tuple[jax.Array, Auxiliaries, Cache]:
        """What the logits are computed from, [B, S, D], sums of the layers' routers, and what later rows go on from.

        The sums are by group of stacked layers, position and name, with a leading repeat axis, as parameters are.

        Args:
            inputs: [B, S] token ids.
            memory: from DecoderConfig.init_memory or the rows before; {} for rows that go on from nothing. The first
                segment of a row goes on from there if its `positions`, which are then needed, do not begin at 0.
            positions: [B, S] or [1, S]; default: from 0 in each segment.
            segment_ids: [B, S]; tokens attend within their own segment only. Default: a row is one segment.
            dropout_key: of this step; without it nothing is dropped.
            token_index: [S], index in the row of each token where they do not lie in order; needs `positions`. See
                llm.parallel.sharding.SequenceCut.zigzag.
            token_weights: [B, S], for layers of experts; see Context.
            prefix: [B, S], not 0 on tokens that all of their segment see, also those before them: the prefix of a
                prefix language model (Raffel et al. 2020, section 3.2.1).
            tokens_ahead: of multi-token prediction, whose states are wanted too: [B, n, S, D], those of the next token
                first. See MultiToken.

        Raises:
            UserError: S is more than max_positions; or multi-token prediction would see what it predicts.
        """
        if tokens_ahead is not None and prefix is not None:
            raise UserError(
                'in a prefix tokens see those after them, and multi-token prediction would read what it predicts',
                where='DecoderConfig.multi_token',
                fix='Use None with prefix language modelling.',
            )
        before = positions[:, 0] if memory and positions is not None else None
        if positions is None:
            positions = positions_of(inputs, segment_ids)
        token_index = None if token_index is None else jnp.asarray(token_index)
        context = Context(
            segment_ids,
            token_index=token_index,
            token_weights=token_weights,
            global_keys=None if prefix is None else prefix != 0,
            before=before,
        )
        hidden, memory, sums = self._run(inputs, positions, context, dropout_key, memory, inputs.shape[1], tokens_ahead)
        return hidden, sums, memory

    def logits_ahead(self, inputs: jax.Array, tokens_ahead: Sequence[jax.Array] = (), **more: Any) -> jax.Array:
        """Logits of the tokens 1, 2, ..., n after each of `inputs`, by multi-token prediction: [B, S] -> [B, n, S, V].

        Args:
            tokens_ahead: see `hidden_sums_and_memory`; () where the heads are parallel.
        """
        hidden, _ = self.hidden_and_sums(inputs, tokens_ahead=tokens_ahead, **more)
        logits = self.logits(hidden.reshape(-1, *hidden.shape[2:]))
        return logits.reshape(*hidden.shape[:3], -1)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits in at least float32: [B, S, D] -> [B, S, V]. Losses do without them; see `projection`."""
        return self.projection()(hidden)

    def projection(self) -> Projection:
        """What makes logits of the hidden states."""
        base, soft_cap = self.config.mup_base_width, self.config.final_logit_soft_cap
        multiplier = 1.0 if base is None else base / self.config.d_model
        if self.config.num_outputs is not None:
            if self.head is None:
                raise ValueError('the model has no output')
            return Projection(self.head.kernel[...], ('embed', 'outputs'), multiplier, None)
        if self.head is None:
            return Projection(self.embedding.table[...].T, ('vocab', 'embed'), multiplier, soft_cap)
        return Projection(self.head.kernel[...], ('embed', 'vocab'), multiplier, soft_cap)

    def decode(
        self,
        inputs: jax.Array,
        cache: Cache,
        offset: jax.Array | int,
        *,
        positions: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, S, V] of `inputs` and the cache that holds them too; see `decode_hidden`."""
        hidden, cache = self.decode_hidden(inputs, cache, offset, positions=positions, lengths=lengths)
        return self.logits(hidden), cache

    def decode_hidden(
        self,
        inputs: jax.Array,
        cache: Cache,
        offset: jax.Array | int,
        *,
        positions: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Run `inputs` after what `cache` holds: [B, S] -> [B, S, D], and the cache that holds them too.

        Token s of row b has index offset[b] + s: it is stored there, over what was, and attends to the indices up to
        its own. So prompts of different lengths are padded on the right and run from offset 0; each row then goes on
        from its own length, over its padding.

        Args:
            inputs: [B, S] token ids.
            cache: from `init_cache` or the call before.
            offset: [] or [B] number of tokens that the cache holds. With one per row, tokens past the cache's length
                are computed but not stored.
            positions: [B, S] or [1, S]; default: the indices.
            lengths: [B], how many tokens of each row are real; the padding after them leaves recurrent states as they
                are. Default: all. A recurrent state cannot go back, as attention can by an earlier `offset`.

        Raises:
            UserError: the tokens do not fit the cache (if `offset` is an int).
        """
        length = inputs.shape[1]
        room = self._room(cache)
        if room is not None and length + (offset if isinstance(offset, int) else 0) > room:
            raise UserError(
                f'{length} tokens from {offset} on do not fit a cache of length {room}',
                where='Decoder.decode',
                fix='Create the cache longer.',
            )
        if positions is None:
            positions = jnp.reshape(jnp.asarray(offset, jnp.int32), (-1, 1)) + jnp.arange(length, dtype=jnp.int32)
        hidden, cache, _ = self._run(inputs, positions, Context(offset=offset, lengths=lengths), None, cache, room)
        return hidden, cache

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache: per pattern position, arrays with leading axes [repeats, batch].

        Args:
            length: tokens that attention can store; recurrent states have one size.
            dtype: of keys and values; default: the compute dtype.

        Raises:
            UserError: `length` is more than max_positions.
        """
        check_length(length, self.config.longest, _LONGEST)
        dtype = self.config.compute_dtype if dtype is None else dtype
        return {
            group: {p: layer.init_cache(repeats, batch, length, dtype) for p, layer in getattr(self, group).items()}
            for group, repeats, _ in self.config.groups()
            if getattr(self, group)
        }

    def cache_axes(self) -> dict[str, Any]:
        """Logical axes of each array of `init_cache`, in dicts like it."""
        return {
            group: {p: layer.cache_axes() for p, layer in getattr(self, group).items()}
            for group, _, _ in self.config.groups()
            if getattr(self, group)
        }

    def _room(self, cache: Cache) -> int | None:
        """How many tokens the cache can store; None for any number."""
        arrays, axes = jax.tree.leaves(cache), jax.tree.leaves(self.cache_axes(), is_leaf=lambda x: type(x) is tuple)
        rooms = (x.shape[a.index(CACHED_TOKENS)] for x, a in zip(arrays, axes, strict=True) if CACHED_TOKENS in a)
        return min(rooms, default=None)

    def embed(
        self,
        inputs: jax.Array,
        positions: jax.Array,
        dropout_key: jax.Array | None = None,
        token_index: jax.Array | None = None,
    ) -> jax.Array:
        """What the first layer reads: inputs [B, S], positions [B or 1, S] -> [B, S, D]."""
        config = self.config
        dtype = jnp.dtype(config.compute_dtype)
        x = self.embedding(inputs, dtype)
        multiplier = config.embedding_multiplier
        if multiplier != 1:
            x = x * jnp.asarray(math.sqrt(config.d_model) if multiplier is None else multiplier, dtype)
        if self.positions is not None:
            x = x + self.positions(positions, dtype)
        if config.position == 'sinusoidal':
            x = x + sinusoids(positions, config.d_model, jnp.promote_types(dtype, jnp.float32)).astype(dtype)
        # Dropout counts the embedding as a layer after the last.
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, config.num_layers)
        return dropout(x, config.embedding_dropout, key, Purpose.EMBEDDING, token_index)

    def _run(
        self,
        inputs: jax.Array,
        positions: jax.Array,
        context: Context,
        dropout_key: jax.Array | None,
        cache: Cache,
        length: int | None,
        tokens_ahead: Sequence[jax.Array] | None = None,
    ) -> tuple[jax.Array, Cache, Auxiliaries]:
        config = self.config
        check_length(inputs.shape[1], config.longest, _LONGEST)
        x = self.embed(inputs, positions, dropout_key, context.token_index)
        context = dataclasses.replace(
            context, rotary=self.rotary(positions, length), token_ids=inputs if config.routed else None
        )
        new_cache: Cache = {}
        auxiliary: Auxiliaries = {}
        trunk = None
        for group, repeats, first in config.groups():
            if layers := getattr(self, group):
                x, new_cache[group], sums, trunk = run_layers(
                    dict(layers.items()),
                    x,
                    context,
                    repeats=repeats,
                    first=first,
                    dropout_key=dropout_key,
                    cache=cache.get(group),
                    scan=config.scan_layers,
                    remat=config.remat,
                    remat_names=config.remat_names,
                    trunk=tokens_ahead is not None,
                )
                if sums:
                    auxiliary[group] = sums
        hidden = self.normalize(x)
        if tokens_ahead is not None and self.multi_token is not None and trunk is not None:
            dtype = jnp.dtype(config.compute_dtype)
            hidden, sums = self.multi_token(
                trunk,
                hidden,
                tokens_ahead,
                context,
                embed=lambda ids: self.embedding(ids, dtype),
                normalize=self.normalize,
                dropout_keys=self.further_keys(dropout_key),
                run=rematerialized(run_head, config.remat, config.remat_names, in_scan=False),
            )
            if sums:
                auxiliary['multi_token'] = sums
        return hidden, new_cache, auxiliary

    def further_keys(self, dropout_key: jax.Array | None) -> Callable[[int], jax.Array | None]:
        """The key of each depth of multi-token prediction: dropout counts them as layers after the embedding."""
        first = self.config.num_layers + 1
        return lambda depth: None if dropout_key is None else jax.random.fold_in(dropout_key, first + depth)

    def rotary(self, positions: jax.Array, length: int | None = None) -> dict[Rotary, tuple[jax.Array, jax.Array]]:
        """The rotary tables that the layers read at `positions`, in rows of `length`; see Context and rotary_table."""
        config = self.config
        if config.position != 'rope':
            return {}
        dtype = jnp.promote_types(config.compute_dtype, jnp.float32)
        layers = (*config.leading, *config.pattern, *config.further_layers)
        kinds = {layer.mixer.rotary for layer in layers if isinstance(layer.mixer, AttendingConfig)}
        return {rotary: rotary_table(rotary, positions, dtype, length) for rotary in kinds}

    def normalize(self, x: jax.Array) -> jax.Array:
        """What comes out of the last layer, as the logits read it. [B, S, D] -> the same."""
        return x if self.final_norm is None else self.final_norm(x)
