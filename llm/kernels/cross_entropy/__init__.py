"""Cross-entropy of a vocabulary projection: hidden states in, losses out, and never all the logits in between.

`reference.py` is the definition, `chunked.py` the computation on one device, and here is what both are for: two
functions that differentiate, on one device, on a mesh, or in code that is manual over some axes of a mesh.

On a mesh, per call: the kernel is gathered over the axes that split its D, once, in the type of `hidden`; where axes
split V it stays split, and [tokens] numbers are combined; the gradient of the kernel is added up over the axes that
split tokens and scattered over those that split its D, once, in at least fp32.

In manual code the same goes for the axes that are left to the compiler. Of the manual ones only those of V matter here:
every device gives the loss of all V, and the gradients count what each device does with it. Those of `hidden`, which is
the same on all, are terms of a sum over the devices, as everything is that `jax.shard_map` differentiates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from llm.kernels.cross_entropy import chunked
from llm.kernels.cross_entropy.reference import weighted_sums


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where tokens and kernel live: for each dimension the mesh axes that split it, major first; () keeps it whole.

    Attributes:
        mesh: the device mesh; None for one device.
        batch, sequence: of hidden states, targets and weights; no manual axes.
        vocab, embed: of the kernel. No axis may split both vocabulary and tokens, or both vocabulary and embed. Manual
            axes of the vocabulary come first; there are none of embed.
        platform: of the devices that the program is for; None for that of the mesh, or where it has no devices, of the
            default ones.
    """

    mesh: Mesh | AbstractMesh | None = None
    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    platform: str | None = None

    def __post_init__(self) -> None:
        if set(self.vocab) & {*self.tokens, *self.embed}:
            raise ValueError(f'{self}: an axis of the vocabulary also splits tokens or the embedding')

    @property
    def tokens(self) -> tuple[str, ...]:
        """The axes over which tokens differ."""
        return self.batch + self.sequence

    @property
    def manual(self) -> tuple[str, ...]:
        """The axes of the vocabulary that are manual where this is called."""
        return () if self.mesh is None else tuple(axis for axis in self.vocab if axis in self.mesh.manual_axes)

    @property
    def open_vocab(self) -> tuple[str, ...]:
        """The other axes of the vocabulary."""
        return self.vocab[len(self.manual) :]

    @property
    def target_platform(self) -> str:
        """Of the devices that the program is for, which may not be the default ones."""
        if self.platform is not None:
            return self.platform
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else jax.default_backend()


