"""Which implementation of a recurrence over a row runs, and rows filled up to whole chunks: of every scan alike."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Implementation = Literal['auto', 'chunked', 'pallas_tpu', 'reference']
Scan = Callable[..., tuple[jax.Array, jax.Array]]


def choose(scan: str, implementation: Implementation, device: jax.Device, length: int) -> Implementation:
    """What 'auto' means on `device` for rows of this length; any other choice as it is."""
    if implementation not in get_args(Implementation):
        raise ValueError(f'no implementation of {scan} is called {implementation!r}')
    if implementation != 'auto':
        return implementation
    if length == 1:  # decoding: nothing to cut up
        return 'reference'
    return 'pallas_tpu' if device.platform == 'tpu' else 'chunked'


def implementation_of(
    scan: str, modules: dict[str, ModuleType], implementation: Implementation, device: jax.Device, length: int
) -> Scan:
    """The function called `scan` of the module that `choose` names."""
    name = choose(scan, implementation, device, length)
    function: Scan = getattr(modules[name], scan)
    if name == 'pallas_tpu':
        # Without a TPU it is interpreted.
        return functools.partial(function, tpu=device.device_kind if device.platform == 'tpu' else None)
    return function


def filled_up(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B, S, ...] with zeros after the last token, up to a multiple of `chunk` tokens."""
    return tuple(jnp.pad(each, [(0, 0), (0, -each.shape[1] % chunk), *[(0, 0)] * (each.ndim - 2)]) for each in arrays)
