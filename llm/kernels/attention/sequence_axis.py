"""How rows are cut along a mesh axis; see `sequence`."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

SequenceMethod = Literal['ring', 'ulysses', 'all_gather']


@dataclasses.dataclass(frozen=True)
class SequenceAxis:
    """The mesh axis that rows are cut along.

    Attributes:
        name: of the mesh axis. size: n, devices along it.
        zigzag: whether tokens lie in zig-zag rather than in order.
        permutes: whether `hand_on` is a collective permute. XLA:CPU's wait for every device of the program, so where
            only some of them run it, as in a stage of a pipeline, it is an all-to-all there.
    """

    name: str
    size: int
    method: SequenceMethod
    zigzag: bool
    permutes: bool = True

    def __post_init__(self) -> None:
        if self.method not in get_args(SequenceMethod):
            raise ValueError(f'no sequence method is called {self.method!r}')
        if self.zigzag and self.method == 'ulysses':
            raise ValueError('ulysses attends to whole rows, whose tokens must be in order')

    @property
    def parts(self) -> int:
        """Runs of neighbouring tokens that a device holds."""
        return 2 if self.zigzag else 1


def hand_on(x: jax.Array, axis: SequenceAxis, step: int = 1) -> jax.Array:
    """What the device `step` places before this one has as x; they form a ring."""
    n = axis.size
    if axis.permutes:
        return jax.lax.ppermute(x, axis.name, [(i, (i + step) % n) for i in range(n)])
    rank = jax.lax.axis_index(axis.name)
    slots = jnp.arange(n) == (rank + step) % n
    sent = jnp.where(slots.reshape(n, *[1] * x.ndim), x, jnp.zeros((), x.dtype))
    return jax.lax.all_to_all(sent, axis.name, split_axis=0, concat_axis=0, tiled=True)[(rank - step) % n]


def pieces_of(axis: SequenceAxis) -> list[jax.Array]:
    """Which piece of the row each of this device's parts is, counted from 0."""
    rank = jax.lax.axis_index(axis.name)
    return [rank, 2 * axis.size - 1 - rank][: axis.parts]


def in_order(x: jax.Array, axis: SequenceAxis) -> jax.Array:
    """[B, S, ...] of every device -> [B, n * S, ...], whole rows in order."""
    x = jax.lax.all_gather(x, axis.name, axis=1, tiled=True)
    if not axis.zigzag:
        return x
    chunks = x.reshape(x.shape[0], 2 * axis.size, -1, *x.shape[2:])
    return chunks[:, np.argsort(zigzag_order(2 * axis.size, axis.size))].reshape(x.shape)


def zigzag_order(length: int, devices: int) -> np.ndarray:
    """Index in the row of each token when `devices` equal pieces hold a row in zig-zag, [length].

    `devices` times 2 must divide `length`.
    """
    chunks = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([chunks[[i, 2 * devices - 1 - i]].reshape(-1) for i in range(devices)])
