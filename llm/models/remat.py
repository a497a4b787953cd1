"""Rematerialisation: what the backward pass computes again instead of keeping it."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from llm.errors import UserError

RematKind = Literal['none', 'full', 'dots', 'dots_no_batch', 'names', 'offload']

# What a layer reads: all that 'full' keeps of it.
LAYER_INPUT = 'layer_input'
# The activations that layers mark with checkpoint_name.
REMAT_NAMES = (
    LAYER_INPUT,
    *('query', 'key', 'value', 'attention'),
    *('recurrence_input', 'recurrence_gate', 'recurrence'),
    'feed_forward_hidden',
)
# The kinds that read remat_names.
_NAMING = ('names', 'offload')


def check_remat(kind: RematKind, names: tuple[str, ...], where: str) -> None:
    """Raises UserError for an unknown kind or name, or names with a kind that does not read them."""
    if kind not in get_args(RematKind):
        raise UserError(f'remat is {kind!r}', where=where, fix=f'Use one of {", ".join(get_args(RematKind))}.')
    if unknown := set(names) - set(REMAT_NAMES):
        raise UserError(f'remat_names has {sorted(unknown)}', where=where, fix=f'Use some of {", ".join(REMAT_NAMES)}.')
    if (kind in _NAMING) != bool(names):
        raise UserError(
            f'remat is {kind!r} and remat_names is {names}',
            where=where,
            fix="Give remat_names with remat = 'names' or 'offload', and only then.",
        )


def rematerialized(function: Callable, kind: RematKind, names: tuple[str, ...], *, in_scan: bool) -> Callable:
    """`function`, whose backward pass keeps what `kind` says and computes the rest again.

    Args:
        kind: 'none' keeps everything; 'full' only the arguments; 'dots' also matrix products; 'dots_no_batch' also
            matrix products without batch dimensions (projections, not attention scores); 'names' also `names`.
            'offload' keeps `names` in the memory of the host and, unless LAYER_INPUT is among them, the arguments on
            the device.
        in_scan: whether it is the body of a scan, where nothing needs to keep the compiler from merging the second
            computation with the first.
    """
    if kind == 'none':
        return function
    policies = jax.checkpoint_policies
    policy = {
        'full': policies.nothing_saveable,
        'dots': policies.dots_saveable,
        'dots_no_batch': policies.dots_with_no_batch_dims_saveable,
        'names': policies.save_only_these_names(*names),
        'offload': policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src='device',
            offload_dst='pinned_host',
        ),
    }[kind]

    # A new function each time: JAX keeps what it traced by function and shapes, and would not see that another mesh is
    # in force now.
    def traced_anew(*arguments: Any) -> Any:
        return function(*arguments)

    return jax.checkpoint(traced_anew, policy=policy, prevent_cse=not in_scan)
