"""AdamW, Muon and SGD as optax chains whose per-parameter factors come from the spec table."""

import dataclasses
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from optax import contrib

from llm.errors import UserError
from llm.training.parametrization import learning_rate_multipliers, optimizer_families, weight_decay_multipliers
from llm.training.schedules import ScheduleConfig, make_schedule


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates.

    Attributes:
        kind: `adamw` (Loshchilov and Hutter 2019), `muon` (Jordan et al. 2024; hidden matrices by Muon, the rest by
            AdamW) or `sgd` with momentum.
        learning_rate: peak, for Adam's and SGD's parameters, at the base width.
        muon_learning_rate: peak for Muon's parameters; read when kind is `muon`.
        beta1, beta2, epsilon: Adam's.
        momentum: Muon's and SGD's.
        weight_decay: fraction removed per step is learning_rate * weight_decay, of matrices and embeddings only.
        clip_norm: largest global gradient norm; None does not clip.
        schedule: shared by all learning rates.
    """

    kind: Literal['adamw', 'muon', 'sgd'] = 'adamw'
    learning_rate: float = 3e-4
    muon_learning_rate: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.muon_learning_rate <= 0:
            raise UserError('a learning rate is not positive', where='OptimizerConfig', fix='Use a value above 0.')
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError('clip_norm is not positive', where='OptimizerConfig', fix='Use None to not clip.')


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate of Adam's and SGD's parameters by step, as reported in the metrics."""
    return make_schedule(config.schedule, config.learning_rate, total_steps)


def _scale_each(factors: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))


def _decay_each(factors: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u, f, p: u + f * p, updates, factors, params))


def optimized(specs: Any, gradients: Any) -> Any:
    """The gradients with zeros for parameters that no optimizer moves; see ParameterSpec.sign_rate."""
    return jax.tree.map(lambda s, g: g if s.sign_rate is None else jnp.zeros_like(g), specs, gradients)


def _with_signs(specs: Any, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule`, which does not see the parameters that have a sign_rate, and their own rule."""
    if all(spec.sign_rate is None for spec in jax.tree.leaves(specs)):
        return rule

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = rule.update(optimized(specs, gradients), state, params)
        signed = jax.tree.map(
            lambda s, g, u: u if s.sign_rate is None else -s.sign_rate * jnp.sign(g), specs, gradients, updates
        )
        return signed, state

    return optax.GradientTransformation(rule.init, update)


def make_optimizer(
    config: OptimizerConfig, specs: Any, base_specs: Any, total_steps: int
) -> optax.GradientTransformation:
    """The optax transformation for parameters with these specs.

    Parameters with a sign_rate move by that alone. For the others, in order: clip, update rule, per-parameter factor,
    decoupled decay, schedule. Muon sees fan-in and fan-out as the spec gives them; layers and experts are batch.

    Args:
        specs, base_specs: nested dict of ParameterSpec of the model, and of the model at its muP base width (the same
            table under standard parametrization).
        total_steps: length of the run, for the schedule.
    """
    families = optimizer_families(specs, config.kind)
    group = jax.tree.map(
        lambda family: config.muon_learning_rate / config.learning_rate if family == 'muon' else 1.0, families
    )
    rates = jax.tree.map(operator.mul, group, learning_rate_multipliers(specs, base_specs, families))
    decays = jax.tree.map(
        lambda ratio, mask: config.weight_decay * ratio * mask, group, weight_decay_multipliers(specs)
    )

    def dimensions(updates: Any) -> Any:
        return jax.tree.map(
            lambda spec, update: (
                update
                if isinstance(update, optax.MaskedNode)
                else contrib.MuonDimensionNumbers(reduction_axis=spec.inputs, output_axis=spec.outputs)
            ),
            specs,
            updates,
        )

    rules = {
        'adam': optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        'muon': contrib.scale_by_muon(beta=config.momentum, weight_dimension_numbers=dimensions),
        'sgd': optax.trace(config.momentum),
    }
    used = set(jax.tree.leaves(families))
    if len(used) == 1:
        rule = rules[used.pop()]
    else:
        rule = optax.partition({name: rules[name] for name in sorted(used)}, families)
    return _with_signs(
        specs,
        optax.chain(
            optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
            rule,
            _scale_each(rates),
            _decay_each(decays),
            optax.scale_by_learning_rate(learning_rate_schedule(config, total_steps)),
        ),
    )


def place_optimizer_state(
    optimizer: optax.GradientTransformation, state: Any, parameter_shardings: Any, replicated: NamedSharding
) -> Any:
    """The optimizer's state as ShapeDtypeStructs that live where the parameters they belong to live.

    Args:
        state: arrays or ShapeDtypeStructs, as from jax.eval_shape(optimizer.init, parameters).
        parameter_shardings: nested dict of NamedSharding; replicated: of what belongs to no parameter, like counts.
    """

    def place(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, optax.MaskedNode):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return optax.tree.map_params(
        optimizer,
        place,
        state,
        parameter_shardings,
        transform_non_params=lambda leaf: place(leaf, replicated),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
