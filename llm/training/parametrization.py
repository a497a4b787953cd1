"""muP's learning rates and weight decay, read from parameter specs.

Maximal update parametrization (Yang et al. 2022, "Tensor Programs V", table 8): with initial scales and multipliers
chosen by role (`llm.models.initialization`) and learning rates scaled as here, the best learning rate of a narrow
model is the best one of a wide model.
"""

import math
from typing import Any, Literal

import jax

from llm.models.parameters import ParameterSpec, Role

Family = Literal['adam', 'muon', 'sgd']


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
