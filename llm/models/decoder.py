"""The decoder-only language model: embedding, a stack of layers, logits.

Layers repeat in a pattern of p layers (p = 1 for most models; 2 for Gemma 2's local and global attention). Layer i is
position i mod p of repeat i div p. The parameters of a position are stacked along a leading repeat axis, as
`layers/<position>/...`; the num_layers mod p layers that are left at the end are `remainder/<position>/...`, stacked
too, one deep. Whatever runs the layers (scan, loop, pipeline) only indexes these.

    decoder = Decoder(config)                                   # shapes, no values
    specs = parameter_specs(decoder)
    params = initialize(specs, config.initialization, seed=0)   # a nested dict of arrays
    graph, _ = nnx.split(decoder)
    logits = nnx.merge(graph, params)(inputs)                   # [B, S, V]
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.context import Cache, Context
from llm.models.dropout import Purpose, dropout
from llm.models.embedding import Embedding, Head, project_to_vocabulary
from llm.models.initialization import Initialization
from llm.models.layer import Layer, LayerConfig
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import stack
from llm.models.position import PositionKind, rotary_table, segment_positions, sinusoids

RematKind = Literal['none', 'full', 'dots', 'dots_no_batch', 'names']
# What `remat_names` may hold: the activations that layers name with checkpoint_name.
REMAT_NAMES = ('query', 'key', 'value', 'attention', 'feed_forward_hidden')


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only language model.

    Attributes:
        vocab_size: V.
        d_model: D.
        num_layers: L.
        pattern: the layers that repeat; see the module's docstring.
        final_norm: normalisation after the last layer; None for none (post-norm models).
        position: how tokens know their order; 'learned' needs max_positions.
        max_positions: longest sequence of learned positions.
        tied_embeddings: whether the logits reuse the token embedding.
        embedding_multiplier: factor on the token embedding; None for sqrt(d_model) (Vaswani et al. 2017, section 3.4).
        final_logit_soft_cap: see project_to_vocabulary.
        embedding_dropout: rate on the sum of token and position embedding.
        compute_dtype: type of activations; parameters are cast to it where they are used.
        scan_layers: run repeats by jax.lax.scan (compiles one) rather than unrolled (compiles all).
        remat: what the backward pass recomputes: 'none'; 'full', all of each layer; all but matrix products ('dots');
            all but matrix products without batch dimensions ('dots_no_batch'); all but `remat_names` ('names').
        remat_names: activations to keep, from REMAT_NAMES.
        initialization: how parameters start.
        mup_base_width: width at which muP equals the standard parametrization (Yang et al. 2022, table 8); None for
            the standard one. Here it scales the logits by mup_base_width / d_model; initialisation and learning rates
            are set where those are.
    """

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
    compute_dtype: Literal['float32', 'bfloat16', 'float16', 'float64'] = 'float32'
    scan_layers: bool = True
    remat: RematKind = 'none'
    remat_names: tuple[str, ...] = ()
    initialization: Initialization = Initialization()
    mup_base_width: int | None = None

    def __post_init__(self):
        where = 'DecoderConfig'
        for name in ('vocab_size', 'd_model', 'num_layers'):
            if getattr(self, name) < 1:
                raise UserError(f'{name} is {getattr(self, name)}', where=where, fix='Use at least 1.')
        if not self.pattern:
            raise UserError('pattern is empty', where=where, fix='Give at least one LayerConfig.')
        if self.position == 'learned' and not self.max_positions:
            raise UserError('learned positions need max_positions', where=where, fix='Set the longest sequence.')
        if self.position == 'sinusoidal' and self.d_model % 2:
            raise UserError(f'd_model {self.d_model} is odd', where=where, fix='Sinusoidal positions come in pairs.')
        if not 0 <= self.embedding_dropout < 1:
            raise UserError(f'embedding_dropout is {self.embedding_dropout}', where=where, fix='Use a rate in [0, 1).')
        if unknown := set(self.remat_names) - set(REMAT_NAMES):
            raise UserError(
                f'remat_names has {sorted(unknown)}', where=where, fix=f'Use some of {", ".join(REMAT_NAMES)}.'
            )
        if (self.remat == 'names') != bool(self.remat_names):
            raise UserError(
                f'remat is {self.remat!r} and remat_names is {self.remat_names}',
                where=where,
                fix="remat = 'names' and remat_names go together.",
            )
        if self.mup_base_width is not None and self.mup_base_width < 1:
            raise UserError(f'mup_base_width is {self.mup_base_width}', where=where, fix='Use at least 1, or None.')

    @property
    def repeats(self) -> int:
        """How often the whole pattern occurs."""
        return self.num_layers // len(self.pattern)

    @property
    def remainder(self) -> tuple[LayerConfig, ...]:
        """The layers left after the last whole pattern."""
        return self.pattern[: self.num_layers % len(self.pattern)]

    def layer(self, index: int) -> LayerConfig:
        """The configuration of layer `index` of num_layers."""
        return self.pattern[index % len(self.pattern)]

    def location(self, index: int) -> tuple[str, str, int]:
        """Where layer `index` is stored: (group, position, entry along the leading axis of the stacked parameters)."""
        repeat, position = divmod(index, len(self.pattern))
        return ('layers', str(position), repeat) if repeat < self.repeats else ('remainder', str(position), 0)

    def at_width(self, d_model: int) -> 'DecoderConfig':
        """The same model at another width: heads and d_ff in proportion (rounded), head size and depth as they are."""
        ratio = Fraction(d_model, self.d_model)
        pattern = tuple(layer.scaled(ratio) for layer in self.pattern)
        return dataclasses.replace(self, d_model=d_model, pattern=pattern)


