"""How rows are cut along a mesh axis; see `sequence`."""

import dataclasses
from typing import Literal, get_args

import numpy as np

SequenceMethod = Literal['ring', 'ulysses', 'all_gather']


@dataclasses.dataclass(frozen=True)
class SequenceAxis:
    """The mesh axis that rows are cut along.

    Attributes:
        name: of the mesh axis. size: n, devices along it.
        zigzag: whether tokens lie in zig-zag rather than in order.
        permutes: whether the ring is made of collective permutes. XLA:CPU's wait for every device of the program, so
            where only some of them run the ring, as in a stage of a pipeline, it is made of all-to-alls there.
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


def zigzag_order(length: int, devices: int) -> np.ndarray:
    """Index in the row of each token when `devices` equal pieces hold a row in zig-zag, [length].

    `devices` times 2 must divide `length`.
    """
    chunks = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([chunks[[i, 2 * devices - 1 - i]].reshape(-1) for i in range(devices)])
