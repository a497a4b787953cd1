"""muP's learning rates and weight decay, read from parameter specs.

Maximal update parametrization (Yang et al. 2022, "Tensor Programs V", table 8): with initial scales and multipliers
chosen by role (`llm.models.initialization`) and learning rates scaled as here, the best learning rate of a narrow
model is the best one of a wide model.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from llm.models.parameters import ParameterSpec, Role

Family = Literal['adam', 'muon', 'sgd']
# Of stacked layers, in the order in which they run; see llm.models.decoder.
_GROUPS = ('leading', 'layers', 'remainder')


def optimizer_families(specs: Any, kind: Literal['adamw', 'muon', 'sgd']) -> Any:
    """Which update rule each parameter gets: Muon is for hidden matrices, the rest of a Muon run uses Adam.

    Jordan et al. 2024, "Muon": embeddings, the output head and vectors are not matrices between hidden spaces.
    """

    def family(spec: ParameterSpec) -> Family:
        if kind == 'sgd':
            return 'sgd'
        return 'muon' if kind == 'muon' and spec.role is Role.HIDDEN else 'adam'

    return jax.tree.map(family, specs)


def learning_rate_multipliers(specs: Any, base_specs: Any, families: Any) -> Any:
    """Factor on each parameter's learning rate; 1 for every Adam and SGD parameter of the base model.

    Adam (table 8): hidden 1 / (width ratio of fan-in); others 1. SGD: hidden 1; vectors and embeddings times the
    ratio of fan-out; output times the ratio of fan-in. Routers, whose scale is in the weights and not in a multiplier
    behind them: 1 / (width ratio of fan-in) for both. Muon: an orthogonal update times
    sqrt(max(1, fan_out / fan_in)) is maximal at every width (Jordan et al. 2024; Bernstein and Newhouse 2024).

    Args:
        specs, base_specs: ParameterSpec tables of the model and of the same model at its base width.
        families: tree of the same structure, as from `optimizer_families`.
    """

    def multiplier(spec: ParameterSpec, base: ParameterSpec, family: Family) -> float:
        fan_in, fan_out = spec.fan_in / base.fan_in, spec.fan_out / base.fan_out
        match family, spec.role:
            case 'muon', _:
                return math.sqrt(max(1.0, spec.fan_out / spec.fan_in))
            case ('adam', Role.HIDDEN) | (_, Role.ROUTER):
                return 1 / fan_in
            case 'sgd', Role.OUTPUT:
                return fan_in
            case 'sgd', Role.EMBEDDING | Role.VECTOR:
                return fan_out
        return 1.0

    return jax.tree.map(multiplier, specs, base_specs, families)


def weight_decay_multipliers(specs: Any) -> Any:
    """1 for matrices and embeddings, 0 for vectors.

    Decay is applied with the schedule's learning rate without muP's factor, so that what a step shrinks a weight by
    does not depend on width (Wang and Aitchison 2024, "How to set AdamW's weight decay").
    """
    return jax.tree.map(lambda spec: 0.0 if spec.role is Role.VECTOR else 1.0, specs)


def by_depth(specs: Any, factor: Callable[[int, int], float]) -> Any:
    """What `factor` says of each parameter's depth; an array along the leading axis for the stacks of layers.

    Embeddings and what else is below the layers are at depth 0, layer i at i + 1, the rest at L + 1. An
    encoder-decoder's layers are counted from the encoder's first; what follows the encoder's last is where the
    decoder's first is.

    Args:
        specs: nested dict of ParameterSpec of a whole model.
        factor: (depth, L + 1) -> factor.
    """
    encoded = _num_layers(specs.get('encoder') or {})
    last = encoded + _num_layers(specs.get('decoder') or {}) + _num_layers(specs) + 1
    starts = {'encoder': 0, 'decoder': encoded}

    def of(depth: int) -> float:
        return factor(depth, last)

    rest = {name: part for name, part in specs.items() if name not in starts}
    found = _by_depth(rest, of, 0, above=last)
    for name in specs.keys() & starts.keys():
        found[name] = _by_depth(specs[name], of, starts[name], above=starts[name] + _num_layers(specs[name]) + 1)
    return {name: found[name] for name in specs}


def _by_depth(specs: Any, factor: Callable[[int], float], before: int, above: int) -> Any:
    """`by_depth` of one stack, with `before` layers below it, and of what lies beside it, which is at `above`."""
    groups = {group: specs[group] for group in _GROUPS if specs.get(group)}
    first = {}
    for group, positions in groups.items():
        first[group] = before
        before += _repeats(positions) * len(positions)

    def of_position(group: str, position: str, spec: ParameterSpec) -> Any:
        layers = first[group] + int(position) + np.arange(_repeats(groups[group])) * len(groups[group])
        factors = np.array([factor(int(layer) + 1) for layer in layers], np.float32)
        # One number keeps a step without discriminative rates the program that it is.
        same = bool((factors == factors[0]).all())
        return float(factors[0]) if same else factors.reshape(-1, *(1,) * (len(spec.shape) - 1))

    found = {}
    for name, part in specs.items():
        if name in groups:
            found[name] = {
                position: jax.tree.map(functools.partial(of_position, name, position), layer)
                for position, layer in part.items()
            }
        else:
            found[name] = jax.tree.map(
                lambda spec: factor(0 if spec.role is Role.EMBEDDING or spec.below else above), part
            )
    return found


def _num_layers(specs: Any) -> int:
    """Of the groups of a stack: those that share parameters count once."""
    return sum(_repeats(specs[group]) * len(specs[group]) for group in _GROUPS if specs.get(group))


def _repeats(positions: Any) -> int:
    return jax.tree.leaves(positions)[0].shape[0]


def layer_rates(specs: Any, decay: float, frozen_layers: int) -> Any:
    """Factor on the learning rate by depth: decay ** (how far from the top), 0 for what is frozen.

    Howard and Ruder 2018, "Universal Language Model Fine-tuning", section 3.2: discriminative rates. With
    `frozen_layers` above 0, the embeddings and that many first layers stay as they are.
    """

    def factor(depth: int, last: int) -> float:
        return 0.0 if frozen_layers > 0 and depth <= frozen_layers else decay ** (last - depth)

    return by_depth(specs, factor)


def trained(tree: Any, specs: Any) -> Any:
    """The part of a tree like the parameters that training changes: entries of trainable parameters alone."""
    found = {}
    for name, spec in specs.items():
        if isinstance(spec, dict):
            if part := trained(tree[name], spec):
                found[name] = part
        elif spec.trainable:
            found[name] = tree[name]
    return found


def with_trained(tree: Any, part: Any) -> Any:
    """`tree` with the entries of `part`, which is from `trained`, in their places."""
    if not isinstance(tree, dict):
        return part
    return {name: with_trained(each, part[name]) if name in part else each for name, each in tree.items()}
