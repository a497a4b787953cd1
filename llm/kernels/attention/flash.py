"""The gradient of attention from its output and the log-sum-exp of its scores, for any implementation by blocks.

An implementation has two functions. R = H / G query heads share a key/value head, and are neighbours.

    forward(options, query, key, value, positions, *, dtype) -> output [B, S, H, K], log_sum_exp [B, H, S]
    backward(options, query, key, value, positions, log_sum_exp, delta, d_output, *, dtype) -> d_query, d_key, d_value

Results have the type `dtype`, or by default that of the argument they belong to; the log-sum-exp has at least fp32, and
is -inf for a query without keys. `delta` [B, H, S] is the sum over K of output times its gradient. With those two the
backward pass computes the scores again instead of keeping them (Dao et al. 2022, "FlashAttention", algorithm 4), and
pieces of the keys can be worked on apart, with the log-sum-exp and delta of the whole.
"""

import functools
from collections.abc import Callable
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


class Implementation(NamedTuple):
    """The two functions; hashable, with block sizes and the like bound by functools.partial."""

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(
    implementation: Implementation,
    options: Options,
    inputs: Inputs,
) -> jax.Array:
    """Attention by `implementation`, without gradients of positions."""
    output: jax.Array = _forward(implementation, options, inputs)[0]
    return output


def _forward(
    implementation: Implementation,
    options: Options,
    inputs: Inputs,
) -> Any:
    *arrays, sinks = inputs
    output, log_sum_exp = add_sinks(*implementation.forward(options, *arrays), sinks)
    return output, (inputs, output, log_sum_exp)


def _backward(implementation: Implementation, options: Options, residuals: Any, d_output: jax.Array) -> Any:
    (*arrays, sinks), output, log_sum_exp = residuals
    delta = output_dot_gradient(output, d_output)
    gradients = implementation.backward(options, *arrays, log_sum_exp, delta, d_output)
    return (Inputs(*gradients, Positions(), sinks_gradient(sinks, log_sum_exp, delta)),)


attention.defvjp(_forward, _backward)
