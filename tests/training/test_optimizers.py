import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm.models.parameters import ParameterSpec, Role
from llm.training.optimizers import OptimizerConfig, make_optimizer
from llm.training.parametrization import learning_rate_multipliers, optimizer_families, weight_decay_multipliers
from llm.training.schedules import ScheduleConfig


def _specs(width):
    return {
        'embedding': ParameterSpec((10, width), ('vocab', 'embed'), Role.EMBEDDING, inputs=(0,), outputs=(1,)),
        'hidden': ParameterSpec(
            (3, width, 2, width), ('layers', 'embed', 'heads', 'head_dim'), Role.HIDDEN, inputs=(1,), outputs=(2, 3)
        ),
        'scale': ParameterSpec((width,), ('embed',), Role.VECTOR, outputs=(0,), constant=1.0),
        'head': ParameterSpec((width, 10), ('embed', 'vocab'), Role.OUTPUT, inputs=(0,), outputs=(1,)),
    }


CONSTANT = ScheduleConfig('constant')


def _arrays(specs, seed):
    generator = np.random.default_rng(seed)
    return {name: jnp.asarray(generator.normal(size=spec.shape)) for name, spec in specs.items()}


def _run(optimizer, params, steps=3):
    state = optimizer.init(params)
    for step in range(steps):
        gradients = jax.tree.map(lambda p, step=step: jnp.sin(p * (step + 1)), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_standard_adamw_equals_optax():
    with jax.enable_x64():
        specs = _specs(4)
        params = _arrays(specs, 0)
        config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, clip_norm=0.5, schedule=CONSTANT)
        mask = {'embedding': True, 'hidden': True, 'scale': False, 'head': True}
        theirs = optax.chain(
            optax.clip_by_global_norm(0.5), optax.adamw(0.1, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3, mask=mask)
        )
        ours = _run(make_optimizer(config, specs, specs, 10), params)
        for name, value in _run(theirs, params).items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-12, err_msg=name)


def _orthogonalized(momentum):
    """Keller Jordan's five Newton-Schulz steps on one matrix, in NumPy."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = momentum / np.linalg.norm(momentum)
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


def test_muon_updates_each_layer_as_one_matrix():
    with jax.enable_x64():
        specs = _specs(4)
        params = _arrays(specs, 0)
        config = OptimizerConfig(
            kind='muon', learning_rate=0.1, muon_learning_rate=0.02, weight_decay=0.3, clip_norm=None, schedule=CONSTANT
        )
        optimizer = make_optimizer(config, specs, specs, 10)
        gradients = jax.tree.map(jnp.sin, params)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        for layer in range(3):
            gradient = np.sin(params['hidden'][layer]).reshape(4, 8)
            # First step: the bias-corrected Nesterov momentum is parallel to the gradient.
            expected = _orthogonalized(gradient) * np.sqrt(8 / 4) + 0.3 * np.asarray(params['hidden'][layer]).reshape(
                4, 8
            )
            np.testing.assert_allclose(np.asarray(updates['hidden'][layer]).reshape(4, 8), -0.02 * expected, rtol=1e-5)
        np.testing.assert_allclose(updates['scale'], -0.1 * np.sign(gradients['scale']), rtol=1e-6)


@pytest.mark.parametrize(
    ('kind', 'expected'),
    [
        ('adamw', {'embedding': 1, 'hidden': 1 / 4, 'scale': 1, 'head': 1}),
        ('muon', {'embedding': 1, 'hidden': np.sqrt(2), 'scale': 1, 'head': 1}),
        ('sgd', {'embedding': 4, 'hidden': 1, 'scale': 4, 'head': 4}),
    ],
)
def test_learning_rates_of_tensor_programs_v_table_8(kind, expected):
    specs, base = _specs(16), _specs(4)
    assert learning_rate_multipliers(specs, base, optimizer_families(specs, kind)) == expected


def test_decay_spares_vectors_and_does_not_depend_on_width():
    assert weight_decay_multipliers(_specs(4)) == {'embedding': 1, 'hidden': 1, 'scale': 0, 'head': 1}
    params = {name: jnp.ones(spec.shape) for name, spec in _specs(16).items()}
    zero = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule=CONSTANT)
    optimizer = make_optimizer(config, _specs(16), _specs(4), 10)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates['hidden'], -0.05, rtol=1e-6)
    np.testing.assert_allclose(updates['scale'], 0.0)


def test_the_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OptimizerConfig().learning_rate = 1.0
