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

from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.layer import AttendingConfig
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
        matmul: those that a token is multiplied with in training; tied embeddings count as the output projection, which
            counts as often as it is used.
        active: all but the experts that a token is not sent to.
    """

    total: int
    non_embedding: int
    matmul: int
    active: int


def count(config: ModelConfig, specs: dict[str, Any]) -> ParameterCount:
    """Parameters of the model; `specs` is its nested dict of ParameterSpec."""
    sizes = dict.fromkeys(Role, 0)
    for _, spec in named_specs(specs):
        sizes[spec.role] += math.prod(spec.shape)
    if isinstance(config, EncoderConfig):
        own = config.num_outputs is not None
        tied = 0 if own else config.vocab_size * (config.embedding_size or config.d_model)
        if config.layers.shared_layers:  # each is multiplied with so many times
            shared = sum(math.prod(s.shape) for _, s in named_specs(specs['encoder']) if s.role is Role.HIDDEN)
            tied += (config.layers.repeats - 1) * shared
    else:
        has_own = isinstance(config, DecoderConfig) and config.num_outputs is not None
        tied = config.vocab_size * config.d_model if config.tied_embeddings and not has_own else 0
        if isinstance(config, DecoderConfig):  # whose output projection serves every depth of multi-token prediction
            tied += len(config.further_layers) * config.vocab_size * config.d_model
    networks = [layer.feed_forward for layer in layers_of(config)]
    idle = sum(each.idle_parameters(config.d_model) for each in networks if isinstance(each, MoeConfig))
    hidden = sizes[Role.HIDDEN] + sizes[Role.ROUTER]
    total = sum(sizes.values())
    return ParameterCount(
        total=total,
        non_embedding=hidden + sizes[Role.VECTOR],
        matmul=hidden + sizes[Role.OUTPUT] + tied - idle,
        active=total - idle,
    )


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """FLOPs of the forward pass, per token of a row of S tokens.

    Attributes:
        parameters: products with parameters, 2 * ParameterCount.matmul, the logits included.
        attention: products of queries with keys and of weights with values if each query met all S keys, or as many
            as its layer's window holds. This is PaLM's convention.
        causal_attention: the same with only the keys that the causal mask leaves: (S + 1) / 2 on average.
        recurrence: of states, token by token: decay, what is written and what is read, a multiply-add each for every
            scalar of a state. Chunks (Dao and Gu 2024, section 6) do more, of which products of matrices are faster.
    """

    parameters: int
    attention: int
    causal_attention: float
    recurrence: int = 0

    def forward(self, *, causal: bool) -> float:
        """One token forward; `causal` chooses the convention for attention."""
        return self.parameters + self.recurrence + (self.causal_attention if causal else self.attention)

    def training(self, *, causal: bool) -> float:
        """One token forward and backward: the 6 N of Kaplan et al. 2020, and attention."""
        return 3 * self.forward(causal=causal)


def flops_per_token(config: ModelConfig, specs: dict[str, Any], sequence_length: int) -> TokenFlops:
    """FLOPs of the model on rows of `sequence_length` tokens, each row one document.

    Of an encoder-decoder: for a token of each side, as if both had rows of this length.
    """
    attention, causal_attention, recurrence = 0, 0.0, 0
    layers = layers_of(config)
    cross = [dataclasses.replace(layer.cross, causal=False) for layer in layers if layer.cross is not None]
    for mixer in [*(layer.mixer for layer in layers), *cross]:
        if not isinstance(mixer, AttendingConfig):
            recurrence += 6 * mixer.state_elements
            continue
        window = sequence_length if mixer.window is None else min(mixer.window, sequence_length)
        # Query t of 1..S sees min(t, window) keys.
        seen = window * (window + 1) // 2 + (sequence_length - window) * window
        per_key = 2 * mixer.num_heads * (mixer.head_dim + mixer.value_dim)  # two FLOPs a multiply-add
        if isinstance(mixer, AttentionConfig) and not mixer.causal:
            window = sequence_length if mixer.window is None else min(2 * mixer.window - 1, sequence_length)
            seen = window * sequence_length
        if isinstance(mixer, LongAttentionConfig):  # each token sees the global ones, and they see it
            window += 2 * mixer.global_tokens
            seen += 2 * mixer.global_tokens * sequence_length
        if isinstance(mixer, RecurrentAttentionConfig):  # a product with positions besides, and keys of the memory
            per_key = per_key * 3 // 2
            window += mixer.memory_length
            seen += mixer.memory_length * sequence_length
        attention += per_key * window
        causal_attention += per_key * seen / sequence_length
    return TokenFlops(2 * count(config, specs).matmul, attention, causal_attention, recurrence)


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
