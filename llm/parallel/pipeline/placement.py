"""Where the parameters of a pipeline live on a mesh, and how devices get the parts that others have."""

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from llm.parallel.sharding import names

AXIS = 'pipeline'


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one parameter lives, and in which type it is used.

    Attributes:
        spec: over the mesh. dtype: of the products it takes part in; None for its own.
        kept: mesh axes along which devices use their own part, as of experts, rather than gather the whole.
    """

    spec: PartitionSpec
    dtype: Any = None
    kept: tuple[str, ...] = ()

    def restricted(self, axes: tuple[str, ...]) -> PartitionSpec:
        """`spec` without mesh axes other than `axes`."""
        return PartitionSpec(*(tuple(a for a in names(each) if a in axes) or None for each in self.spec))


def is_placement(node: Any) -> bool:
    return isinstance(node, Placement)


def without_leading_axis(placements: Any) -> Any:
    return jax.tree.map(
        lambda each: dataclasses.replace(each, spec=PartitionSpec(*tuple(each.spec)[1:])),
        placements,
        is_leaf=is_placement,
    )


def cast(x: jax.Array, placement: Placement) -> jax.Array:
    return x if placement.dtype is None else x.astype(placement.dtype)


def gathered(parameters: Any, placements: Any, manual: tuple[str, ...], *, from_stages: bool = False) -> Any:
    """Whole parameters, but for axes other than `manual`, and but for `pipeline` unless `from_stages`."""

    def one(x: jax.Array, placement: Placement) -> jax.Array:
        for dimension, axes in enumerate(placement.spec):
            over = tuple(
                a for a in names(axes) if a in manual and a not in placement.kept and (from_stages or a != AXIS)
            )
            if over:
                x = jax.lax.all_gather(x, over, axis=dimension, tiled=True)
        return x

    return jax.tree.map(one, jax.tree.map(cast, parameters, placements), placements)


def summed_over_copies(x: jax.Array, placement: Placement, manual: tuple[str, ...]) -> jax.Array:
    """The sum of x over the devices that have the same part of a parameter."""
    used = {axis for each in placement.spec for axis in names(each)}
    axes = tuple(axis for axis in manual if axis not in used)
    return jax.lax.psum(x, axes) if axes else x
