"""Looking rows up in a table that is cut over the mesh, by moving ids and results instead of the table.

Each device looks the ids of all devices that share the table's width up in its own piece, and an all-to-all brings
every device the whole width of its own ids: as many bytes as the result has, where the table may have 100,000 rows. The
gradient goes back the same way, so each device adds up the gradient of its own piece and nothing else. (Left to the
compiler, which partitions gathers one dimension at a time, the result is first replicated over all devices.)
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from llm.parallel.sharding import Axes, dividing, manual_axes, map_shards, names, rules_in_force, split_over


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Mesh axes that cut the rows and the width of the table, and the batch and the sequence of the ids."""

    mesh: Mesh | AbstractMesh
    rows: tuple[str, ...]
    width: tuple[str, ...]
    batch: tuple[str, ...]
    sequence: tuple[str, ...]
    shape: tuple[int, ...]  # of the whole table
    table_dtype: jnp.dtype
    dtype: jnp.dtype

    def map(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """`function` on every device's part."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    @property
    def specs(self) -> tuple[P, P, P]:
        """Of the table, the ids and the result."""
        return P(self.rows, self.width), P(self.batch, self.sequence), P(self.batch, self.sequence, None)

    def own_rows(self, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Ids of all devices that share the width, [W, B, S], as rows of this device's piece, and whether they are."""
        ids = jnp.clip(ids, 0, self.shape[0] - 1)
        ids = jax.lax.all_gather(ids, self.width) if self.width else ids[None]
        if not self.rows:
            return ids, jnp.ones(ids.shape, bool)
        size = self.shape[0] // jax.lax.axis_size(self.rows)
        rows = ids - jax.lax.axis_index(self.rows) * size
        return rows, (rows >= 0) & (rows < size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(cut: _Cut, table: jax.Array, ids: jax.Array) -> jax.Array:
    def run(table: jax.Array, ids: jax.Array) -> jax.Array:
        rows, own = cut.own_rows(ids)
        found = jnp.take(table, rows, axis=0, mode='clip').astype(cut.dtype)
        if cut.rows:
            found = jax.lax.psum(jnp.where(own[..., None], found, 0), cut.rows)
        if not cut.width:
            return found[0]
        return jax.lax.all_to_all(found, cut.width, split_axis=0, concat_axis=3, tiled=True)[0]

    table_spec, ids_spec, spec = cut.specs
    result: jax.Array = cut.map(run, (table_spec, ids_spec), spec)(table, ids)
    return result


def _forward(cut: _Cut, table: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _lookup(cut, table, ids), ids


def _backward(cut: _Cut, ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    dtype = jnp.promote_types(cut.dtype, jnp.float32)
    tokens = (*cut.batch, *cut.sequence)
    # Over the axes of the width every device has seen the ids of all; over the others it has not.
    elsewhere = tuple(axis for axis in tokens if axis not in cut.width)

    def run(ids: jax.Array, gradient: jax.Array) -> jax.Array:
        rows, own = cut.own_rows(ids)
        gradient = gradient[None]
        if cut.width:
            gradient = jax.lax.all_to_all(gradient, cut.width, split_axis=3, concat_axis=0, tiled=True)
        size = cut.shape[0] // (jax.lax.axis_size(cut.rows) if cut.rows else 1)
        piece = jnp.zeros((size, gradient.shape[3]), dtype)
        rows = jnp.where(own, rows, size)  # what belongs elsewhere is dropped
        piece = piece.at[rows].add(gradient.astype(dtype), mode='drop')
        for axis in cut.width:
            if axis not in tokens:  # its devices hold the same ids, which have now been counted once for each
                piece = piece / jax.lax.axis_size(axis)
        return jax.lax.psum(piece, elsewhere) if elsewhere else piece

    table_spec, ids_spec, spec = cut.specs
    return cut.map(run, (ids_spec, spec), table_spec)(ids, gradient).astype(cut.table_dtype), None


_lookup.defvjp(_forward, _backward)


def lookup(table: jax.Array, ids: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """Rows of a table: [V, D] and [B, S] -> [B, S, D] in `dtype`. Ids outside the table are clamped into it.

    Args:
        axes: logical axes of the table, which is a parameter.
    """
    current = rules_in_force()
    if current is None or current[0].size == 1:
        return jnp.take(table, ids, axis=0, mode='clip').astype(dtype)
    mesh, rules = current
    if mesh.manual_axes:
        if manual_axes(str(axes[0]), parameters=True):
            return _lookup_in_parts(table, ids, str(axes[0]), dtype)
        return jnp.take(table, ids, axis=0, mode='clip').astype(dtype)
    rows, width = map(names, rules.partition(axes, mesh, parameters=True))
    # Positions that all rows share, or one token a row as in decoding, are not cut up.
    cuts = rules.partition(('batch', 'sequence'), mesh, parameters=False)
    batch, sequence = (dividing(cut, size, mesh) for cut, size in zip(cuts, ids.shape, strict=True))
    if set(rows) & {*batch, *sequence}:  # no device has the ids that another would look up for it
        return jnp.take(table, ids, axis=0, mode='clip').astype(dtype)
    cut = _Cut(mesh, rows, width, batch, sequence, table.shape, table.dtype, jnp.dtype(dtype))
    return _lookup(cut, table, ids)


def _lookup_in_parts(table: jax.Array, ids: jax.Array, axis: str, dtype: Any) -> jax.Array:
    """`lookup` in manual code, which sees some of the rows of the table.

    Args:
        axis: logical axis of the table's rows.
    """
    axes = split_over(axis, parameters=True)

    def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
        size = table.shape[0]
        ids = jnp.clip(ids, 0, size * jax.lax.axis_size(axes) - 1) - size * jax.lax.axis_index(axes)
        found = jnp.take(table, ids, axis=0, mode='clip').astype(dtype)
        here = (ids >= 0) & (ids < size)
        # One device has the row and the others zeros, so the sum is exact in any type.
        return jax.lax.psum(jnp.where(here[..., None], found, jnp.zeros((), dtype)), axes)

    # XLA cannot partition a gather over two more axes in manual code.
    ids_axes = ('batch', 'sequence')
    return map_shards(
        look_up, {'table': table, 'ids': ids}, {'table': (axis, None), 'ids': ids_axes}, (*ids_axes, None)
    )
