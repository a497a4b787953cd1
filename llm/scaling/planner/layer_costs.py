"""What one layer holds, computes and computes again, by the names of its activations: a row each.

Figures are per token of one device. A remat policy is the set of activations that the backward pass finds kept; an
attention kernel is whether scores are held and whether masked blocks are computed. A new policy or kernel is a new row.
"""

import dataclasses
import math
from typing import Literal, cast

import jax

from llm.kernels.attention import choose
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.latent_attention import LatentAttentionConfig
from llm.models.layer import AttendingConfig, LayerConfig, MixerConfig
from llm.models.long_attention import LongAttentionConfig
from llm.models.mamba import MambaConfig
from llm.models.model import ModelConfig
from llm.models.moe import MoeConfig
from llm.models.recurrent_attention import RecurrentAttentionConfig
from llm.models.remat import LAYER_INPUT
from llm.models.stack import StackConfig
from llm.scaling.accounting import RowTokens
from llm.scaling.planner.abstract import Placement
from llm.scaling.planner.stacks import PlannedStack

Scores = Literal['held', 'blocks', 'blocks_skipped', 'blocks_twice']

# Attention implementation -> what it does with the scores. Held: [B, H, S, T] arrays in HBM. Blocks: never more than
# a block of them. Skipped: blocks that the causal mask hides are not computed. The backward pass of those that hold
# none computes them again: five products where the forward pass has two (Dao et al. 2022, FlashAttention, algorithm 4).
# Twice: skipped too, and computed again by queries and by keys, which makes seven.
ATTENTION_SCORES: dict[str, Scores] = {'reference': 'held', 'chunked': 'blocks', 'pallas_gpu': 'blocks_twice'}
_CHUNK = 64  # tokens from border to border
OTHER_ATTENTION: Scores = 'blocks_skipped'
_BACKWARD_FACTORS = {'held': 2.0, 'blocks_twice': 3.5}  # FLOPs backward over those forward; 2.5 of the others
Policy = DecoderConfig | StackConfig  # what says which activations are kept

# What each remat policy keeps of a layer; '*' is everything. The input of the layer is always kept, on the device or
# the host; its last product only feeds a sum, and is never needed again.
PROJECTIONS = (
    *('query', 'key', 'value', 'attention_output'),
    *('recurrence_input', 'recurrence_gate', 'recurrence_parameters', 'time_steps', 'recurrence_output'),
    *('up', 'gate'),
)
# What no product with a parameter makes; a kernel's backward pass has its own factor for these.
_MIXING = ('scores', 'position_scores', 'attention', 'global_attention', 'states', 'recurrence')
_NEVER_KEPT = 'feed_forward_output'
KEPT: dict[str, tuple[str, ...]] = {
    'none': ('*',),
    'full': (),
    'dots': (*PROJECTIONS, 'scores', 'position_scores', 'attention'),
    'dots_no_batch': PROJECTIONS,
}
# names that remat 'names' and 'offload' may give -> activations here; the input of a layer is none that it makes.
NAMED: dict[str, tuple[str, ...]] = {
    LAYER_INPUT: (),
    'query': ('query',),
    'key': ('key',),
    'value': ('value',),
    'attention': ('attention',),
    'recurrence_input': ('recurrence_input',),
    'recurrence_gate': ('recurrence_gate',),
    'recurrence': ('recurrence',),
    'feed_forward_hidden': ('feed_forward_hidden',),
}


@dataclasses.dataclass(frozen=True)
class Activation:
    """One array that a layer makes.

    Attributes:
        elements: per token on one device. bytes: per element.
        flops: per token on one device, forward, of the products that make it.
        whole: elements while it is worked on, if then more of it is there than is kept.
        working: bytes per element while it is worked on, if then fewer are there than are kept.
    """

    name: str
    elements: float
    bytes: int
    flops: float = 0.0
    whole: float = 0.0
    working: int | None = None

    @property
    def size(self) -> float:
        """Bytes per token."""
        return self.elements * self.bytes


