"""The correspondence of a format's tensors with our parameters: one declarative table a family, read both ways.

A table is a tuple of rows. A row names one tensor of theirs, what of ours is in it, and how their dimensions are made
of ours:

    Row('mixer/query', 'model.layers.{layer}.self_attn.q_proj.weight', '(H K) D -> D H K')

Ours is a path within a layer where their name has `{layer}` (the layout rule of `DecoderConfig.location` says where
that layer lies in the stacked arrays), else a path within the model. Where layers are in stacks of their own, 'encoder'
and 'decoder', a path within a layer begins with its stack: 'encoder/mixer/query'. A row whose parameter the model does
not have is passed over, so optional biases and norms stand in one table; a parameter without a row, or a tensor without
one, is an error that names it. To add a family is to write its table and its settings; see
`llm.interop.huggingface.families`.

Dimensions are written as in einops, theirs `->` ours, letters of DESIGN or any others; sizes follow from our shapes:

    'D F -> F D'                transposed; '' is the same as 'A B -> A B' of any rank
    '(H K) D -> D H K'          their first dimension is H * K long, heads outermost
    '(H 2 k) D -> D H (k 2)'    a number is an axis of that size: here the halves of a head are interleaved in ours
    'C 1 W -> W C'              a 1 may stand on one side alone
    'D (...) -> ... D'          ... are all the other axes of ours, however many

Several of ours in one tensor of theirs are its parts, in order, along an axis called `*`:

    Row(('mixer/query', 'mixer/key', 'mixer/value'), 'qkv.weight', '(* H K) D -> D H K')   first all of query, ...
    Row(('mixer/query', 'mixer/key', 'mixer/value'), 'qkv.weight', '(H * K) D -> D H K')   head by head

First in its group, parts may differ in size (fewer key than query heads); elsewhere they are equally large. With `...`
they may differ in their number of axes too: a projection [D, H, K] and one [D, H] are parts of '(* ...) D -> D ...'.

An axis of ours that is spread over several tensors of theirs stands in their name:

    Row('feed_forward/up', 'layers.{layer}.experts.{E}.up.weight', 'F D -> E D F')
    Row('mixer/query_norm/scale', 'layers.{layer}.q_norm.{H}.weight', 'K -> H K')

Where layers of several kinds call parameters of theirs alike, `beside` says which kind a row is for, by another
parameter that such layers have:

    Row('mixer/output', 'layers.{layer}.self_attn.o_proj.weight', 'D (H K) -> H K D', beside='mixer/query')
    Row('mixer/output', 'layers.{layer}.mamba.out_proj.weight', 'D F -> F D', beside='mixer/a_log')
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llm.errors import UserError
from llm.models.parameters import ParameterSpec, named_specs

Shape = tuple[int, ...]
# (group, position, entry along the leading axis) of a layer; see DecoderConfig.location.
Location = Callable[[int], tuple[str, str, int]]
_PARTS = '*'
_REST = '...'
_LAYER = 'layer'


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of theirs; see the module's docstring.

    Attributes:
        ours: the path of the parameter, or the paths of all that are parts of the tensor.
        theirs: the name of the tensor.
        axes: their dimensions -> ours.
        offset: theirs is ours plus this (norms that store 1 + scale where ours is the scale).
        rate: theirs is -exp(ours): the rate of a state that decays, where ours is its logarithm.
        beside, without: a parameter of ours; the row is passed over where the model lacks it, or has it: for tensors
            whose name depends on what else there is.
    """

    ours: str | tuple[str, ...]
    theirs: str
    axes: str = ''
    offset: float = 0.0
    rate: bool = False
    beside: str | None = None
    without: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """All of ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def per_layer(self) -> bool:
        """Whether every layer has such a tensor."""
        return f'{{{_LAYER}}}' in self.theirs

    @property
    def spread(self) -> tuple[str, ...]:
        """The axes of ours that their name counts, besides the layer."""
        return tuple(name for name in re.findall(r'\{(\w+)\}', self.theirs) if name != _LAYER)


@dataclasses.dataclass(frozen=True)
class Link:
    """One part of one tensor of theirs, and the piece of one of our arrays that it is.

    Attributes:
        path: of our array, 'layers/0/mixer/query'.
        index: of the piece, along the leading axes of our array.
        name: of their tensor.
        layout: how dimensions correspond.
        offset, rate: see Row.
    """

    path: str
    index: tuple[int, ...]
    name: str
    layout: 'Layout'
    offset: float
    rate: bool = False

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The piece in their tensor, with their numbers: a view of it wherever NumPy can make one."""
        return self.layout.view(tensor).reshape(self.layout.ours)

    def ours(self, piece: np.ndarray) -> np.ndarray:
        """Our numbers for some of what `read` gave.

        Raises:
            UserError: a rate is not negative.
        """
        if self.rate:
            if not (piece < 0).all():
                raise UserError(
                    f'{self.name} has rates that are not negative', fix='Get the file again: it is damaged.'
                )
            return np.log(-piece.astype(np.float64))
        return piece.astype(np.float32) - np.float32(self.offset) if self.offset else piece

    def write(self, tensor: np.ndarray, piece: np.ndarray) -> None:
        """Put the piece into their tensor, cast to its dtype."""
        view = self.layout.view(tensor)
        if self.rate:
            piece = -np.exp(piece.astype(np.float64))
        elif self.offset:
            piece = piece.astype(np.float32) + np.float32(self.offset)
        view[...] = piece.reshape(view.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a piece of ours lies in a tensor of theirs: cut, split dimensions, pick, permute, merge dimensions.

    Attributes:
        theirs, ours: shapes of their tensor and of our piece.
        cuts: for each dimension of theirs, where the part begins and ends.
        split: the shape after splitting dimensions.
        part: (axis, index) of the part, where parts lie side by side within a dimension.
        order: the permutation that follows.
    """

    theirs: Shape
    ours: Shape
    cuts: tuple[tuple[int, int], ...]
    split: Shape
    part: tuple[int, int] | None
    order: tuple[int, ...]

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """The piece, its dimensions not yet merged; a view of `tensor`."""
        x = tensor[tuple(slice(*cut) for cut in self.cuts)].reshape(self.split)
        if self.part is not None:
            axis, index = self.part
            x = x[(slice(None),) * axis + (index,)]
        return x.transpose(self.order)


def links(table: Sequence[Row], specs: Mapping[str, Any], num_layers: int, location: Location) -> list[Link]:
    """Every part of every tensor of theirs that a model of these parameters has, in the order of the table's layers.

    Args:
        specs: nested dict of ParameterSpec. location: DecoderConfig.location.

    Raises:
        ValueError: a parameter has no row or two, or a row has parameters that the model has only in part.
    """
    return stack_links(table, specs, {'': (num_layers, location)})


def stack_links(
    table: Sequence[Row], specs: Mapping[str, Any], stacks: Mapping[str, tuple[int, Location]]
) -> list[Link]:
    """The same for a model whose layers are in stacks.

    Args:
        stacks: by name ('encoder' for layers at encoder/layers/..., '' for those of a decoder), how many layers have
            parameters of their own, and where they are.
    """
    named = dict(named_specs(dict(specs)))
    found = [link for row in table if not row.per_layer for link in _row_links(row, named, '', '', (), None)]
    for name, (num_layers, location) in stacks.items():
        stack = f'{name}/' if name else ''
        rows = [row for row in table if row.per_layer and all(path.startswith(stack) for path in row.paths)]
        for layer in range(num_layers):
            group, position, repeat = location(layer)
            for row in rows:
                found += _row_links(row, named, stack, f'{stack}{group}/{position}/', (repeat,), layer)
    _check_cover(found, named)
    return found


def shapes(all_links: Iterable[Link]) -> dict[str, Shape]:
    """The shape of each tensor of theirs, by name, in order."""
    return {link.name: link.layout.theirs for link in all_links}


def _row_links(
    row: Row, named: dict[str, ParameterSpec], stack: str, prefix: str, index: tuple[int, ...], layer: int | None
) -> list[Link]:
    def whole(path: str) -> str:
        return prefix + path.removeprefix(stack)

    paths = [whole(path) for path in row.paths]
    present = [path in named for path in paths]
    if (
        not any(present)
        or (row.beside and whole(row.beside) not in named)
        or (row.without and whole(row.without) in named)
    ):
        return []
    if not all(present):
        raise ValueError(f'of {row.paths} the model has only some')
    ours = [named[path].shape[len(index) :] for path in paths]
    spread = tuple(ours[0][: len(row.spread)])
    layouts = _layouts(row.axes, row.spread, tuple(ours))
    found = []
    for counts in itertools.product(*map(range, spread)):
        values = dict(zip(row.spread, counts, strict=True)) | {_LAYER: layer}
        name = row.theirs.format(**values)
        for path, layout in zip(paths, layouts, strict=True):
            found.append(Link(path, index + counts, name, layout, row.offset, row.rate))
    return found


def _check_cover(found: list[Link], named: dict[str, ParameterSpec]) -> None:
    """Each element of each of our arrays must come from one place."""
    pieces: dict[str, list[tuple[int, ...]]] = {path: [] for path in named}
    for link in found:
        pieces[link.path].append(link.index)
    for path, indices in pieces.items():
        depth = len(indices[0]) if indices else 0
        expected = set(itertools.product(*map(range, named[path].shape[:depth])))
        if len(set(indices)) != len(indices) or set(indices) != expected:
            raise ValueError(f'the table has {len(indices)} rows for {path} instead of {len(expected)}')


@functools.cache
def _layouts(axes: str, spread: tuple[str, ...], ours: tuple[Shape, ...]) -> tuple[Layout, ...]:
    """How each part lies in the tensor, from the shapes of the whole parameters (of one layer)."""
    parts = [_part(axes, spread, shape) for shape in ours]
    sizes = [part.sizes | {_PARTS: len(ours)} for part in parts]
    left = parts[0].left
    concatenated = next((i for i, group in enumerate(left) if group[:1] == [_PARTS]), None)
    theirs: list[int] = []
    for dimension, group in enumerate(left):
        whole = [
            math.prod(each[axis] for axis in part.left[dimension] if axis != _PARTS)
            for part, each in zip(parts, sizes, strict=True)
        ]
        if dimension == concatenated:
            theirs.append(sum(whole))
            continue
        if len(set(whole)) > 1:
            raise ValueError(f'{axes!r}: the parts differ in dimension {dimension}: {whole}')
        theirs.append(whole[0] * (len(ours) if _PARTS in group else 1))

    layouts = []
    start = 0
    for number, (part, each) in enumerate(zip(parts, sizes, strict=True)):
        cuts = [(0, size) for size in theirs]
        if concatenated is not None:
            stop = start + math.prod(each[axis] for axis in part.left[concatenated][1:])
            cuts[concatenated], start = (start, stop), stop
        flat = [
            axis for i, group in enumerate(part.left) for axis in group if not (i == concatenated and axis == _PARTS)
        ]
        picked = (flat.index(_PARTS), number) if _PARTS in flat else None
        kept = [axis for axis in flat if axis != _PARTS]
        wanted = [axis for group in part.right for axis in group]
        extra = [axis for axis in kept if axis not in wanted]
        order = [kept.index(axis) for axis in wanted if axis in kept] + [kept.index(axis) for axis in extra]
        layouts.append(
            Layout(
                theirs=tuple(theirs),
                ours=ours[number][len(spread) :],
                cuts=tuple(cuts),
                split=tuple(each[axis] for axis in flat),
                part=picked,
                order=tuple(order),
            )
        )
    return tuple(layouts)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What the axes of a row mean for one of ours: groups of both sides, without `...`, and the sizes of axes."""

    left: list[list[str]]
    right: list[list[str]]
    sizes: dict[str, int]


def _part(axes: str, spread: tuple[str, ...], shape: Shape) -> _Part:
    if not axes:
        axes = '... -> ...'
    given = axes
    rank = len(shape) - len(_groups(axes.split('->')[-1].replace(_REST, '')))
    axes = axes.replace(_REST, ' '.join(f'rest{i}' for i in range(rank)))
    left, right = (_groups(side) for side in axes.split('->'))
    if [group[0] for group in right[: len(spread)]] != list(spread):
        raise ValueError(f'{given!r}: ours must begin with {spread}, which the name counts')
    right = right[len(spread) :]
    # A 1 may stand on one side alone: reshaping drops it, or makes it.
    both = [sorted(axis for group in side for axis in group if axis not in (_PARTS, '1')) for side in (left, right)]
    if both[0] != both[1] or len(set(both[0])) != len(both[0]):
        raise ValueError(f'{given!r}: both sides must have the same axes')
    return _Part(left, right, _sizes(axes, right, shape[len(spread) :]))


def _groups(side: str) -> list[list[str]]:
    """'(H K) D' -> [['H', 'K'], ['D']]."""
    return [group.strip('()').split() for group in re.findall(r'\([^)]*\)|[^\s()]+', side)]


def _sizes(axes: str, groups: list[list[str]], shape: Shape) -> dict[str, int]:
    """The size of each axis of ours; numbers name axes of their own size."""
    sizes = {axis: int(axis) for axis in re.findall(r'\d+', axes) if axis.isdecimal()}
    if len(groups) != len(shape):
        raise ValueError(f'{axes!r} is for {len(groups)} dimensions, ours has shape {shape}')
    for group, size in zip(groups, shape, strict=True):
        unknown = [axis for axis in group if axis not in sizes]
        known = math.prod(sizes[axis] for axis in group if axis in sizes)
        if len(unknown) > 1 or size % known or (not unknown and size != known):
            raise ValueError(f'{axes!r} does not fit our shape {shape}')
        if unknown:
            sizes[unknown[0]] = size // known
    return sizes
