"""The gradient of attention from its output and the log-sum-exp of its scores, for any implementation by blocks.

An implementation has two functions. R = H / G query heads share a key/value head, and are neighbours.

    forward(options, query, key, value, positions, *, dtype) -> output [B, S, H, K], log_sum_exp [B, H, S]
    backward(options, query, key, value, positions, log_sum_exp, delta, d_output, *, dtype) -> d_query, d_key, d_value

One that can add a bias by distance (see `distance_bias`) takes it as `bias`, and its gradient is the backward's fourth.

Results have the type `dtype`, or by default that of the argument they belong to; the log-sum-exp has at least fp32, and
is -inf for a query without keys. `delta` [B, H, S] is the sum over K of output times its gradient. With those two the
backward pass computes the scores again instead of keeping them (Dao et al. 2022, "FlashAttention", algorithm 4), and
pieces of the keys can be worked on apart, with the log-sum-exp and delta of the whole.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm.kernels.attention.masking import Options, Positions


class Inputs(NamedTuple):
    """What attention reads; shapes as in `llm.kernels.attention`."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    positions: Positions
    sinks: jax.Array | None
    bias: jax.Array | None = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The positional arguments of an implementation."""
        return self.query, self.key, self.value, self.positions

    @property
    def options(self) -> dict[str, jax.Array]:
        """Those by name."""
        return {} if self.bias is None else {'bias': self.bias}


class Implementation(NamedTuple):
    """The two functions; hashable, with block sizes and the like bound by functools.partial."""

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, ...]]


def add_sinks(output: jax.Array, log_sum_exp: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp once every query can also attend to a sink: a score per head and a value of zeros.

    Args:
        output: [B, S, H, K]. log_sum_exp: [B, H, S]. sinks: [H], or None for none.
    """
    if sinks is None:
        return output, log_sum_exp
    total = jnp.logaddexp(log_sum_exp, sinks.astype(log_sum_exp.dtype)[:, None])
    share = jnp.exp(log_sum_exp - total).swapaxes(1, 2)[..., None]
    return (output * share).astype(output.dtype), total


def sinks_gradient(sinks: jax.Array | None, log_sum_exp: jax.Array, delta: jax.Array) -> jax.Array | None:
    """Gradient of `sinks`, [H]; log_sum_exp [B, H, S] includes them."""
    if sinks is None:
        return None
    share = jnp.exp(sinks.astype(log_sum_exp.dtype)[:, None] - log_sum_exp)
    return -jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype)


def output_dot_gradient(output: jax.Array, d_output: jax.Array) -> jax.Array:
    """`delta` of the module's docstring: [B, S, H, K] twice -> [B, H, S] in at least float32."""
    dtype = jnp.promote_types(output.dtype, jnp.float32)
    return jnp.einsum('BSHK,BSHK->BHS', output.astype(dtype), d_output.astype(dtype))


def attention(implementation: Implementation, options: Options, inputs: Inputs) -> jax.Array:
    """Attention by `implementation`, without gradients of positions."""
    output: jax.Array = attention_and_sums(implementation, options, inputs)[0]
    return output


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention_and_sums(implementation: Implementation, options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Attention and the log-sum-exp of its scores, [B, H, S], with which parts of the keys can be put together.

    Both have gradients: a score's share of that of the log-sum-exp is its weight, so it is taken off `delta`.
    """
    results: tuple[jax.Array, jax.Array] = _forward(implementation, options, inputs)[0]
    return results


def _forward(implementation: Implementation, options: Options, inputs: Inputs) -> Any:
    found = implementation.forward(options, *inputs.arrays, **inputs.options)
    output, log_sum_exp = add_sinks(*found, inputs.sinks)
    return (output, log_sum_exp), (inputs, output, log_sum_exp)


def _backward(implementation: Implementation, options: Options, residuals: Any, gradients: Any) -> Any:
    inputs, output, log_sum_exp = residuals
    d_output, d_sums = gradients
    delta = output_dot_gradient(output, d_output) - d_sums
    d_query, d_key, d_value, *d_bias = implementation.backward(
        options, *inputs.arrays, log_sum_exp, delta, d_output, **inputs.options
    )
    d_sinks = sinks_gradient(inputs.sinks, log_sum_exp, delta)
    return (Inputs(d_query, d_key, d_value, Positions(), d_sinks, *d_bias),)


attention_and_sums.defvjp(_forward, _backward)


def joined(parts: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """Attention to all keys from that to parts of them: (output [B, S, H, K], log-sum-exp [B, H, S]) of each."""
    sums = jnp.stack([log_sum_exp for _, log_sum_exp in parts])
    highest = jax.lax.stop_gradient(jnp.max(sums, axis=0))
    # A query without keys in any part gets zeros, and no gradient.
    weights = jnp.exp(sums - jnp.where(highest == -jnp.inf, 0, highest))
    total = jnp.sum(weights, axis=0)
    shares = (weights / jnp.where(total == 0, 1, total)).swapaxes(2, 3)[..., None]
    output = functools.reduce(jnp.add, (part * share for (part, _), share in zip(parts, shares, strict=True)))
    return output.astype(parts[0][0].dtype)