@dataclasses.dataclass(frozen=True)
class _Options:
    multiplier: float
    soft_cap: float | None
    z_loss: float
    chunk: int | None
    placement: Placement
    groups: int | None = None

    def chunked(self, columns: int) -> chunked.Options:
        """Those of one device, which holds `columns` of the kernel."""
        chunk = chunked.default_chunk(columns, self.placement.target_platform) if self.chunk is None else self.chunk
        return chunked.Options(self.multiplier, self.soft_cap, chunk, self.placement.vocab)

    def map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` on every device's part."""
        mesh = self.placement.mesh
        if mesh is None or mesh.size == 1:
            return function
        mapped: Callable[..., Any] = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
            check_vma=False,
        )
        return mapped

    def specs(self) -> tuple[P, P, P, P]:
        """Of hidden, kernel, bias and [B, S] arrays."""
        place = self.placement
        vocab = place.open_vocab
        return P(place.batch, place.sequence, None), P(place.embed, vocab), P(vocab), P(place.batch, place.sequence)


def _gathered(place: Placement, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """All of D, in `dtype`, from this device's part."""
    kernel = kernel.astype(dtype)
    return jax.lax.all_gather(kernel, place.embed, axis=0, tiled=True) if place.embed else kernel


def _scattered(place: Placement, d_kernel: jax.Array) -> jax.Array:
    """This device's part of the kernel's gradient, [D, V], added up over all tokens."""
    for axis in place.embed:
        if axis in place.tokens:
            d_kernel = jax.lax.psum_scatter(d_kernel, axis, scatter_dimension=0, tiled=True)
        else:
            rows = d_kernel.shape[0] // jax.lax.axis_size(axis)
            d_kernel = jax.lax.dynamic_slice_in_dim(d_kernel, jax.lax.axis_index(axis) * rows, rows)
    rest = tuple(axis for axis in place.tokens if axis not in place.embed)
    return jax.lax.psum(d_kernel, rest) if rest else d_kernel


def _losses(
    options: _Options, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(nll, log_z), [B, S] each, of one device's part."""
    whole = _gathered(options.placement, kernel, hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])
    nll, log_z = chunked.token_losses(options.chunked(kernel.shape[1]), flat, whole, targets.reshape(-1), bias)
    return nll.reshape(targets.shape), log_z.reshape(targets.shape)


def _losses_and_gradients(
    options: _Options,
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    cotangents: chunked.Cotangents,
    *given: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """(nll, log_z, d_hidden, d_kernel, d_bias) of one device's part."""
    place = options.placement
    nll, log_z, d_hidden, d_kernel, d_bias = chunked.token_losses_and_gradients(
        options.chunked(kernel.shape[1]),
        hidden.reshape(-1, hidden.shape[-1]),
        _gathered(place, kernel, hidden.dtype),
        targets.reshape(-1),
        cotangents,
        tuple(x.reshape(-1) for x in given),
        bias,
    )
    d_hidden = d_hidden.reshape(hidden.shape)
    if place.open_vocab:
        d_hidden = jax.lax.psum(d_hidden, place.open_vocab)
    if bias is not None and d_bias is not None:
        d_bias = (jax.lax.psum(d_bias, place.tokens) if place.tokens else d_bias).astype(bias.dtype)
    d_kernel = _scattered(place, d_kernel).astype(kernel.dtype)
    return nll.reshape(targets.shape), log_z.reshape(targets.shape), d_hidden, d_kernel, d_bias


def _summed(place: Placement, *arguments: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`weighted_sums` of the tokens of all devices."""
    sums = weighted_sums(*arguments)
    return jax.lax.psum(sums, place.tokens) if place.tokens else sums


def _over_manual(place: Placement, cotangents: Any) -> Any:
    """What all devices that share the vocabulary by manual axes do with the same losses."""
    return jax.lax.psum(cotangents, place.manual) if place.manual else cotangents


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_cross_entropy(
    options: _Options, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    spec = options.specs()[-1]
    run = options.map(functools.partial(_losses, options), options.specs(), (spec, spec))
    losses: tuple[jax.Array, jax.Array] = run(hidden, kernel, bias, targets)
    return losses


def _token_forward(options: _Options, *arrays: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    return _token_cross_entropy(options, *arrays), arrays


def _token_backward(options: _Options, residuals: Any, gradients: tuple[jax.Array, jax.Array]) -> Any:
    def run(hidden: jax.Array, kernel: jax.Array, bias: Any, targets: jax.Array, *given: jax.Array) -> tuple[Any, ...]:
        return _losses_and_gradients(options, hidden, kernel, bias, targets, lambda log_z, given: given, *given)[2:]

    *places, spec = options.specs()
    gradients = _over_manual(options.placement, gradients)
    return *options.map(run, (*places, spec, spec, spec), tuple(places))(*residuals, *gradients), None


_token_cross_entropy.defvjp(_token_forward, _token_backward)


def token_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    *,
    multiplier: float = 1.0,
    soft_cap: float | None = None,
    bias: jax.Array | None = None,
    chunk: int | None = None,
    placement: Placement = Placement(),
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each target, and the log-partition function.

    Logits are `multiplier * hidden @ kernel + bias`, then `soft_cap * tanh(logits / soft_cap)` (Gemma 2, section 2),
    in at least fp32; products take operands in the type of `hidden`. The backward pass computes them again, chunk by
    chunk; for the gradient of a weighted sum `summed_cross_entropy` does without.

    Args:
        hidden: [B, S, D].
        kernel: [D, V], of any floating type.
        targets: [B, S] integers. One outside the vocabulary makes its nll NaN.
        bias: [V], split over the mesh as the V of the kernel.
        chunk: most tokens whose logits a device holds at a time; None chooses by size and platform.
        placement: how the arrays are spread over a mesh.

    Returns:
        (nll [B, S], log_z [B, S]) in nats, in at least fp32.
    """
    return _token_cross_entropy(_Options(multiplier, soft_cap, 0.0, chunk, placement), hidden, kernel, bias, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed_cross_entropy(
    options: _Options,
    hidden: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    def run(hidden: jax.Array, kernel: jax.Array, bias: Any, targets: jax.Array, weights: jax.Array) -> Any:
        losses = _losses(options, hidden, kernel, bias, targets)
        return _summed(options.placement, *losses, weights, options.z_loss, options.groups)

    specs = options.specs()
    sums: tuple[jax.Array, dict[str, jax.Array]] = options.map(run, (*specs, specs[-1]), P())(
        hidden, kernel, bias, targets, weights
    )
    return sums


def _summed_forward(options: _Options, *arrays: Any) -> tuple[Any, Any]:
    def cotangents(log_z: jax.Array, given: Any) -> tuple[jax.Array, jax.Array]:
        weights = given[0].astype(log_z.dtype)
        return weights, 2 * options.z_loss * weights * log_z

    def run(hidden: jax.Array, kernel: jax.Array, bias: Any, targets: jax.Array, weights: jax.Array) -> Any:
        nll, log_z, *gradients = _losses_and_gradients(options, hidden, kernel, bias, targets, cotangents, weights)
        # Else the compiler scatters the kernel's gradient when it is used, and keeps all of it until then.
        gradients = jax.lax.optimization_barrier(gradients)
        return _summed(options.placement, nll, log_z, weights, options.z_loss, options.groups), gradients

    *places, spec = options.specs()
    sums, gradients = options.map(run, (*places, spec, spec), (P(), places))(*arrays)
    return sums, gradients


def _summed_backward(options: _Options, gradients: Any, cotangents: Any) -> Any:
    cotangent = _over_manual(options.placement, cotangents[0])
    scaled = jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), tuple(gradients))
    if options.placement.manual:
        # Else the TPU compiler multiplies after a sum over devices, and fails where a loop adds up what comes out.
        scaled = jax.lax.optimization_barrier(scaled)
    return *scaled, None, None


_summed_cross_entropy.defvjp(_summed_forward, _summed_backward)


def summed_cross_entropy(
    hidden: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    multiplier: float = 1.0,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    bias: jax.Array | None = None,
    chunk: int | None = None,
    placement: Placement = Placement(),
    groups: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the losses of all tokens, over all devices.

    Differentiated, it computes the gradients with the loss; they are scaled in the backward pass. The gradient reaches
    `hidden`, `kernel` and `bias` through the first result alone: not `weights`, and not through the parts.

    Args:
        hidden, kernel, targets, multiplier, soft_cap, bias, chunk, placement: see `token_cross_entropy`.
        weights: [B, S]. Where they are 0 nothing is added, whatever the target.
        z_loss: coefficient of log_z ** 2 (Chowdhery et al. 2022, "PaLM", section 5).
        groups: give the parts for row r mod groups apart, [groups] each; on a mesh every device must have as many rows
            of each.

    Returns:
        (sum of weights * (nll + z_loss * log_z ** 2), {'nll': sum of its first term, 'z_loss': of its second}).
    """
    options = _Options(multiplier, soft_cap, z_loss, chunk, placement, groups)
    loss, parts = _summed_cross_entropy(options, hidden, kernel, bias, targets, weights)
    return loss, jax.lax.stop_gradient(parts)
