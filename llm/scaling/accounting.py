"""What a model costs: parameters, FLOPs per token, bytes per device, and the share of the hardware that a run uses.

A multiply-add is two FLOPs. Only matrix products are counted, as in "model FLOPs utilization" (Chowdhery et al. 2022,
PaLM, appendix B): recomputation, normalisation and softmax are not the model's work. The backward pass costs twice the
forward pass.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm.data.objectives import Objective
from llm.data.objectives.denoising import SpanCorruption
from llm.data.objectives.masking import MaskedLanguageModelling
from llm.data.objectives.prefix import PrefixLanguageModelling
from llm.data.objectives.sentence_pairs import SentencePairs
from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.layer import AttendingConfig, LayerConfig
from llm.models.long_attention import LongAttentionConfig
from llm.models.model import ModelConfig, layers_of
from llm.models.moe import MoeConfig
from llm.models.parameters import Role, named_specs
from llm.models.recurrent_attention import RecurrentAttentionConfig
from llm.scaling.chips import device_peak_flops


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalars.

    Attributes:
        total: all.
        non_embedding: without embeddings of tokens and positions and without an output projection of its own (Kaplan
            et al. 2020, section 2.1).
        active: all but the experts that a token is not sent to.
    """

    total: int
    non_embedding: int
    active: int


def count(config: ModelConfig, specs: dict[str, Any]) -> ParameterCount:
    """Parameters of the model; `specs` is its nested dict of ParameterSpec."""
    total = _size(specs, *Role)
    return ParameterCount(
        total=total,
        non_embedding=_size(specs, Role.HIDDEN, Role.ROUTER, Role.VECTOR),
        active=total - _idle(layers_of(config), config.d_model),
    )


def _size(specs: dict[str, Any], *roles: Role) -> int:
    return sum(math.prod(spec.shape) for _, spec in named_specs(specs) if spec.role in roles)


def _idle(layers: Sequence[LayerConfig], d_model: int) -> int:
    """Parameters of the experts that a token is not sent to."""
    networks = [layer.feed_forward for layer in layers]
    return sum(each.idle_parameters(d_model) for each in networks if isinstance(each, MoeConfig))


@dataclasses.dataclass(frozen=True)
class RowTokens:
    """The tokens of one row of a batch, by what is done with them.

    Attributes:
        text: of an encoder-decoder those that the encoder reads, else those that the model reads.
        decoder: those that the decoder of an encoder-decoder reads; None for other models.
        predicted: those of an encoder that have logits; None for all that there are.
        pair: whether an encoder says of the row besides if its second part follows the first.
        prefix: whether a decoder reads the beginning of each document in both directions.
    """

    text: int
    decoder: int | None = None
    predicted: int | None = None
    pair: bool = False
    prefix: bool = False

    @property
    def read(self) -> int:
        """Those that the last layers read: what logits are made of."""
        return self.text if self.decoder is None else self.decoder


def row_tokens(config: ModelConfig, sequence_length: int, objective: Objective | None = None) -> RowTokens:
    """What rows of `sequence_length` tokens of text are for this model.

    Args:
        objective: None for causal language modelling of a decoder; for what encoders (with pairs of texts, if they
            classify them) and encoder-decoders are pretrained with; for the labels of a model that has num_outputs.

    Raises:
        UserError: the objective is for other models.
    """
    if objective is not None and objective.batch_kind() != config.batch_kind:
        raise UserError(
            f'{type(objective).__name__} is no objective of an {type(config).__name__}',
            where='objective',
            fix='Use another objective, or another model.',
        )
    if isinstance(config, EncoderDecoderConfig):
        denoising = objective if isinstance(objective, SpanCorruption) else SpanCorruption()
        return RowTokens(sequence_length, decoder=denoising.decoder_length(sequence_length))
    if isinstance(config, DecoderConfig):
        return RowTokens(sequence_length, prefix=isinstance(objective, PrefixLanguageModelling))
    if objective is None and config.num_outputs is not None:
        return RowTokens(sequence_length)
    if objective is None:
        objective = SentencePairs() if config.next_sentence else MaskedLanguageModelling()
    pair = isinstance(objective, SentencePairs)
    masking = objective.masking if isinstance(objective, SentencePairs) else objective
    predicted = masking.most(sequence_length) if isinstance(masking, MaskedLanguageModelling) else None
    return RowTokens(sequence_length, predicted=predicted, pair=pair)


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """FLOPs of the forward pass on a row, per token of its text.

    Attributes:
        parameters: products with parameters, two FLOPs each time that one is multiplied with, the logits included.
        attention: products of queries with keys and of weights with values if each query met all keys, or as many as
            its layer's window holds. This is PaLM's convention.
        causal_attention: the same with only the keys that the causal mask leaves: (S + 1) / 2 on average.
        recurrence: of states, token by token: decay, what is written and what is read, a multiply-add each for every
            scalar of a state. Chunks (Dao and Gu 2024, section 6) do more, of which products of matrices are faster.
    """

    parameters: float
    attention: float
    causal_attention: float
    recurrence: float = 0

    def forward(self, *, causal: bool) -> float:
        """One token forward; `causal` chooses the convention for attention."""
        return self.parameters + self.recurrence + (self.causal_attention if causal else self.attention)

    def training(self, *, causal: bool) -> float:
        """One token forward and backward: the 6 N of Kaplan et al. 2020, and attention."""
        return 3 * self.forward(causal=causal)


