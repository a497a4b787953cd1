"""From logits to the next token: greedy, or drawn from a distribution that is tempered and cut."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from llm.errors import UserError

# Below this, differences that rounding makes would decide.
_LOWEST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; None leaves a filter out.

    Applied in this order, each to the renormalised result of the one before, as in transformers (llama.cpp tempers
    last, so that its filters see the model's own distribution).

    Attributes:
        temperature: divides the logits; 0 takes the most probable token, of equals the one with the lowest id.
        top_k: keep the k most probable tokens, and those that tie with the k-th (Fan et al. 2018, section 5.4).
        top_p: keep the most probable tokens, as few as add up to at least this (Holtzman et al. 2020, section 3.1); of
            equals those with lower ids come first.
        min_p: keep the tokens at least this times as probable as the most probable one (Nguyen et al. 2024,
            section 3).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not _LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f'SamplingConfig.temperature is {self.temperature}',
                fix=f'Use a number from {_LOWEST_TEMPERATURE} on, or 0 for greedy.',
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f'SamplingConfig.top_k is {self.top_k}', fix='Use at least 1, or None for all tokens.')
        for name in ('top_p', 'min_p'):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(
                    f'SamplingConfig.{name} is {value}', fix='Use a number above 0 and up to 1, or None to keep all.'
                )


def filter_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """The tempered logits, with -inf for every token that cannot be drawn; the temperature must not be 0.

    Shapes: logits [..., V] -> [..., V].
    """
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, config.top_k)[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if config.top_p is not None and config.top_p < 1:
        order = jnp.argsort(logits, axis=-1, stable=True, descending=True)
        probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        # A token stays if those before it do not add up to top_p without it; so the first always does.
        before = jnp.cumsum(probabilities, axis=-1)[..., :-1]
        before = jnp.pad(before, [*[(0, 0)] * (logits.ndim - 1), (1, 0)])
        kept = jnp.zeros(logits.shape, bool)
        kept = jnp.put_along_axis(kept, order, before < config.top_p, axis=-1, inplace=False)
        logits = jnp.where(kept, logits, -jnp.inf)
    if config.min_p is not None:
        logits = jnp.where(logits < math.log(config.min_p), -jnp.inf, logits)  # the largest is 0
    return logits


def sample(logits: jax.Array, config: SamplingConfig, keys: jax.Array) -> jax.Array:
    """Choose a token per row; a row's choice depends on its own logits and key alone.

    Shapes: logits [B, V], keys [B] -> [B] int32.
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, config)).astype(jnp.int32)


def row_keys(seed: jax.Array | int, indices: jax.Array, samples: jax.Array) -> jax.Array:
    """The key of each row, from the index of its prompt and which sample of that prompt it is. [B], [B] -> [B]."""
    root = jax.random.key(seed, impl='threefry2x32')
    return jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(root, i), s))(indices, samples)


def token_keys(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """The key of the token at `positions` of each row: [B], [B] -> [B]."""
    return jax.vmap(jax.random.fold_in)(keys, positions)


def check_seed(seed: int, config: str) -> None:
    """Raises UserError for a seed of `config` that a key cannot hold."""
    if not 0 <= seed < 2**32:
        raise UserError(f'{config}.seed is {seed}', fix='Use 0 to 4,294,967,295.')
