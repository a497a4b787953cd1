"""One layer: a mixer across tokens, attention to an encoder's output perhaps, and a feed-forward layer: branches."""

import dataclasses
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.context import Cache, Context
from llm.models.cross_attention import CrossAttention
from llm.models.dropout import Purpose, dropout
from llm.models.feed_forward import FeedForwardConfig
from llm.models.latent_attention import LatentAttentionConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.moe import MixtureOfExperts, MoeConfig
from llm.models.normalization import Norm, NormConfig
from llm.models.position import PositionKind
from llm.models.remat import LAYER_INPUT
from llm.parallel.sharding import Axes

# What moves information between tokens, and what transforms each token: configurations that build their module.
AttendingConfig = AttentionConfig | LatentAttentionConfig
MixerConfig = AttendingConfig | MambaConfig | Mamba2Config
TokenwiseConfig = FeedForwardConfig | MoeConfig


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What a layer is made of.

    Attributes:
        mixer: moves information between tokens.
        feed_forward: transforms each token; None for none.
        norm: kind of every normalisation in the layer; None for none (T-Fixup trains without).
        norm_position: 'pre' x + f(norm(x)); 'post' norm(x + f(x)); 'sandwich' x + norm(f(norm(x))) (Gemma 2);
            'output' x + norm(f(x)) (OLMo 2).
        parallel: both branches read the same input, x + mixer(norm(x)) + feed_forward(norm(x)) (Wang and Komatsuzaki
            2021, GPT-J); with norm_position 'pre' only.
        shared_norm: whether parallel branches share one normalisation (GPT-J, PaLM) or have one each (GPT-NeoX).
        dropout: rate on the output of each branch.
        cross: attention to the output of an encoder, between the other two branches; None for none.
    """

    mixer: MixerConfig
    feed_forward: TokenwiseConfig | None
    norm: NormConfig | None = NormConfig()
    norm_position: Literal['pre', 'post', 'sandwich', 'output'] = 'pre'
    parallel: bool = False
    shared_norm: bool = True
    dropout: float = 0.0
    cross: AttentionConfig | None = None

    def __post_init__(self) -> None:
        if self.norm_position not in ('pre', 'post', 'sandwich', 'output'):
            raise UserError(
                f'norm_position {self.norm_position!r} does not exist',
                where='LayerConfig',
                fix="Use 'pre', 'post', 'sandwich' or 'output'.",
            )
        if self.parallel and (self.norm_position != 'pre' or self.feed_forward is None):
            raise UserError(
                f'a parallel layer has norm_position {self.norm_position!r} and feed_forward {self.feed_forward}',
                where='LayerConfig',
                fix="Use norm_position 'pre' and a feed-forward layer, or parallel = False.",
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f'dropout is {self.dropout}', where='LayerConfig', fix='Use a rate in [0, 1).')
        if self.cross is not None and (self.parallel or self.norm_position == 'sandwich'):
            raise UserError(
                "cross-attention stands in layers of norm_position 'pre' or 'post' that are not parallel",
                where='LayerConfig.cross',
                fix='Use such a layer, or cross = None.',
            )

    @property
    def attention(self) -> AttentionConfig:
        """The mixer of a layer that attends.

        Raises:
            TypeError: it does not.
        """
        if not isinstance(self.mixer, AttentionConfig):
            raise TypeError(f'the mixer of this layer is {self.mixer}')
        return self.mixer

    def scaled(self, ratio: Fraction) -> 'LayerConfig':
        """The same layer in a model `ratio` times as wide."""
        feed_forward = None if self.feed_forward is None else self.feed_forward.scaled(ratio)
        cross = None if self.cross is None else self.cross.scaled(ratio)
        return dataclasses.replace(self, mixer=self.mixer.scaled(ratio), feed_forward=feed_forward, cross=cross)


class Layer(nnx.Module):
    """Mixer and feed-forward branches around the residual stream. Shapes: x [B, S, D] -> [B, S, D]."""

    def __init__(self, config: LayerConfig, d_model: int, position: PositionKind) -> None:
        self.config = config
        before, after = config.norm_position != 'output', config.norm_position in ('sandwich', 'output')

        def norm(wanted: bool) -> Norm | None:
            return Norm(config.norm, d_model) if wanted and config.norm is not None else None

        self.mixer = config.mixer.build(d_model, position)
        self.mixer_norm = norm(before)
        self.mixer_output_norm = norm(after)
        self.cross = None if config.cross is None else CrossAttention(config.cross, d_model)
        self.cross_norm = norm(config.cross is not None)
        self.feed_forward = None if config.feed_forward is None else config.feed_forward.build(d_model)
        two = config.feed_forward is not None
        self.feed_forward_norm = norm(two and before and not (config.parallel and config.shared_norm))
        self.feed_forward_output_norm = norm(two and after)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        dropout_key: jax.Array | None = None,
        cache: Cache | None = None,
        repeat: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None, dict[str, jax.Array]]:
        """Run the layer; `dropout_key` is this layer's own, `cache` and `repeat` are the mixer's.

        With cross-attention the cache is {'mixer': the mixer's, 'cross': keys and values of the encoder's output}. The
        last of what it returns are sums over the tokens that a router makes, for losses and metrics; see Router.
        """
        config = self.config
        memory = None
        if self.cross is not None and cache is not None:
            cache, memory = cache['mixer'], cache['cross']
        post = config.norm_position == 'post'

        x = checkpoint_name(x, LAYER_INPUT)
        source = x
        normed = x if post else _apply(self.mixer_norm, x)
        y, cache = self.mixer(normed, context, cache, repeat)
        y = _apply(self.mixer_output_norm, y)
        x = x + dropout(y, config.dropout, dropout_key, Purpose.MIXER, context.token_index)
        if post:
            x = _apply(self.mixer_norm, x)
        if self.cross is not None:
            y = self.cross(x if post else _apply(self.cross_norm, x), context, memory, repeat)
            x = x + dropout(y, config.dropout, dropout_key, Purpose.CROSS_ATTENTION, context.token_index)
            if post:
                x = _apply(self.cross_norm, x)
            cache = None if cache is None else {'mixer': cache, 'cross': memory}
        if self.feed_forward is None:
            return x, cache, {}

        if not config.parallel:
            source = x
        if not (config.parallel and config.shared_norm):
            normed = source if post else _apply(self.feed_forward_norm, source)
        auxiliary: dict[str, jax.Array] = {}
        if isinstance(self.feed_forward, MixtureOfExperts):
            y, auxiliary = self.feed_forward(normed, context)
        else:
            y = self.feed_forward(normed)
        y = _apply(self.feed_forward_output_norm, y)
        x = x + dropout(y, config.dropout, dropout_key, Purpose.FEED_FORWARD, context.token_index)
        if post:
            x = _apply(self.feed_forward_norm, x)
        return x, cache, auxiliary

    def init_cache(self, repeats: int, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """An empty cache for `repeats` such layers; see Attention.init_cache."""
        return self.mixer.init_cache(repeats, batch, length, dtype)

    def cache_axes(self) -> dict[str, Axes]:
        """Logical axes of the arrays of `init_cache`."""
        return self.mixer.cache_axes()


def _apply(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
