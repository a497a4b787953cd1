"""Cross-entropy over chunks of tokens, on one device's part of tokens and vocabulary.

Only the logits of one chunk exist at a time. Where the gradient of a weighted sum is wanted it is taken with the
loss, chunk by chunk: three products in all, and no logits are kept or computed again (Hsu et al. 2024, "Liger Kernel",
section 3.2, FusedLinearCrossEntropy).

Tokens are flat here: S counts all tokens of the device's part. Every function may run inside jax.shard_map, where
`vocab_axes` are the mesh axes that split the kernel's vocabulary; what is combined over them is [S] numbers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Options:
    """What does not change with the arrays.

    Attributes:
        multiplier, soft_cap: see `llm.kernels.cross_entropy`.
        chunk: most tokens at a time.
        vocab_axes: mesh axes, major first, over which the vocabulary is split; () for a whole one.
    """

    multiplier: float
    soft_cap: float | None
    chunk: int
    vocab_axes: tuple[str, ...] = ()


def default_chunk(vocabulary: int, platform: str) -> int:
    """Tokens of a chunk when a device holds `vocabulary` columns of the kernel.

    A chunk's fp32 logits take 256 MiB, on a CPU 8 MiB, which stay in its cache. But it is never so short that reading
    the kernel and adding to its gradient take longer than the products: per chunk of S tokens 6 S D V FLOPs stand
    against 12 D V bytes, so that a chip that does 560 FLOPs a byte (TPU v6e, the most of any) needs S of 1,120.
    """
    size, least = (2**23, 128) if platform == 'cpu' else (2**28, 1024)
    return max(least, size // (4 * vocabulary))


def _over_chunks(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, arrays: Any, chunk: int) -> tuple[Any, Any]:
    """jax.lax.scan of `body` over chunks of the leading axis; one chunk is one call.

    What `body` gives for padding must be cut off or add nothing to the carry, given that padding is zeros.
    """
    size = jax.tree.leaves(arrays)[0].shape[0]
    least = max(1, math.ceil(size / chunk))
    if least == 1:
        return body(carry, arrays)
    # A few chunks more, if that saves padding and with it a copy of everything.
    chunks = next((n for n in range(least, 2 * least) if size % n == 0), least)
    padding = -size % chunks

    def split(x: jax.Array) -> jax.Array:
        if padding:
            x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(chunks, -1, *x.shape[1:])

    carry, outputs = jax.lax.scan(body, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], outputs)


def _chunk_losses(
    options: Options, kernel: jax.Array, bias: jax.Array | None, hidden: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(nll [S], log_z [S], logits [S, V], whether a logit is its token's target [S, V])."""
    axes = options.vocab_axes
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum('SD,DV->SV', hidden, kernel, preferred_element_type=dtype)
    if options.multiplier != 1:
        logits = logits * options.multiplier
    if bias is not None:
        logits = logits + bias.astype(dtype)
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)

    columns = kernel.shape[1]
    targets = targets.astype(jnp.promote_types(targets.dtype, jnp.int32))
    known = (targets >= 0) & (targets < columns * (jax.lax.axis_size(axes) if axes else 1))
    first = jax.lax.axis_index(axes) * columns if axes else 0
    column = jnp.where(known, targets - first, -1)
    # A comparison and not a gather, whose transpose would be a scatter.
    is_target = jax.lax.broadcasted_iota(column.dtype, logits.shape, 1) == column[:, None]

    largest = jnp.max(logits, axis=-1)
    if axes:
        largest = jax.lax.pmax(largest, axes)
    largest = jnp.where(jnp.isfinite(largest), largest, 0)
    sums = jnp.stack(
        [
            jnp.sum(jnp.exp(logits - largest[:, None]), axis=-1),
            jnp.sum(jnp.where(is_target, logits, 0), axis=-1),
        ]
    )
    if axes:
        sums = jax.lax.psum(sums, axes)
    log_z = largest + jnp.log(sums[0])
    return log_z - jnp.where(known, sums[1], jnp.nan), log_z, logits, is_target


def token_losses(
    options: Options, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Losses without a gradient.

    Shapes: hidden [S, D], kernel [D, V] of one type, targets [S], bias [V] -> nll [S], log_z [S].
    """

    def body(carry: None, arrays: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        return carry, _chunk_losses(options, kernel, bias, *arrays)[:2]

    losses: tuple[jax.Array, jax.Array] = _over_chunks(body, None, (hidden, targets), options.chunk)[1]
    return losses


# (log_z [S], what was given for the chunk) -> gradients of the loss with respect to nll and log_z, [S] each.
Cotangents = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


def token_losses_and_gradients(
    options: Options,
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    cotangents: Cotangents,
    given: Any,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Losses, and the gradients of a scalar that depends on them token by token.

    Args:
        hidden: [S, D]; kernel: [D, V] of the same type; targets: [S]; bias: [V].
        cotangents: see Cotangents. given: arrays [S], handed to `cotangents` chunk by chunk; zeros must give zeros.

    Returns:
        (nll [S], log_z [S], d_hidden [S, D] in the type of `hidden`, d_kernel [D, V] and d_bias [V] in at
        least fp32). With `vocab_axes` d_hidden is this device's term of a sum over them, not yet taken.
    """
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    # float16 cannot hold probabilities of a large vocabulary; bfloat16 has the exponents of float32.
    narrow = jnp.finfo(hidden.dtype).minexp > jnp.finfo(jnp.float32).minexp
    operand = dtype if narrow else hidden.dtype
    transposed_kernel = kernel.astype(operand)

    def body(summed: Any, arrays: Any) -> tuple[Any, Any]:
        d_kernel, d_bias = summed
        hidden_chunk, targets_chunk, given_chunk = arrays
        nll, log_z, logits, is_target = _chunk_losses(options, kernel, bias, hidden_chunk, targets_chunk)
        d_nll, d_log_z = cotangents(log_z, given_chunk)
        d_logits = (d_nll + d_log_z)[:, None] * jnp.exp(logits - log_z[:, None])
        d_logits = d_logits - jnp.where(is_target, d_nll[:, None], 0)
        if options.soft_cap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / options.soft_cap))
        if d_bias is not None:
            d_bias = d_bias + jnp.sum(d_logits, axis=0)
        if options.multiplier != 1:
            d_logits = d_logits * options.multiplier
        product = functools.partial(jnp.einsum, preferred_element_type=dtype)
        d_logits = d_logits.astype(operand)
        d_hidden = product('SV,DV->SD', d_logits, transposed_kernel).astype(hidden.dtype)
        d_kernel = d_kernel + product('SD,SV->DV', hidden_chunk.astype(operand), d_logits)
        return (d_kernel, d_bias), (nll, log_z, d_hidden)

    zeros = jnp.zeros(kernel.shape, dtype), None if bias is None else jnp.zeros(bias.shape, dtype)
    summed, (nll, log_z, d_hidden) = _over_chunks(body, zeros, (hidden, targets, given), options.chunk)
    return nll, log_z, d_hidden, *summed
