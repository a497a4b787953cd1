"""Parameters from a checkpoint of another format, straight onto a mesh: each process reads what its devices hold.

Nothing is read twice and little is held: the piece of one layer at a time is mapped, cut, cast and handed over.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm.errors import UserError
from llm.interop.tables import Link, shapes
from llm.models.parameters import named_specs
from llm.parallel.sharding import AxisRules, parameter_sharding

# Up to this many bytes of one shard are put together on the host before they go to the device.
HOST_BYTES = 2**28
_MOST_NAMED = 5


class Tensor(Protocol):
    """A tensor of a checkpoint, not read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""

    @property
    def dtype(self) -> np.dtype:
        """Of its elements as `read` gives them."""

    def read(self) -> np.ndarray:
        """Its data, perhaps mapped rather than read."""


def check_tensors(
    tensors: Mapping[str, Tensor], links: Sequence[Link], where: str, ignored: Sequence[str] = ()
) -> None:
    """Compare what a checkpoint holds with what the table wants, from names and shapes alone.

    Args:
        ignored: names that may be there besides.

    Raises:
        UserError: a tensor is missing, unknown or of another shape: each is named.
    """
    expected = shapes(links)
    problems = [f'{name} is missing' for name in expected if name not in tensors]
    problems += [
        f'{name} has shape {list(tensors[name].shape)}, not {list(shape)}'
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems += [f'{name} is unknown' for name in tensors if name not in expected and name not in ignored]
    if problems:
        more = f'; and {len(problems) - _MOST_NAMED} more' if len(problems) > _MOST_NAMED else ''
        raise UserError(
            f'the tensors are not those of its config: {"; ".join(problems[:_MOST_NAMED])}{more}',
            where=where,
            fix='Use the config that belongs to these tensors.',
        )


class Pieces:
    """Our parameters as a checkpoint has them, to be read slice by slice.

    Args:
        tensors: of the checkpoint, which `check_tensors` has passed.
        links: of the model's table.
        specs: nested dict of ParameterSpec.

    Attributes:
        shapes, dtypes: of our parameters by name, with the dtypes of the checkpoint.
    """

    def __init__(self, tensors: Mapping[str, Tensor], links: Sequence[Link], specs: Mapping[str, Any]) -> None:
        self._tensors = tensors
        found: dict[str, np.dtype] = {}
        for link in links:  # layers may differ, in GGUF files for one
            dtype = tensors[link.name].dtype
            found[link.path] = dtype if found.get(link.path, dtype) == dtype else np.dtype(np.float32)
        self.dtypes = {path: str(dtype) for path, dtype in found.items()}
        self.shapes = {name: spec.shape for name, spec in named_specs(dict(specs))}
        self._links: dict[str, dict[tuple[int, ...], Link]] = {name: {} for name in self.shapes}
        for link in links:
            self._links[link.path][link.index] = link

    def read(self, path: str, index: tuple[int | slice, ...], dtype: Any = None) -> np.ndarray:
        """A slice of our array `path`, in `dtype` or that of the checkpoint; dimensions with a number are dropped."""
        dtype = self.dtypes[path] if dtype is None else dtype
        shape = self.shapes[path]
        numbers = [axis for axis, each in enumerate(index) if isinstance(each, int)]
        cuts = [slice(each, each + 1) if isinstance(each, int) else each for each in index]
        cuts += [slice(None)] * (len(shape) - len(cuts))
        bounds = [cut.indices(size)[:2] for cut, size in zip(cuts, shape, strict=True)]
        out = np.empty([stop - start for start, stop in bounds], dtype)
        pieces = self._links[path]
        depth = len(next(iter(pieces)))
        for place in np.ndindex(*out.shape[:depth]):
            link = pieces[tuple(start + i for (start, _), i in zip(bounds[:depth], place, strict=True))]
            piece = link.read(self._tensors[link.name].read())[tuple(slice(*each) for each in bounds[depth:])]
            out[place] = link.ours(piece)
        return out.squeeze(tuple(numbers))


def load_parameters(
    pieces: Pieces, specs: Mapping[str, Any], mesh: Mesh, rules: AxisRules, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """Nested dict of arrays like `specs`, each created where the rules put it.

    Host memory beyond the arrays is at most HOST_BYTES and one tensor of the checkpoint.

    Raises:
        UserError: the mesh cannot divide a parameter.
    """
    named = named_specs(dict(specs))
    # All are checked before the first is read.
    shardings = [parameter_sharding(spec.axes, spec.shape, mesh, rules, name) for name, spec in named]
    arrays = []
    for (name, spec), sharding in zip(named, shardings, strict=True):
        parts = [
            _shard(
                pieces,
                name,
                tuple(slice(*cut.indices(n)) for cut, n in zip(index, spec.shape, strict=True)),
                device,
                dtype,
            )
            for device, index in sharding.addressable_devices_indices_map(spec.shape).items()
            if index is not None
        ]
        arrays.append(jax.make_array_from_single_device_arrays(spec.shape, sharding, parts))
    tree: dict[str, Any] = jax.tree.unflatten(jax.tree.structure(dict(specs)), arrays)
    return tree


def _shard(pieces: Pieces, name: str, index: tuple[slice, ...], device: jax.Device, dtype: Any) -> jax.Array:
    """One device's part of an array; a large one is made there, a few layers at a time."""
    size = [cut.stop - cut.start for cut in index]
    whole = int(np.prod(size)) * jnp.dtype(dtype).itemsize
    if whole <= HOST_BYTES or not size or size[0] < 2:
        return jax.device_put(pieces.read(name, index, dtype), device)
    step = max(1, size[0] * HOST_BYTES // whole)
    out = jax.device_put(jnp.zeros(size, dtype, device=device), device)
    for start in range(0, size[0], step):
        rows = slice(index[0].start + start, min(index[0].start + start + step, index[0].stop))
        part = jax.device_put(pieces.read(name, (rows, *index[1:]), dtype), device)
        out = _put(out, part, start)
        # The host goes on ahead of the device otherwise, and holds every part at once.
        out.block_until_ready()
    return out


def _update(out: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, part, start, axis=0)


_put = jax.jit(_update, donate_argnums=0)