def flops_per_token(config: ModelConfig, specs: dict[str, Any], row: RowTokens) -> TokenFlops:
    """FLOPs of the model on rows of these tokens, each row one document.

    Logits are of the tokens that have some, the two sides of an encoder-decoder of their own lengths, and what is done
    once for a row (its pair of texts) or with global tokens alone is so; all of it is shared out among the tokens of
    the text. The positions of Transformer-XL, which all rows of a batch share, are left out.
    """
    attention, causal_attention, recurrence = 0, 0, 0
    sides = [(layers_of(config), row.text)]
    if isinstance(config, EncoderDecoderConfig):
        encoder = config.encoder.num_layers
        sides = [(layers_of(config)[:encoder], row.text), (layers_of(config)[encoder:], row.read)]
    for layers, tokens in sides:
        for layer in layers:
            if not isinstance(layer.mixer, AttendingConfig):
                recurrence += 6 * layer.mixer.state_elements * tokens
                continue
            all_keys, seen = _keys(layer.mixer, tokens, first_is_global=getattr(config, 'first_is_global', False))
            per_key = 2 * layer.mixer.num_heads * (layer.mixer.head_dim + layer.mixer.value_dim)
            if isinstance(layer.mixer, RecurrentAttentionConfig):  # a product with positions besides
                per_key = per_key * 3 // 2
            attention, causal_attention = attention + per_key * all_keys, causal_attention + per_key * seen
            if layer.cross is not None:
                crossed = 4 * layer.cross.num_heads * layer.cross.head_dim * tokens * row.text
                attention, causal_attention = attention + crossed, causal_attention + crossed
    products = 2 * _multiplications(config, specs, row)
    return TokenFlops(*(each / row.text for each in (products, attention, causal_attention, recurrence)))


def _keys(mixer: AttendingConfig, tokens: int, *, first_is_global: bool) -> tuple[int, int]:
    """Pairs of query and key of a row of so many tokens: those of PaLM's convention, and those that the mask leaves."""
    window = tokens if mixer.window is None else min(mixer.window, tokens)
    # Query t of 1..S sees min(t, window) keys.
    seen = window * (window + 1) // 2 + (tokens - window) * window
    if isinstance(mixer, AttentionConfig) and not mixer.causal:
        window = tokens if mixer.window is None else min(2 * mixer.window - 1, tokens)
        seen = window * tokens
    more = 0
    if isinstance(mixer, LongAttentionConfig) and first_is_global:  # each token sees the global ones, and they see it
        more = 2 * mixer.global_tokens
    if isinstance(mixer, RecurrentAttentionConfig):
        more = mixer.memory_length
    return (window + more) * tokens, seen + more * tokens


