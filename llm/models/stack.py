"""A stack of layers with what surrounds it: the part that encoders and encoder-decoders are made of.

Parameters are laid out as in `llm.models.decoder`: `layers/<position>/...`, stacked, and `remainder/<position>/...`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from llm.errors import UserError
from llm.models.context import MEMORY_TOKENS, Cache, Context
from llm.models.layer import AttendingConfig, Layer, LayerConfig
from llm.models.layer_stack import Auxiliary, run_layers
from llm.models.moe import MoeConfig
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import stack
from llm.models.position import PositionKind, Rotary, rotary_table
from llm.models.relative_bias import RelativeBias, RelativeBiasConfig
from llm.models.remat import RematKind, check_remat


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Layers that repeat in a pattern.

    Attributes:
        num_layers: L.
        pattern: the layers that repeat.
        final_norm: normalisation after the last layer; None for none.
        relative_bias: added to the scores of self-attention in all layers alike, with position 'relative'; None for
            layers none of which attends to its own row.
        shared_layers: whether all repeats of the pattern have the same parameters (ALBERT, Lan et al. 2020).
        scan_layers, remat, remat_names: see DecoderConfig.
    """

    num_layers: int
    pattern: tuple[LayerConfig, ...]
    final_norm: NormConfig | None = None
    relative_bias: RelativeBiasConfig | None = None
    shared_layers: bool = False
    scan_layers: bool = True
    remat: RematKind = 'none'
    remat_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where = 'StackConfig'
        if self.num_layers < 1:
            raise UserError(f'num_layers is {self.num_layers}', where=where, fix='Use at least 1.')
        if not self.pattern:
            raise UserError('pattern is empty', where=where, fix='Give at least one LayerConfig.')
        if self.shared_layers and self.remainder:
            raise UserError(
                f'{self.num_layers} layers that share parameters are no whole number of patterns',
                where='StackConfig.shared_layers',
                fix=f'Make num_layers a multiple of {len(self.pattern)}.',
            )
        check_remat(self.remat, self.remat_names, where)

    @property
    def routed(self) -> bool:
        """Whether there are layers of experts."""
        return any(isinstance(layer.feed_forward, MoeConfig) for layer in self.pattern)

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
        if repeat >= self.repeats:
            return 'remainder', str(position), 0
        return 'layers', str(position), 0 if self.shared_layers else repeat


