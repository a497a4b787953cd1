"""The parts of a backward pass, one after the other, are the backward pass; and each has only its own products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.parallel.pipeline.costs import product_flops, repeat_costs
from llm.parallel.pipeline.schedules import Operation
from llm.parallel.pipeline.split import split_backward

D, F = 8, 24


@jax.checkpoint
def _norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5) * scale


def _plain(parameters, x, context):
    """A norm, einsums (which are jitted: calls within calls), a product of activations, a mask, and an unused one."""
    mask, angle = context
    normed = _norm(x, parameters['scale']) * jnp.cos(angle)
    scores = jnp.einsum('BSD,BTD->BST', jnp.einsum('BSD,DE->BSE', normed, parameters['query']), normed)
    mixed = jnp.einsum('BST,BTD->BSD', jax.nn.softmax(jnp.where(mask, scores, -1e9)), normed)
    hidden = jax.nn.silu(jnp.einsum('BSD,DF->BSF', mixed, parameters['up']) + parameters['bias'])
    return x + jnp.einsum('BSF,FD->BSD', hidden, parameters['down'])


def _layer(parameters, x, context):
    """What goes on, no losses and no sums."""
    return _plain(parameters, x, context), {}, {}


def _arguments():
    keys = jax.random.split(jax.random.key(0), 8)
    shapes = {'scale': (D,), 'query': (D, D), 'up': (D, F), 'bias': (F,), 'down': (F, D), 'unused': (3,)}
    parameters = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=False)}
    x, dy = jax.random.normal(keys[6], (2, 5, D)), jax.random.normal(keys[7], (2, 5, D))
    return parameters, x, (jnp.tril(jnp.ones((5, 5), bool)), jnp.linspace(0, 1, D)), dy


def _dots(function):
    return jax.checkpoint(function, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)


# What is computed again: nothing, everything, all but products of activations with parameters.
REMATS = {'none': None, 'full': jax.checkpoint, 'dots': _dots}


@pytest.mark.parametrize('remat', REMATS.values(), ids=REMATS)
@pytest.mark.parametrize('in_one', [False, True], ids=['from residuals', 'from what is kept'])
def test_parts_give_the_gradient(in_one, remat):
    with jax.enable_x64():
        parameters, x, context, dy = _arguments()
        expected_y, vjp = jax.vjp(lambda parameters, x: _plain(parameters, x, context), parameters, x)
        expected, expected_dx = vjp(dy)
        split = split_backward(_layer, parameters, x, context, remat)
        y, _, kept = jax.jit(split.forward)(parameters, x, context)
        assert [(k.shape, k.dtype) for k in kept] == [(k.shape, k.dtype) for k in split.kept]
        np.testing.assert_array_equal(kept[0], x)
        np.testing.assert_allclose(y, expected_y, rtol=1e-12)
        whole = jax.jit(split.whole)(parameters, kept, context, dy)
        if in_one:
            dx, operands = jax.jit(split.recompute_input_gradient)(parameters, kept, context, dy)
        else:
            residuals = jax.jit(split.recompute)(parameters, kept, context)
            assert [(r.shape, r.dtype) for r in residuals] == [(r.shape, r.dtype) for r in split.residuals]
            dx, operands = jax.jit(split.input_gradient)(parameters, residuals, context, dy)
        assert [(o.shape, o.dtype) for o in operands] == [(o.shape, o.dtype) for o in split.operands]
        gradients = jax.jit(split.weight_gradient)(parameters, operands, context)
        for found, found_dx in (whole, (gradients, dx)):
            np.testing.assert_allclose(found_dx, expected_dx, rtol=1e-12)
            jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-14), found, expected)


@pytest.mark.parametrize('remat', REMATS.values(), ids=REMATS)
def test_losses_and_further_results_of_the_layer_add_to_the_gradient(remat):
    def layer(parameters, x, context):
        y = _plain(parameters, x, context)
        return (y, x), {'loss': jnp.sum(jnp.sin(y) * x), 'other': jnp.sum(x**2)}, {'count': jnp.sum(y, (0, 1))}

    with jax.enable_x64():
        parameters, x, context, dy = _arguments()

        def total(parameters, x):
            (y, beside), losses, _ = layer(parameters, x, context)
            return jnp.sum(y * dy) + jnp.sum(beside * jnp.cos(dy)) + losses['loss'] + losses['other']

        expected, expected_dx = jax.grad(total, (0, 1))(parameters, x)
        split = split_backward(layer, parameters, x, context, remat)
        (y, beside), sums, kept = split.forward(parameters, x, context)
        np.testing.assert_array_equal(beside, x)
        np.testing.assert_allclose(sums['count'], y.sum((0, 1)), rtol=1e-12)
        both = dy, jnp.cos(dy)
        dx, operands = split.recompute_input_gradient(parameters, kept, context, both)
        gradients = split.weight_gradient(parameters, operands, context)
        for found, found_dx in (split.whole(parameters, kept, context, both), (gradients, dx)):
            np.testing.assert_allclose(found_dx, expected_dx, rtol=1e-12)
            jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-14), found, expected)


@pytest.mark.parametrize('remat', REMATS.values(), ids=REMATS)
def test_nothing_that_parameters_alone_determine_is_kept(remat):
    parameters, x, context, _ = _arguments()
    split = split_backward(_layer, parameters, x, context, remat)
    weights = {(D, D), (D, F), (F, D)}
    assert not weights & {struct.shape for struct in [*split.kept, *split.residuals, *split.operands]}


def test_policies_say_what_the_forward_pass_keeps():
    parameters, x, context, _ = _arguments()
    shapes = {
        name: [struct.shape for struct in split_backward(_layer, parameters, x, context, remat).kept]
        for name, remat in REMATS.items()
    }
    rows = (2, 5, D)
    assert shapes['full'] == [rows]
    # The queries, and what comes before the bias; the last product's result is not needed.
    assert shapes['dots'] == [rows, rows, (2, 5, F)]
    assert {(2, 5, 5), (2, 5, F)} < set(shapes['none'])  # probabilities, and what is inside of silu


@pytest.mark.parametrize('remat', REMATS)
def test_every_product_is_in_one_part(remat):
    parameters, x, context, _ = _arguments()
    tokens = 2 * 5
    weights = 2 * tokens * (D * D + 2 * D * F)
    attention = 2 * tokens * 5 * D
    costs = repeat_costs(_layer, parameters, x, context, REMATS[remat])
    assert costs.forward == weights + 2 * attention
    # Nobody needs the last product's result. Without remat nothing is computed again, with dots what attention does.
    again = {'none': 0, 'full': weights + 2 * attention - 2 * tokens * D * F, 'dots': 2 * attention}
    assert costs.recompute == again[remat]
    assert costs.input_gradient == weights + 4 * attention
    assert costs.weight_gradient == weights


def test_costs_are_those_of_the_compiled_program():
    """XLA counts elementwise operations too, one each; products are nearly everything once layers are wide."""

    def layer(parameters, x, context):
        hidden = jax.nn.relu(jnp.einsum('BSD,DF->BSF', x, parameters[0]))
        return x + jnp.einsum('BSF,FD->BSD', hidden, parameters[1]), {}, {}

    parameters = jnp.zeros((256, 1024)), jnp.zeros((1024, 256))
    x = jnp.zeros((2, 128, 256))
    split = split_backward(layer, parameters, x, (), jax.checkpoint)
    costs = repeat_costs(layer, parameters, x, (), jax.checkpoint)
    operands = [jnp.zeros(s.shape, s.dtype) for s in split.operands]
    for part, arguments, expected in (
        (layer, (parameters, x, ()), costs.forward),
        (split.whole, (parameters, [x], (), x), costs.of(Operation.BACKWARD)),
        (split.recompute, (parameters, [x], ()), costs.recompute),
        (split.recompute_input_gradient, (parameters, [x], (), x), costs.of(Operation.RECOMPUTE_INPUT_GRADIENT)),
        (split.weight_gradient, (parameters, operands, ()), costs.weight_gradient),
    ):
        compiled = jax.jit(part).lower(*arguments).compile().cost_analysis()['flops']
        assert expected == pytest.approx(compiled, rel=0.02)


def test_loops_are_multiplied_out():
    def loop(w, x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    assert product_flops(loop, jnp.zeros((4, 4)), jnp.zeros((3, 4))) == 7 * 2 * 3 * 4 * 4
