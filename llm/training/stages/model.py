"""A model as a pipeline runs it: the functions of its parts, and which of its parameters belong to which part."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llm.errors import UserError
from llm.models.parameters import ParameterSpec
from llm.models.remat import RematKind, rematerialized
from llm.parallel.pipeline.stages import Remat, Stages
from llm.training.layout import token_order

_REMATS: tuple[RematKind, ...] = ('none', 'full', 'dots', 'dots_no_batch', 'names')


@dataclasses.dataclass(frozen=True)
class StagedModel:
    """What `make_pipeline` needs of a model.

    Attributes:
        stages: the functions.
        repeats: of the layers that stages share.
        parts: a tree like the parameters, of arrays or ParameterSpecs -> {'layers': what a repeat needs, with a leading
            axis of repeats; 'leading', 'remainder': what the functions of these names need, {} for no such layers;
            'ends': the rest}. A parameter may be in several parts. Linear in arrays: its transpose takes gradients
            of the parts to those of the parameters.
        routing: sums of routers, {'leading', 'layers', 'remainder'} as far as there are some -> as one device has them.
    """

    stages: Stages
    repeats: int
    parts: Callable[[Any], dict[str, Any]]
    routing: Callable[[dict[str, Any]], dict[str, Any]]


def remat_of(kind: RematKind, names: tuple[str, ...], where: str) -> Remat:
    """What `Stages.remat` is for layers with these settings, which here are of a whole repeat.

    Raises:
        UserError: what is kept cannot be kept from tick to tick.
    """
    if kind not in _REMATS:
        raise UserError(
            f"remat {kind!r} is not possible in a pipeline, which keeps everything in its stages' own memory",
            where=where,
            fix=f'Use one of {", ".join(_REMATS)}, or MeshConfig.pipeline = 1.',
        )
    return None if kind == 'none' else functools.partial(rematerialized, kind=kind, names=names, in_scan=False)


def token_index_of(x: jax.Array) -> jax.Array | None:
    """Index in the row of each token of [B, S], where they do not lie in order."""
    order = token_order(x.shape[1])
    return None if order is None else jnp.asarray(order)


def completed(unused: Any, given: Any) -> Any:
    """A tree of parameters, of which only some are given: those, among what stands for the others."""
    return {
        name: completed(value, given[name]) if isinstance(value, dict) and name in given else given.get(name, value)
        for name, value in unused.items()
    }


def for_each_repeat(tree: Any, repeats: int, axis: str | None) -> Any:
    """Parameters that all repeats have in common, once for each: arrays or ParameterSpecs.

    Args:
        axis: logical axis of the repeats; None where there is a leading axis already, of size 1.
    """

    def one(x: Any) -> Any:
        if isinstance(x, ParameterSpec):
            return dataclasses.replace(x, shape=(repeats, *x.shape[1:])) if axis is None else x.stacked(repeats, axis)
        return jnp.broadcast_to(x, (repeats, *(x.shape[1:] if axis is None else x.shape)))

    return jax.tree.map(one, tree)