class Stack(nnx.Module):
    """The layers. Shapes: x [B, S, D] -> [B, S, D].

    Args:
        axis: logical axis of the repeats.
    """

    def __init__(self, config: StackConfig, d_model: int, position: PositionKind, axis: str = 'layers') -> None:
        attending = [layer.mixer for layer in config.pattern if isinstance(layer.mixer, AttendingConfig)]
        if (position == 'relative' and len(attending) > 0) != (config.relative_bias is not None):
            raise UserError(
                f'position is {position!r} and relative_bias {config.relative_bias}',
                where='StackConfig.relative_bias',
                fix="Give one with position 'relative' and layers that attend, and only then.",
            )
        self.config, self.position = config, position
        self.layers: nnx.Dict[Layer] = nnx.Dict()
        if config.repeats:
            entries = 1 if config.shared_layers else config.repeats
            for p, layer in enumerate(config.pattern):
                self.layers[str(p)] = stack(Layer(layer, d_model, position), entries, axis)
        self.remainder: nnx.Dict[Layer] = nnx.Dict()
        for p, layer in enumerate(config.remainder):
            self.remainder[str(p)] = stack(Layer(layer, d_model, position), 1, axis='remainder')
        self.final_norm = Norm(config.final_norm, d_model) if config.final_norm else None
        heads = {mixer.num_heads for mixer in attending} if config.relative_bias else {1}
        if len(heads) > 1:
            raise UserError(
                f'layers have {sorted(heads)} heads and share one relative bias',
                where='StackConfig.pattern',
                fix='Give all layers the same number of heads.',
            )
        self.relative_bias = RelativeBias(config.relative_bias, heads.pop(), d_model) if config.relative_bias else None

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        context: Context,
        dropout_key: jax.Array | None = None,
        cache: Cache | None = None,
        first: int = 0,
    ) -> tuple[jax.Array, Cache, dict[str, Auxiliary]]:
        """What comes out of the last layer, normalised; the cache, {} without one; sums of routers by group.

        Args:
            positions: [B or 1, S], for rotary embeddings.
            context: without rotary tables and bias, which are made here.
            dropout_key: of this step. first: index in the whole model of the first layer, for dropout.
            cache: by group ('layers', 'remainder') and position in the pattern.
        """
        config = self.config
        bias = None if self.relative_bias is None else self.relative_bias()
        context = dataclasses.replace(context, rotary=self.rotary(positions, x.dtype), distance_bias=bias)
        new_cache: Cache = {}
        auxiliary: dict[str, Auxiliary] = {}
        for group, layers, repeats, start in (
            ('layers', self.layers, config.repeats, 0),
            ('remainder', self.remainder, 1, config.repeats * len(config.pattern)),
        ):
            if layers:
                x, new, sums, _ = run_layers(
                    dict(layers.items()),
                    x,
                    context,
                    repeats=repeats,
                    first=first + start,
                    dropout_key=dropout_key,
                    cache=None if cache is None else cache[group],
                    scan=config.scan_layers,
                    remat=config.remat,
                    remat_names=config.remat_names,
                    shared=config.shared_layers,
                )
                if sums:
                    auxiliary[group] = sums
                if new is not None:
                    new_cache[group] = new
        return self.normalize(x), new_cache, auxiliary

    def normalize(self, x: jax.Array) -> jax.Array:
        """What comes out of the last layer, as it is read. [B, S, D] -> the same."""
        return x if self.final_norm is None else self.final_norm(x)

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype, memory: jax.Array | None = None) -> Cache:
        """An empty cache of self-attention and, given `memory` [B, T, D], the keys and values of cross-attention."""
        repeats = {'layers': self.config.repeats, 'remainder': 1}
        cache: Cache = {}
        for group, layers in (('layers', self.layers), ('remainder', self.remainder)):
            if layers:
                cache[group] = {
                    p: e.init_cache(repeats[group], batch, length, dtype)
                    if memory is None or e.cross is None
                    else {
                        'mixer': e.init_cache(repeats[group], batch, length, dtype),
                        'cross': self._cross_cache(e, repeats[group], dtype, memory),
                    }
                    for p, e in layers.items()
                }
        return cache

    def _cross_cache(self, layer: Layer, repeats: int, dtype: jnp.dtype, memory: jax.Array) -> Cache:
        """Keys and values of the cross-attention of a stack of layers: [L, B, T, G, K] each."""
        entries = nnx.state(layer, nnx.Param)
        graph = nnx.split(layer)[0]

        def of_one(state: nnx.State) -> Cache:
            one = nnx.merge(graph, state)
            assert one.cross is not None
            return jax.tree.map(lambda x: x.astype(dtype), one.cross.keys_and_values(memory))

        if self.config.scan_layers:
            found: Cache = jax.lax.map(of_one, entries)
            return found
        each = [of_one(jax.tree.map(lambda x, i=i: x[i], entries)) for i in range(repeats)]
        # Not jnp.stack: ONNX knows concatenation alone.
        return jax.tree.map(lambda *arrays: jnp.concatenate([x[None] for x in arrays]), *each)

    def cache_axes(self) -> Cache:
        """Logical axes of the arrays of `init_cache`, those of cross-attention among them if layers have it."""
        groups = (('layers', self.layers), ('remainder', self.remainder))
        return {group: {p: _layer_cache_axes(e) for p, e in layers.items()} for group, layers in groups if layers}

    def rotary(self, positions: jax.Array, dtype: jnp.dtype) -> dict[Rotary, tuple[jax.Array, jax.Array]]:
        """The rotary tables that the layers read at `positions`; see Context."""
        if self.position != 'rope':
            return {}
        kinds = {layer.mixer.rotary for layer in self.config.pattern if isinstance(layer.mixer, AttendingConfig)}
        return {rotary: rotary_table(rotary, positions, jnp.promote_types(dtype, jnp.float32)) for rotary in kinds}


def _layer_cache_axes(layer: Layer) -> Cache:
    own = layer.cache_axes()
    if layer.cross is None:
        return own
    return {'mixer': own, 'cross': dict.fromkeys(('key', 'value'), (None, 'batch', MEMORY_TOKENS, 'kv_heads', None))}
