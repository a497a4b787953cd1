"""T5's relative positions: a learned number per head and bucket of distances, added to the scores of every layer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from llm.errors import UserError
from llm.models.parameters import Role, parameter


@dataclasses.dataclass(frozen=True)
class RelativeBiasConfig:
    """How distances fall into buckets (Raffel et al. 2020, section 2.1).

    Attributes:
        num_buckets: half of them, of each direction, hold one distance each, the others ever more.
        max_distance: from here on all distances share the last bucket.
        bidirectional: whether keys after the query have buckets of their own; otherwise they count as distance 0.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True

    def __post_init__(self) -> None:
        if self.num_buckets < 4 or self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            raise UserError(
                f'{self.num_buckets} buckets for distances up to {self.max_distance}',
                where='RelativeBiasConfig',
                fix='Use a multiple of 4, and a max_distance of more than half of it.',
            )

    def edges(self) -> tuple[int, ...]:
        """The least distance of each bucket after the first of one direction; they grow geometrically from half on."""
        buckets = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        exact = buckets // 2
        growth = self.max_distance / exact
        # The tolerance is for powers that are whole numbers.
        grown = [math.ceil(exact * growth ** (i / (buckets - exact)) - 1e-6) for i in range(1, buckets - exact)]
        return (*range(1, exact + 1), *grown)

    def buckets(self, distance: jax.Array) -> jax.Array:
        """The bucket of each distance, which is key index minus query index."""
        bucket = jnp.zeros(distance.shape, jnp.int32)
        if self.bidirectional:
            bucket = jnp.where(distance > 0, self.num_buckets // 2, 0)
            distance = jnp.abs(distance)
        else:
            distance = jnp.maximum(-distance, 0)
        # As jnp.searchsorted would, without a loop. There are few edges, and one fused operation compares with all.
        return bucket + jnp.sum(distance[..., None] >= jnp.asarray(self.edges()), axis=-1, dtype=jnp.int32)


class RelativeBias(nnx.Module):
    """The bias on the scores of H heads."""

    def __init__(self, config: RelativeBiasConfig, num_heads: int, d_model: int) -> None:
        self.config = config
        shape, axes = (config.num_buckets, num_heads), ('buckets', 'heads')
        self.table = parameter(
            shape, axes, Role.EMBEDDING, inputs=(0,), outputs=(1,), gain=d_model**-0.5, full_precision=True
        )

    def __call__(self) -> jax.Array:
        """The bias of distances -M to M, beyond which all are alike: [H, 2 M + 1] in fp32 at least."""
        buckets = self.config.buckets(jnp.arange(-self.config.max_distance, self.config.max_distance + 1))
        table = self.table[...].astype(jnp.promote_types(self.table[...].dtype, jnp.float32))
        return table[buckets].T
