"""Meshes without devices."""

from jax.sharding import AbstractMesh

from llm.parallel.mesh import MESH_AXES


def mesh_of(**sizes: int) -> AbstractMesh:
    """With these sizes of axes; the others have 1."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