def _multiplications(config: ModelConfig, specs: dict[str, Any], row: RowTokens) -> int:
    """How often a parameter is multiplied with something of a row, all of them together."""
    d, matrices = config.d_model, (Role.HIDDEN, Role.ROUTER)
    layers = layers_of(config)
    if isinstance(config, EncoderDecoderConfig):
        encoder = config.encoder.num_layers
        of_memory = sum(2 * d * each.cross.num_kv_heads * each.cross.head_dim for each in layers if each.cross)
        read = _size(specs['encoder'], *matrices) - _idle(layers[:encoder], d) + of_memory
        written = _size(specs['decoder'], *matrices) - _idle(layers[encoder:], d) - of_memory
        return row.text * read + row.read * (written + config.vocab_size * d)
    if isinstance(config, DecoderConfig):
        used = _size(specs, *matrices, Role.OUTPUT) - _idle(layers, d)
        if config.tied_embeddings and config.num_outputs is None:
            used += config.vocab_size * d
        # The output projection serves every depth of multi-token prediction.
        used += len(config.further_layers) * config.vocab_size * d
        products = row.text * used
        for mixer in (layer.mixer for layer in layers):
            if isinstance(mixer, RecurrentAttentionConfig):  # keys and values of what is remembered; no positions
                kernel = d * mixer.num_heads * mixer.head_dim
                products += kernel * (2 * mixer.memory_length - row.text)
        return products
    repeats = config.layers.repeats if config.layers.shared_layers else 1
    products = row.text * (repeats * _size(specs['encoder'], *matrices) - _idle(layers, d))
    for mixer in (layer.mixer for layer in layers):
        if isinstance(mixer, LongAttentionConfig) and mixer.global_tokens:
            query, others = (d * many * mixer.head_dim for many in (mixer.num_heads, 2 * mixer.num_kv_heads))
            products -= query * row.text
            products += query * mixer.global_tokens if config.first_is_global else -others * row.text
    embedding = config.embedding_size or d
    if config.embedding_size is not None:
        products += row.text * embedding * d
    scored = row.text if row.predicted is None else row.predicted
    if config.num_outputs is None:
        products += scored * (config.vocab_size + (0 if config.head is None else d)) * embedding
    else:
        products += scored * (config.num_outputs + (d if config.pooler and config.num_outputs else 0)) * d
    return products + ((d + 2) * d if row.pair else 0)


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device between steps and, as `gradients`, at the end of the backward pass; without activations."""

    parameters: int
    optimizer: int
    gradients: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer + self.gradients


def bytes_per_device(arrays: Any) -> int:
    """Bytes that one device holds of a tree of arrays or jax.ShapeDtypeStructs; without a sharding, all of it."""

    def shard_bytes(array: Any) -> int:
        sharding = getattr(array, 'sharding', None)
        shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
        return math.prod(shape) * jnp.dtype(array.dtype).itemsize

    return sum(map(shard_bytes, jax.tree.leaves(arrays)))


def training_memory(parameters: Any, optimizer: Any, trained: Any = None) -> TrainingMemory:
    """Memory of a train state, given as trees of arrays or of jax.ShapeDtypeStructs with shardings.

    Gradients have the type and sharding of the parameters.

    Args:
        trained: the parameters that have gradients; None for all.
    """
    return TrainingMemory(
        parameters=bytes_per_device(parameters),
        optimizer=bytes_per_device(optimizer),
        gradients=bytes_per_device(parameters if trained is None else trained),
    )


def peak_flops(devices: Sequence[jax.Device]) -> float:
    """Peak FLOP/s of all `devices` together: dense bf16 by table on TPU and GPU, measured in fp32 on CPU.

    The CPU devices of a process share its cores, so they count once per process. 0.0 if a device is not in the tables.
    """
    if devices[0].platform == 'cpu':
        return len({device.process_index for device in devices}) * measured_cpu_flops()
    peaks = [_device_peak(device) for device in devices]
    return sum(peaks) if all(peaks) else 0.0


def _device_peak(device: jax.Device) -> float:
    return device_peak_flops(device.device_kind, getattr(device, 'num_cores', 1))


@functools.cache
def measured_cpu_flops() -> float:
    """FLOP/s of the fastest of a few fp32 products of 1024 x 1024 matrices; takes about half a second, once."""
    size, repeats = 1024, 8
    x = jax.device_put(jnp.ones((size, size), jnp.float32), jax.local_devices(backend='cpu')[0])
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def mfu(tokens_per_second: float, training_flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilization, from 0 to 1: the share of the peak FLOP/s that the model's own work takes.

    Args:
        tokens_per_second: trained on by all devices together.
        training_flops_per_token: TokenFlops.training in either convention.
        peak: of all devices together, FLOP/s.
    """
    return tokens_per_second * training_flops_per_token / peak