@dataclasses.dataclass(frozen=True)
class LayerCosts:
    """The activations of one layer, per token of one device.

    Attributes:
        input_size: bytes per token of what the layer reads. backward_factor: FLOPs of the backward pass of attention or
            a recurrence over those of its forward pass; of everything else it is 2. host_apart: whether the host's
            memory is not the device's own.
    """

    activations: tuple[Activation, ...]
    input_size: float
    backward_factor: float
    host_apart: bool

    def kept(self, stack: Policy) -> tuple[str, ...]:
        """Names of the activations that the remat policy of the stack keeps."""
        if stack.remat in ('names', 'offload'):
            return tuple(each for name in stack.remat_names for each in NAMED.get(name, ()))
        names = KEPT[stack.remat]
        return tuple(each.name for each in self.activations if each.name != _NEVER_KEPT) if '*' in names else names

    def saved(self, stack: Policy) -> float:
        """Bytes per token that wait for the backward pass on the device, the input included."""
        kept = self.kept(stack)
        everything = self.input_size + sum(each.size for each in self.activations if each.name in kept)
        return everything - self.offloaded(stack)

    def offloaded(self, stack: Policy) -> float:
        """Bytes per token that wait for the backward pass in the memory of the host."""
        if stack.remat != 'offload' or not self.host_apart:
            return 0.0
        kept = self.kept(stack)
        moved = sum(each.size for each in self.activations if each.name in kept)
        return moved + (self.input_size if LAYER_INPUT in stack.remat_names else 0.0)

    def all(self) -> float:
        """Bytes per token of every activation, as they are worked on."""
        return sum(max(each.elements, each.whole) * (each.working or each.bytes) for each in self.activations)

    def product_operands(self, *, bias: bool) -> float:
        """Bytes per token of what goes into the products with weights, and of the gradients of what comes out.

        Args:
            bias: whether scores have one that is learned, whose gradient adds up theirs.
        """
        scores = [each.elements for each in self.activations if each.name == 'scores'][:1] if bias else []
        return sum(each.size for each in self.activations if each.name != 'scores') + 4 * sum(scores)

    def forward_flops(self) -> float:
        """Per token of one device."""
        return sum(each.flops for each in self.activations)

    def backward_flops(self) -> float:
        """Per token of one device, recomputation not included."""
        mixing = sum(each.flops for each in self.activations if each.name in _MIXING)
        return 2 * (self.forward_flops() - mixing) + self.backward_factor * mixing

    def recomputed_flops(self, stack: Policy) -> float:
        """Per token of one device: what the backward pass makes again."""
        kept = {*self.kept(stack), _NEVER_KEPT}
        if 'attention' in kept and self.backward_factor > 2:
            kept.add('scores')  # a kernel's backward pass makes its own, and that is counted there
        return sum(each.flops for each in self.activations if each.name not in kept)


def scores_of(mixer: AttendingConfig, platform: str, queries: int, *, bias: bool, global_keys: bool) -> Scores:
    """How attention treats its scores on a platform; see `llm.kernels.attention.choose`."""
    if isinstance(mixer, RecurrentAttentionConfig):
        return 'held'
    device = cast(jax.Device, _DeviceOf(platform))
    name = choose(mixer.implementation, device, max(queries, 2), bias=bias, global_keys=global_keys)
    if isinstance(mixer, LongAttentionConfig) and name == 'reference':
        name = 'chunked'
    return ATTENTION_SCORES.get(name, OTHER_ATTENTION)


@dataclasses.dataclass(frozen=True)
class _DeviceOf:
    """As much of a jax.Device as decides which attention runs on it."""

    platform: str
    compute_capability: str = '8.0'  # the least of the GPUs that are planned for


