"""The parts of a layer one by one: normalisation, feed-forward, attention's options, parallel and post-norm blocks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.context import Context
from llm.models.dropout import Purpose, dropout
from llm.models.feed_forward import FeedForward, FeedForwardConfig
from llm.models.layer import Layer, LayerConfig
from llm.models.normalization import Norm, NormConfig
from llm.models.parameters import parameter_specs
from llm.models.position import RotaryScaling
from tests.models.small_decoders import LAYER, layer

X = np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32) * 3 + 1


def filled(module: nnx.Module, seed: int = 1):
    """The module with random values for its parameters."""
    generator = np.random.default_rng(seed)
    graph, _ = nnx.split(module)
    draw = lambda spec: jnp.asarray(generator.standard_normal(spec.shape), jnp.float32)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(draw, parameter_specs(module)))


def test_rms_norm():
    norm = filled(Norm(NormConfig('rms', 1e-3), 16))
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-3) * np.asarray(norm.scale[...])
    np.testing.assert_allclose(norm(jnp.asarray(X)), expected, rtol=1e-5, atol=1e-5)


def test_layer_norm_with_unit_offset():
    norm = filled(Norm(NormConfig('layer', 1e-3, bias=True, unit_offset=True), 16))
    expected = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-3)
    expected = expected * (1 + np.asarray(norm.scale[...])) + np.asarray(norm.bias[...])
    np.testing.assert_allclose(norm(jnp.asarray(X)), expected, rtol=1e-5, atol=1e-5)


def test_statistics_of_half_precision_are_taken_in_float32():
    norm = filled(Norm(NormConfig('rms'), 16))
    x = jnp.asarray(X * 1e3, jnp.float16)  # squares overflow float16
    y = norm(x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y.astype(jnp.float32), norm(x.astype(jnp.float32)), rtol=2e-3)


ERF = np.vectorize(math.erf)
FORMULAS = {
    'swiglu': lambda up, gate: gate / (1 + np.exp(-gate)) * up,
    'geglu': lambda up, gate: 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up,
    'gelu': lambda up, gate: 0.5 * up * (1 + ERF(up / np.sqrt(2))),
    'gelu_tanh': lambda up, gate: 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))),
    'relu': lambda up, gate: np.maximum(up, 0),
    'relu_squared': lambda up, gate: np.maximum(up, 0) ** 2,
}


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('activation', FORMULAS)
def test_feed_forward(activation, bias):
    module = filled(FeedForward(FeedForwardConfig(24, activation, bias), 16))

    def project(x, name):
        if getattr(module, name) is None:
            return None
        offset = getattr(module, f'{name}_bias')
        return x @ np.asarray(getattr(module, name)[...]) + (0 if offset is None else np.asarray(offset[...]))

    hidden = FORMULAS[activation](project(X, 'up'), project(X, 'gate'))
    expected = project(hidden, 'down')
    difference = np.abs(np.asarray(module(jnp.asarray(X))) - expected).max()
    assert difference <= 1e-5 * np.abs(expected).max()
    assert FeedForwardConfig(24, activation).gated == (activation in ('swiglu', 'geglu'))


def branches(config: LayerConfig):
    """A layer with random parameters and its parts as functions of x."""
    module = filled(Layer(config, 16, 'none'))
    context = Context()
    return module, lambda x: module.mixer(x, context)[0], context


def assert_close(left, right):
    assert float(jnp.abs(left - right).max()) <= 1e-5 * float(jnp.abs(right).max())


def test_pre_norm_layer():
    module, mixer, context = branches(LAYER)
    h = X + mixer(module.mixer_norm(jnp.asarray(X)))
    assert_close(module(jnp.asarray(X), context)[0], h + module.feed_forward(module.feed_forward_norm(h)))


def test_post_norm_layer():
    module, mixer, context = branches(layer(norm_position='post'))
    h = module.mixer_norm(X + mixer(jnp.asarray(X)))
    assert_close(module(jnp.asarray(X), context)[0], module.feed_forward_norm(h + module.feed_forward(h)))


def test_sandwich_layer():
    module, mixer, context = branches(layer(norm_position='sandwich'))
    h = X + module.mixer_output_norm(mixer(module.mixer_norm(jnp.asarray(X))))
    y = module.feed_forward_output_norm(module.feed_forward(module.feed_forward_norm(h)))
    assert_close(module(jnp.asarray(X), context)[0], h + y)


@pytest.mark.parametrize('shared', [True, False])
def test_parallel_layer(shared):
    module, mixer, context = branches(layer(parallel=True, shared_norm=shared))
    assert (module.feed_forward_norm is None) == shared
    second = module.mixer_norm if shared else module.feed_forward_norm
    x = jnp.asarray(X)
    assert_close(module(x, context)[0], x + mixer(module.mixer_norm(x)) + module.feed_forward(second(x)))


def test_layer_without_feed_forward_and_without_norm():
    module, mixer, context = branches(dataclasses.replace(LAYER, feed_forward=None, norm=None))
    assert_close(module(jnp.asarray(X), context)[0], X + mixer(jnp.asarray(X)))


def test_score_scale():
    assert LAYER.mixer.score_scale == pytest.approx(8**-0.5)
    assert dataclasses.replace(LAYER.mixer, scale=0.3).score_scale == 0.3
    # muP: as usual at the base's head size, and falling as 1 / K from there.
    assert dataclasses.replace(LAYER.mixer, base_head_dim=8).score_scale == pytest.approx(8**-0.5)
    assert dataclasses.replace(LAYER.mixer, base_head_dim=8, head_dim=32).score_scale == pytest.approx(8**-0.5 / 4)


def test_dropout_keeps_the_mean_and_the_type():
    x = jnp.ones((2, 100, 200), jnp.bfloat16)
    y = dropout(x, 0.2, jax.random.key(0), Purpose.MIXER)
    assert y.dtype == jnp.bfloat16
    assert set(np.unique(y.astype(jnp.float32))) == {0.0, 1.25}
    assert float(y.astype(jnp.float32).mean()) == pytest.approx(1, abs=0.02)
    assert (dropout(x, 0.2, jax.random.key(0), Purpose.FEED_FORWARD) != y).any()
    assert dropout(x, 0.2, None, Purpose.MIXER) is x


def test_dropout_of_a_token_depends_on_its_index_and_not_on_where_it_lies():
    x = jnp.ones((2, 8, 50))
    order = np.array([0, 1, 6, 7, 2, 3, 4, 5])
    in_order = dropout(x, 0.5, jax.random.key(0), Purpose.MIXER)
    np.testing.assert_array_equal(dropout(x, 0.5, jax.random.key(0), Purpose.MIXER, order), in_order[:, order])
    flat = np.asarray(in_order).reshape(16, 50)
    assert len({row.tobytes() for row in flat}) == 16


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (lambda: AttentionConfig(4, 3, 8), 'num_heads 4 is not divisible by num_kv_heads 3'),
        (lambda: AttentionConfig(0, 1, 8), 'num_heads is 0'),
        (lambda: AttentionConfig(4, 2, 8, window=0), 'window is 0'),
        (lambda: AttentionConfig(4, 2, 7), 'rotary_fraction 1.0 of head_dim 7'),
        (lambda: AttentionConfig(4, 2, 8, rotary_fraction=1.5), 'rotary_fraction 1.5'),
        (lambda: AttentionConfig(4, 2, 8, qk_norm_scope='row'), "qk_norm_scope is 'row'"),
        (
            lambda: AttentionConfig(
                4, 2, 8, rotary_scaling=RotaryScaling('longrope', 2.0, 8, short_factors=(1.0,), long_factors=(1.0,))
            ),
            'Give 4 of each',
        ),
        (lambda: AttentionConfig(4, 2, 8, logit_soft_cap=0.0), 'logit_soft_cap is 0.0'),
        (lambda: AttentionConfig(4, 2, 8, scale=1.0, base_head_dim=8), 'scale and base_head_dim'),
        (lambda: FeedForwardConfig(0), 'd_ff is 0'),
        (lambda: FeedForwardConfig(8, 'silu'), "activation 'silu' does not exist"),
        (lambda: NormConfig(epsilon=0.0), 'epsilon is 0.0'),
        (lambda: NormConfig('batch'), "kind is 'batch'"),
        (lambda: layer(dropout=1.0), 'dropout is 1.0'),
        (lambda: layer(norm_position='middle'), "norm_position 'middle' does not exist"),
        (lambda: layer(parallel=True, norm_position='post'), 'a parallel layer has norm_position'),
    ],
)
def test_impossible_configs_are_refused(config, message):
    with pytest.raises(UserError) as error:
        config()
    assert message in str(error.value)