class Decoder(nnx.Module):
    """A decoder-only language model; see the module's docstring."""

    def __init__(self, config: DecoderConfig):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, 'vocab')
        learned = config.position == 'learned'
        self.positions = Embedding(config.max_positions, config.d_model, 'positions') if learned else None
        self.layers = nnx.Dict()
        if config.repeats:
            for p, layer in enumerate(config.pattern):
                self.layers[str(p)] = stack(Layer(layer, config.d_model, config.position), config.repeats)
        # An axis of its own: a pipeline splits 'layers', and cannot split these.
        self.remainder = nnx.Dict()
        for p, layer in enumerate(config.remainder):
            self.remainder[str(p)] = stack(Layer(layer, config.d_model, config.position), 1, axis='remainder')
        self.final_norm = Norm(config.final_norm, config.d_model) if config.final_norm else None
        self.head = None if config.tied_embeddings else Head(config.d_model, config.vocab_size)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the token after each of `inputs`, in at least float32; see `hidden`. [B, S] -> [B, S, V]."""
        return self.logits(self.hidden(inputs, positions=positions, segment_ids=segment_ids, dropout_key=dropout_key))

    def hidden(
        self,
        inputs: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """What the logits are computed from: [B, S] -> [B, S, D].

        Args:
            inputs: [B, S] token ids.
            positions: [B, S] or [1, S]; default: from 0 in each segment.
            segment_ids: [B, S]; tokens attend within their own segment only. Default: a row is one segment.
            dropout_key: of this step; without it nothing is dropped.

        Raises:
            UserError: S is more than max_positions.
        """
        if positions is None:
            if segment_ids is None:
                positions = jnp.arange(inputs.shape[1], dtype=jnp.int32)[None]
            else:
                positions = segment_positions(segment_ids)
        return self._run(inputs, positions, Context(segment_ids), dropout_key, None)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits in at least float32: [B, S, D] -> [B, S, V]."""
        kernel = self.embedding.table[...].T if self.head is None else self.head.kernel[...]
        base = self.config.mup_base_width
        multiplier = 1.0 if base is None else base / self.config.d_model
        return project_to_vocabulary(hidden, kernel, multiplier=multiplier, soft_cap=self.config.final_logit_soft_cap)

    def decode(
        self,
        inputs: jax.Array,
        cache: Cache,
        offset: jax.Array | int,
        *,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, S, V] of `inputs` and the cache that holds them too; see `decode_hidden`."""
        hidden, cache = self.decode_hidden(inputs, cache, offset, positions=positions)
        return self.logits(hidden), cache

    def decode_hidden(
        self,
        inputs: jax.Array,
        cache: Cache,
        offset: jax.Array | int,
        *,
        positions: jax.Array | None = None,
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

        Raises:
            UserError: the tokens do not fit the cache (if `offset` is an int).
        """
        length = inputs.shape[1]
        room = jax.tree.leaves(cache)[0].shape[2]
        if length + (offset if isinstance(offset, int) else 0) > room:
            raise UserError(
                f'{length} tokens from {offset} on do not fit a cache of length {room}',
                where='Decoder.decode',
                fix='Create the cache longer.',
            )
        if positions is None:
            positions = jnp.reshape(jnp.asarray(offset, jnp.int32), (-1, 1)) + jnp.arange(length, dtype=jnp.int32)
        return self._run(inputs, positions, Context(offset=offset), None, cache)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty cache: per pattern position, arrays with leading axes [repeats, batch, length].

        Args:
            dtype: of keys and values; default: the compute dtype.

        Raises:
            UserError: `length` is more than max_positions.
        """
        self._check_length(length)
        dtype = self.config.compute_dtype if dtype is None else dtype
        repeats = {'layers': self.config.repeats, 'remainder': 1}
        return {
            group: {p: layer.init_cache(repeats[group], batch, length, dtype) for p, layer in layers.items()}
            for group, layers in (('layers', self.layers), ('remainder', self.remainder))
            if len(layers)
        }

    def _check_length(self, length: int) -> None:
        if self.positions is not None and length > self.config.max_positions:
            raise UserError(
                f'a sequence of {length} tokens is longer than the {self.config.max_positions} learned positions',
                where='DecoderConfig.max_positions',
                fix='Shorten the sequences or raise max_positions.',
            )

    def _embed(self, inputs: jax.Array, positions: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
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
        return dropout(x, config.embedding_dropout, key, Purpose.EMBEDDING)

    def _run(
        self,
        inputs: jax.Array,
        positions: jax.Array,
        context: Context,
        dropout_key: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        config = self.config
        self._check_length(inputs.shape[1])
        x = self._embed(inputs, positions, dropout_key)
        if config.position == 'rope':
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            kinds = {layer.mixer.rotary for layer in config.pattern if isinstance(layer.mixer, AttentionConfig)}
            context = dataclasses.replace(context, rotary={r: rotary_table(r, positions, dtype) for r in kinds})
        cache = {} if cache is None else cache
        new_cache = {}
        for group, repeats, first in (
            ('layers', config.repeats, 0),
            ('remainder', 1, config.repeats * len(config.pattern)),
        ):
            layers = dict(getattr(self, group).items())
            if layers:
                x, new_cache[group] = self._run_group(layers, repeats, first, x, context, dropout_key, cache.get(group))
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x, new_cache or None

    def _run_group(
        self,
        layers: dict[str, Layer],
        repeats: int,
        first: int,
        x: jax.Array,
        context: Context,
        dropout_key: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        """Run `repeats` times the stacked `layers` by position; `first` is the index of the first layer."""
        scanned = self.config.scan_layers and repeats > 1
        run_layer = _rematerialized(self.config, scanned)

        def run_repeat(
            x: jax.Array, cache: Cache | None, layers: dict[str, Layer], repeat: jax.Array | int
        ) -> tuple[jax.Array, Cache | None]:
            cache = None if cache is None else dict(cache)
            for position, layer in layers.items():
                key = dropout_key
                if key is not None:
                    key = jax.random.fold_in(key, first + repeat * len(layers) + int(position))
                x, entry = run_layer(layer, x, context, key, None if cache is None else cache[position], repeat)
                if cache is not None:
                    cache[position] = entry
            return x, cache

        if not scanned:
            for repeat in range(repeats):
                x, cache = run_repeat(x, cache, _entry(layers, repeat), repeat)
            return x, cache

        def body(carry: tuple, slices: tuple) -> tuple[tuple, None]:
            return run_repeat(*carry, *slices), None

        # The cache is carried whole, and each repeat writes to its own entry, so that XLA updates it in place.
        (x, cache), _ = jax.lax.scan(body, (x, cache), (layers, jnp.arange(repeats)))
        return x, cache


def _entry(layers: dict[str, Layer], repeat: int) -> dict[str, Layer]:
    return jax.tree.map(lambda parameter: parameter[repeat], layers)


def _rematerialized(config: DecoderConfig, scanned: bool) -> Any:
    """The function that runs one layer, with the configured recomputation."""

    def run_layer(layer: Layer, *arguments: Any) -> tuple[jax.Array, Cache | None]:
        return layer(*arguments)

    policies = jax.checkpoint_policies
    match config.remat:
        case 'none':
            return run_layer
        case 'full':
            policy = policies.nothing_saveable
        case 'dots':
            policy = policies.dots_saveable
        case 'dots_no_batch':
            policy = policies.dots_with_no_batch_dims_saveable
        case 'names':
            policy = policies.save_only_these_names(*config.remat_names)
    # Inside scan the loop itself keeps the compiler from merging the recomputation with the first computation.
    return jax.checkpoint(run_layer, policy=policy, prevent_cse=not scanned)