def _mixer_costs(
    mixer: MixerConfig, model: ModelConfig, size: int, placement: Placement, stack: PlannedStack, platform: str
) -> tuple[list[Activation], float]:
    """What a mixer makes, its output last, and the factor of its backward pass."""
    d = model.d_model
    if isinstance(mixer, AttendingConfig):
        return _attention_costs(mixer, model, size, placement, stack, platform)
    if isinstance(mixer, MambaConfig):
        inner = mixer.d_inner / placement.ways('mlp')
        small, steps, rank = mixer.dt_rank + 2 * mixer.state_size, inner, mixer.dt_rank
        small_flops, step_flops = 2 * inner * small, 2 * rank * inner
    else:
        inner = mixer.num_heads * mixer.head_dim / placement.ways('heads')
        small, steps = 2 * mixer.num_groups * mixer.state_size, mixer.num_heads / placement.ways('heads')
        small_flops, step_flops = 2 * d * small, 2 * d * steps
    states = inner * mixer.state_size
    return [
        Activation('recurrence_input', inner, size, 2 * d * inner),
        Activation('recurrence_gate', inner, size, 2 * d * inner),
        Activation('convolution', inner, size),
        Activation('recurrence_parameters', small, size, small_flops),
        Activation('time_steps', steps, 4, step_flops),
        # Kept at the borders of chunks, in fp32.
        Activation('states', states / _CHUNK, 4, 4 * states),
        Activation('recurrence', inner, size, 2 * states),
        Activation('gated', inner, size),
        Activation('recurrence_output', d, size, 2 * d * inner),
    ], 3.0  # every state is computed again


def _attention_costs(
    mixer: AttendingConfig, model: ModelConfig, size: int, placement: Placement, stack: PlannedStack, platform: str
) -> tuple[list[Activation], float]:
    d, k, tokens = model.d_model, mixer.head_dim, stack.tokens
    heads = mixer.num_heads / placement.ways('heads')
    kv_heads = mixer.num_kv_heads / placement.ways('kv_heads')
    scores = scores_of(mixer, platform, tokens, bias=model.position == 'relative', global_keys=stack.prefix)
    causal = not isinstance(mixer, AttentionConfig) or mixer.causal
    reach = None if mixer.window is None else mixer.window if causal else 2 * mixer.window - 1
    seen = tokens if reach is None or scores == 'held' else min(reach, tokens)
    computed, sources = float(seen), 1.0
    if causal and scores in ('blocks_skipped', 'blocks_twice'):
        computed = seen * (1 - (seen - 1) / (2 * tokens))  # a row of S sees (S + 1) / 2 on average
    more: list[Activation] = []
    if isinstance(mixer, RecurrentAttentionConfig):
        seen, sources = tokens + mixer.memory_length, 1 + mixer.memory_length / tokens
        computed = float(seen)
        more = [
            Activation('sources', d * sources, size),  # what is remembered and the row, side by side
            Activation('position_query', heads * k, size),
            Activation('position_scores', 0, size, 2 * heads * k * seen, whole=heads * seen),  # added to the others
        ]
    if isinstance(mixer, LongAttentionConfig) and getattr(model, 'first_is_global', False):
        pairs = 2 * mixer.global_tokens  # each token sees the global ones, and they see it
        more = [
            Activation('global_key', kv_heads * k, size, 2 * d * k * kv_heads),
            Activation('global_value', kv_heads * k, size, 2 * d * k * kv_heads),
            Activation('global_attention', heads * k, size, 4 * heads * k * pairs),
        ]
    stored = _stored(k, scores, platform)
    return [
        *_projections(mixer, d, heads, kv_heads, size, sources, stored),
        *more,
        _scores(heads, seen, size, 2 * heads * k * computed, scores),
        Activation('attention', heads * stored, size, 2 * heads * k * computed),
        Activation('attention_output', d, size, 2 * d * mixer.value_dim * heads),
    ], _BACKWARD_FACTORS.get(scores, 2.5)


