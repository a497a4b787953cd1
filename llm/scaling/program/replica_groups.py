"""Which devices a collective joins: the forms in which HLO text writes replica groups, and the mesh axes they span."""

import math
import re
from collections.abc import Sequence

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(
    r'replica_groups=@?mesh\[([^\]]*)\](?:,\s*device_ids=\((\[[^\]]*\](?:T\([\d,]+\))?|[\d,\s]*)\))?\s*\{([^}]*)\}'
)
_LISTS = re.compile(r'replica_groups=\{((?:\{[\d,\s]*\},?\s*)*)\}')
_PAIRS = re.compile(r'source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}')
_AXIS = re.compile(r"'?([\w.\-]+?)'?=(\d+)")
_AXIS_REFERENCE = re.compile(r"'?([\w.\-]+?)'?(?::\((\d+)\)(\d+))?(?:,|$)")


def replica_groups(attributes: str, num_devices: int) -> Groups:
    """The groups of an instruction, from the text of its attributes.

    Read are lists `{{0,1},{2,3}}`, where `{}` is one group of all; iota tiles `[2,4]<=[8]` and `[4,2]<=[2,4]T(1,0)`;
    and axes of a mesh of the compiler's own, `mesh['a'=2,'b'=4] {'b'}`, with parts of an axis as `'b':(2)2` and an
    order of devices as `device_ids=(...)`.

    Args:
        num_devices: of the program.

    Raises:
        ValueError: there are no groups in a form that is known here.
    """
    if found := _IOTA.search(attributes):
        shape, source, order = (_integers(part) if part else () for part in found.groups())
        return _rows(_iota(source, order).reshape(shape))
    if found := _MESH.search(attributes):
        return _mesh_groups(found[1], found[2], found[3])
    if found := _LISTS.search(attributes):
        groups = tuple(_integers(group) for group in re.findall(r'\{([\d,\s]*)\}', found[1]))
        return tuple(group for group in groups if group) or (tuple(range(num_devices)),)
    raise ValueError(f'no replica groups in {attributes[:200]!r}')


def source_target_pairs(attributes: str) -> Groups:
    """The (source, target) pairs of a collective-permute.

    Raises:
        ValueError: there are none.
    """
    found = _PAIRS.search(attributes)
    if not found:
        raise ValueError(f'no source_target_pairs in {attributes[:200]!r}')
    return tuple(_integers(pair) for pair in re.findall(r'\{([\d,\s]*)\}', found[1]))


def spanned_axes(groups: Groups, axis_sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which some group has more than one coordinate, in the order of the mesh.

    Args:
        groups: of positions in the mesh's devices, flattened in row-major order. A collective may join only part of
            an axis; the axis is named all the same.
    """
    spanned: set[str] = set()
    for group in groups:
        coordinates = np.unravel_index(group, tuple(axis_sizes.values()))
        spanned.update(
            axis for axis, along in zip(axis_sizes, coordinates, strict=True) if len(set(along.tolist())) > 1
        )
    return tuple(axis for axis in axis_sizes if axis in spanned)


def _mesh_groups(axes: str, device_ids: str | None, grouped: str) -> Groups:
    names, sizes = zip(*((name, int(size)) for name, size in _AXIS.findall(axes)), strict=True) if axes else ((), ())
    if not device_ids:
        order = np.arange(math.prod(sizes))
    elif device_ids.startswith('['):
        inner, _, transpose = device_ids.partition('T')
        order = _iota(_integers(inner.strip('[]')), _integers(transpose.strip('()'))).reshape(-1)
    else:
        order = np.array(_integers(device_ids))
    # An axis of which only a part is grouped is cut into (before, part, after).
    dimensions: list[int] = []
    joined: list[int] = []
    parts: dict[str, list[tuple[int, int]]] = {}
    for name, before, size in _AXIS_REFERENCE.findall(grouped):
        parts.setdefault(name, []).append((int(before or 1), int(size or 0)))
    for name, whole in zip(names, sizes, strict=True):
        done = 1
        for before, size in sorted(parts.get(name, [])):
            part = size or whole
            dimensions += [before // done, part]
            joined.append(len(dimensions) - 1)
            done = before * part
        dimensions.append(whole // done)
    devices = order.reshape(dimensions)
    kept = [dimension for dimension in range(devices.ndim) if dimension not in joined]
    group_size = math.prod(devices.shape[dimension] for dimension in joined)
    return _rows(devices.transpose(kept + joined).reshape(-1, group_size))


def _iota(source: Sequence[int], order: Sequence[int]) -> np.ndarray:
    devices = np.arange(math.prod(source)).reshape(source)
    return devices.transpose(order) if order else devices


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(int(device) for device in row) for row in array.reshape(-1, array.shape[-1]))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r'\d+', text))
