"""Arrays to and from disk by Orbax: any pytree of jax arrays out, the same bits onto any mesh back.

Orbax is imported when first used: reading configuration and printing help must not wait for it.
"""

import collections
import functools
import logging
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llm.errors import UserError
from llm.training.checkpoints.streaming import StreamedArray, register_streamed_arrays

# Name of an array, as its keys from the root, to the array.
Named = dict[tuple[str, ...], Any]
_TIMEOUT_SECONDS = 600
_MOST_NAMED = 5


def named_leaves(tree: Any) -> Named:
    """The leaves of a pytree by the names of the keys that lead to them.

    Raises:
        ValueError: two leaves have the same name, as with the keys 0 and '0', or 'a.b' and 'a' over 'b'.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [tuple(jax.tree_util.keystr((key,), simple=True) for key in path) for path, _ in leaves]
    # Orbax joins the keys with dots to name an array on disk, and would let one overwrite the other.
    twice = [name for name, count in collections.Counter('.'.join(name) for name in names).items() if count > 1]
    if twice or () in names:
        raise ValueError(f'arrays cannot be told apart by name: {twice}' if twice else 'the state is a single array')
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def describe(tree: Any) -> dict[str, list[Any]]:
    """{'parameters/layers/0/w': ['float32', [4, 8]]} for every array, or ShapeDtypeStruct, of the tree.

    Raises:
        TypeError: a leaf is something else.
    """
    for name, leaf in named_leaves(tree).items():
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | StreamedArray):
            raise TypeError(f'{"/".join(name)} is a {type(leaf).__name__}, not a jax array')
    return {'/'.join(name): [str(x.dtype), list(x.shape)] for name, x in named_leaves(tree).items()}


class ArrayWriter:
    """Writes one pytree at a time in the background."""

    def __init__(self) -> None:
        import orbax.checkpoint as ocp

        _say_failures_once()
        register_streamed_arrays()
        # Float bits hardly compress: zstd saves 8% and doubles the time.
        options = {'use_zarr3': True, 'use_compression': False}
        # Without a limit on the bytes in flight Orbax writes all arrays in one transaction. With its default of 96 GB
        # it writes each for itself, and when one fails the others go on, into a directory deleted by then.
        writes = ocp.BasePyTreeCheckpointHandler(save_concurrent_bytes=None, **options)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(handler_impl=writes, **options),
            async_options=ocp.options.AsyncOptions(timeout_secs=_TIMEOUT_SECONDS),
        )

    def start(self, path: Path, tree: Any) -> None:
        """Copy the arrays to the host and begin to write them to `path`; they may be donated when this returns.

        On CPU nothing is copied: Orbax holds the buffers themselves, and XLA, told to donate a buffer that somebody
        holds, allocates a new one instead.
        """
        import orbax.checkpoint as ocp

        # Orbax refuses arrays without elements; their shape and dtype, which is all there is, are in the metadata.
        item = _nest({name: leaf for name, leaf in named_leaves(tree).items() if leaf.size})
        self._orbax.save(path, args=ocp.args.PyTreeSave(item))

    def wait(self) -> None:
        """Return when the arrays are written; raises what went wrong."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        """Wait and let go of Orbax's threads."""
        self._orbax.close()


def read_arrays(path: Path, abstract: Any, prefix: tuple[str, ...] = ()) -> Any:
    """Read the arrays below `prefix` in the tree at `path`.

    Args:
        abstract: pytree of jax.ShapeDtypeStruct. An array gets the sharding given there, or the first local device,
            and is cast to the dtype given there.

    Returns:
        A pytree of jax arrays with the structure of `abstract`.
    """
    import orbax.checkpoint as ocp

    anywhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, 'sharding', None) or anywhere)
        for name, x in named_leaves(abstract).items()
    }
    stored = {prefix + name: x for name, x in wanted.items() if math.prod(x.shape)}
    read: Named = {}
    if stored:
        arguments = {
            name: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype)
            for name, x in stored.items()
        }
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            request = ocp.args.PyTreeRestore(
                item=_nest(stored), restore_args=_nest(arguments), partial_restore=bool(prefix)
            )
            read = named_leaves(orbax.restore(path, args=request))
    for name, x in wanted.items():
        if prefix + name not in read:
            read[prefix + name] = jax.jit(lambda x=x: jnp.zeros(x.shape, x.dtype), out_shardings=x.sharding)()
    return jax.tree.unflatten(jax.tree.structure(abstract), [read[prefix + name] for name in wanted])


def check_match(
    saved: dict[str, list[Any]], abstract: Any, where: str, *, prefix: tuple[str, ...] = (), cast: bool = False
) -> None:
    """Check that the arrays described by `saved` are those of `abstract`.

    Args:
        saved: what `describe` said when they were saved.
        prefix: only what is below it in `saved` is compared.
        cast: accept another dtype of the same kind (floating point for floating point).

    Raises:
        UserError: naming the arrays that are missing, not expected, or of another shape or dtype.
    """
    start = ''.join(f'{key}/' for key in prefix)
    saved = {name.removeprefix(start): value for name, value in saved.items() if name.startswith(start)}
    expected = describe(abstract)
    problems = []
    for name in sorted(expected.keys() | saved.keys()):
        if name not in saved:
            problems.append(f'{start}{name} is not in the checkpoint, expected {_show(expected[name])}')
        elif name not in expected:
            problems.append(f'{start}{name} {_show(saved[name])} is in the checkpoint and not expected')
        elif saved[name] != expected[name] and not (
            cast and saved[name][1] == expected[name][1] and _castable(saved[name][0], expected[name][0])
        ):
            problems.append(
                f'{start}{name} is {_show(saved[name])} in the checkpoint, expected {_show(expected[name])}'
            )
    if problems:
        more = f'; and {len(problems) - _MOST_NAMED} more' if len(problems) > _MOST_NAMED else ''
        raise UserError(
            f'the checkpoint does not fit: {"; ".join(problems[:_MOST_NAMED])}{more}',
            where=where,
            fix='Use the model and optimizer config that it was saved with, or another checkpoint.',
        )


def _show(description: list[Any]) -> str:
    dtype, shape = description
    return f'{dtype}[{", ".join(map(str, shape))}]'


def _castable(a: str, b: str) -> bool:
    return all(not name.startswith('key<') and jnp.issubdtype(name, jnp.floating) for name in (a, b))


def _nest(named: Named) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for name, leaf in named.items():
        node = root
        for key in name[:-1]:
            node = node.setdefault(key, {})
        node[name[-1]] = leaf
    return root


@functools.cache
def _say_failures_once() -> None:
    """Keep Orbax from printing what it also raises when a write fails: a person should read one line, from us.

    It logs the traceback, and writes that end after the failure find its event loop closed, which Python reports as
    an exception that nobody can catch.
    """
    logging.getLogger('absl').addFilter(lambda record: not (record.exc_info and 'orbax' in record.pathname))
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.object is not None or str(unraisable.exc_value) != 'Event loop is closed':
            previous(unraisable)

    sys.unraisablehook = hook