def _scores(heads: float, seen: int, size: int, flops: float, scores: Scores) -> Activation:
    """Held, scores are kept in fp32 and as weights in the compute type; what is worked on at once are about the latter.

    Of blocks a sum is left for every query.
    """
    if scores == 'held':
        return Activation('scores', heads * seen, 4 + size, flops, working=size)
    return Activation('scores', heads, 4 + size, flops)


def _stored(head_dim: int, scores: Scores, platform: str) -> int:
    """Elements that a head takes in memory: a TPU's kernel reads rows of whole lanes, of 128."""
    return 128 * math.ceil(head_dim / 128) if platform == 'tpu' and scores == 'blocks_skipped' else head_dim


def _cross_attention(
    mixer: AttentionConfig, d: int, size: int, placement: Placement, stack: PlannedStack, platform: str
) -> list[Activation]:
    """Attention to what an encoder made, by a kernel where there is one: it has no bias."""
    k = mixer.head_dim
    heads = mixer.num_heads / placement.ways('heads')
    kv_heads = mixer.num_kv_heads / placement.ways('kv_heads')
    scores = scores_of(mixer, platform, stack.tokens, bias=False, global_keys=False)
    sources, query = stack.memory / stack.tokens, 2 * d * k * heads
    stored = _stored(k, scores, platform)
    return [
        Activation('query', heads * stored, size, query),
        Activation('key', kv_heads * stored * sources, size, 2 * d * k * kv_heads * sources),
        Activation('value', kv_heads * stored * sources, size, 2 * d * k * kv_heads * sources),
        _scores(heads, stack.memory, size, 2 * heads * k * stack.memory, scores),
        Activation('attention', heads * stored, size, 2 * heads * k * stack.memory),
        Activation('attention_output', d, size, query),
    ]


def layer_costs(
    layer: LayerConfig, model: ModelConfig, placement: Placement, stack: PlannedStack, platform: str
) -> LayerCosts:
    """The activations of one layer of `stack` of `model`, in its own order of computation."""
    size = 4 if model.compute_dtype == 'float32' else 8 if model.compute_dtype == 'float64' else 2
    d, feed_forward = model.d_model, layer.feed_forward
    # The residual stream may be cut along the sequence more often than what attention works on.
    residual = d * placement.ways('sequence') / placement.ways('residual')
    mixing, backward_factor = _mixer_costs(layer.mixer, model, size, placement, stack, platform)
    output, *inner = mixing[::-1]
    activations = [
        Activation('mixer_norm', residual, size, whole=d),
        *inner[::-1],
        dataclasses.replace(output, elements=residual, whole=d),
    ]
    if layer.cross is not None:
        output, *inner = _cross_attention(layer.cross, d, size, placement, stack, platform)[::-1]
        activations += [
            Activation('cross_norm', residual, size, whole=d),
            *inner[::-1],
            dataclasses.replace(output, elements=residual, whole=d),
        ]
    if isinstance(feed_forward, MoeConfig):
        activations.append(Activation('feed_forward_norm', residual, size, whole=d))
        activations += _experts(feed_forward, d, residual, size, placement.ways('mlp'))
    elif feed_forward is not None:
        f = feed_forward.d_ff / placement.ways('mlp')
        activations += [Activation('feed_forward_norm', residual, size, whole=d), Activation('up', f, size, 2 * d * f)]
        if feed_forward.gated:
            activations.append(Activation('gate', f, size, 2 * d * f))
        activations += [
            Activation('feed_forward_hidden', f, size),
            Activation('feed_forward_output', residual, size, 2 * d * f, whole=d),
        ]
    if layer.dropout:  # a mask for every branch
        branches = 1 + (layer.cross is not None) + (feed_forward is not None)
        activations.append(Activation('dropout', branches * residual, 1))
    return LayerCosts(tuple(activations), residual * size, backward_factor, host_apart=platform != 'cpu')


def heads_bytes(model: ModelConfig, placement: Placement) -> float:
    """Bytes per token that wait beside the layers' in multi-token prediction: states, and embeddings in sequence."""
    if not isinstance(model, DecoderConfig) or model.multi_token is None:
        return 0.0
    size = 4 if model.compute_dtype == 'float32' else 8 if model.compute_dtype == 'float64' else 2
    residual = model.d_model * placement.ways('sequence') / placement.ways('residual')
    arrays = 2 if model.multi_token.kind == 'sequential' else 1
    return len(model.further_layers) * arrays * residual * size


def surroundings_bytes(model: ModelConfig, row: RowTokens, placement: Placement) -> float:
    """Bytes per row that wait around the layers: embeddings that are normalised, masks, an encoder's output."""
    size = 4 if model.compute_dtype == 'float32' else 8 if model.compute_dtype == 'float64' else 2
    residual = model.d_model * placement.ways('sequence') / placement.ways('residual')
    if isinstance(model, EncoderDecoderConfig):
        masks = (row.text + row.read) * residual if model.dropout else 0.0
        return masks + 2 * row.text * residual * size
    kept = row.text * residual if model.embedding_dropout else 0.0
    if isinstance(model, EncoderConfig) and model.embedding_norm is not None:
        kept += row.text * (model.embedding_size or residual) * size
    return kept


def _projections(
    mixer: AttendingConfig, d: int, heads: float, kv_heads: float, size: int, sources: float, stored: int
) -> tuple[Activation, ...]:
    """Queries, keys and values of `heads` and `kv_heads` here, a head of each `stored` as so many elements.

    Args:
        sources: how many tokens have keys for each that has a query.
    """
    k = mixer.head_dim
    if not isinstance(mixer, LatentAttentionConfig):
        of_token = 2 * d * k
        return (
            Activation('query', heads * stored, size, of_token * heads),
            Activation('key', kv_heads * stored * sources, size, of_token * kv_heads * sources),
            Activation('value', kv_heads * stored * sources, size, of_token * kv_heads * sources),
        )
    shared, of_latent = mixer.latent + mixer.rotary_dim, 2 * mixer.latent * heads
    source, first = (d, 0) if mixer.query_latent is None else (mixer.query_latent, mixer.query_latent)
    return (
        Activation('latent', shared + first, size, 2 * d * (shared + first)),
        Activation('query', heads * stored, size, 2 * source * k * heads),
        Activation('key', heads * stored, size, of_latent * mixer.plain_dim),
        Activation('value', heads * stored, size, of_latent * mixer.value_dim),  # as wide as keys, for the kernels
    )


def _experts(moe: MoeConfig, d: int, residual: float, size: int, ways: int) -> list[Activation]:
    """Of balanced experts: what a token costs is on another device, but as much comes from others."""
    many, f = moe.experts_per_token, moe.expert.d_ff / ways
    product = 2 * d * f * many
    rows = [
        Activation('router', moe.num_experts, 4, 2 * d * moe.num_experts),
        Activation('expert_input', many * d, size),
        Activation('expert_up', many * f, size, product),
    ]
    if moe.expert.gated:
        rows.append(Activation('expert_gate', many * f, size, product))
    rows += [
        Activation('feed_forward_hidden', many * f, size),
        Activation('expert_output', many * d, size, product),
    ]
    if moe.shared is not None:
        f = moe.shared.d_ff / ways
        rows.append(Activation('up', f, size, 2 * d * f))
        if moe.shared.gated:
            rows.append(Activation('gate', f, size, 2 * d * f))
        rows.append(Activation('feed_forward_hidden', f, size))
    output = 0 if moe.shared is None else 2 * d * moe.shared.d_ff / ways
    return [*rows, Activation('feed_forward_output', residual, size, output, whole=d)]
