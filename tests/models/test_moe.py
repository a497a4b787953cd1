"""The layer of experts against every expert on every token, and its drops against a plain loop."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import UserError
from llm.models.context import Context
from llm.models.feed_forward import FeedForwardConfig
from llm.models.moe import MoeConfig
from llm.models.parameters import parameter_specs
from llm.models.routing import Capacity, RouterConfig, _within_capacity, balanced_table, hashed
from tests.models.small_decoders import compiled
from tests.models.small_moe import MOE, dense, moe

X = np.random.default_rng(1).standard_normal((3, 8, 16))


def built(config: MoeConfig, seed: int = 0):
    """(graph, parameters) in float64."""
    module = config.build(16)
    generator = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.asarray(0.5 * generator.standard_normal(s.shape)), parameter_specs(module))
    return nnx.split(module)[0], params


def weights_of(config: MoeConfig, router, x):
    """[B, S, E] by NumPy."""
    logits = np.asarray(x) @ np.asarray(router['kernel'])
    if config.router.score == 'softmax':
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    ranked = scores + (np.asarray(router['bias']) if 'bias' in router else 0)
    if config.router.expert_groups > 1:
        groups = ranked.reshape(*ranked.shape[:2], config.router.expert_groups, -1)
        top = np.sort(groups, -1)[..., ::-1][..., : 1 if config.router.group_score == 'max' else 2].sum(-1)
        worst = np.sort(top, -1)[..., ::-1][..., config.router.groups_per_token - 1, None]
        ranked = np.where((top >= worst)[..., None], groups, -np.inf).reshape(ranked.shape)
    least = np.sort(ranked, -1)[..., ::-1][..., config.experts_per_token - 1, None]
    weights = np.where(ranked >= least, scores, 0)
    if config.router.normalize:
        weights = weights / weights.sum(-1, keepdims=True)
    return weights * config.router.scaling


ROUTERS = {
    'mixtral': moe(),
    'not normalized': moe({'normalize': False, 'scaling': 2.5}),
    'sigmoid': moe({'score': 'sigmoid', 'bias_rate': 0.1, 'scaling': 1.5}, num_experts=6, experts_per_token=3),
    'groups': moe({'expert_groups': 4, 'groups_per_token': 2}, num_experts=8),
    'groups of two': moe(
        {'expert_groups': 4, 'groups_per_token': 2, 'group_score': 'top_two', 'score': 'sigmoid'}, num_experts=8
    ),
    'shared': moe(shared=FeedForwardConfig(12), shared_gate=True, expert=FeedForwardConfig(24, 'relu')),
    'one': moe(num_experts=1, experts_per_token=1),
}


@pytest.mark.parametrize('config', ROUTERS.values(), ids=ROUTERS)
def test_layer_and_gradient_equal_every_expert_on_every_token(config):
    with jax.enable_x64():
        graph, params = built(config)
        x, context = jnp.asarray(X), Context()

        def ours(params, x):
            y = nnx.merge(graph, params)(x, context)[0]
            return jnp.sum(jnp.sin(y)), y

        def plain(params, x):
            layer = nnx.merge(graph, params)
            scores = layer.router.scores(x @ layer.router.kernel[...])
            weights = jnp.where(jnp.asarray(expected > 0), scores, 0)
            if config.router.normalize:
                weights = weights / weights.sum(-1, keepdims=True)
            y = dense_of(layer, x, weights * config.router.scaling)
            return jnp.sum(jnp.sin(y)), dense_of(layer, x, jnp.asarray(expected))

        def dense_of(layer, x, weights):
            if layer.experts.gate is None:
                y = sum(
                    weights[..., e, None] * (jax.nn.relu(x @ layer.experts.up[...][e]) @ layer.experts.down[...][e])
                    for e in range(config.num_experts)
                )
            else:
                y = dense(layer, x, weights)
            if layer.shared is not None:
                y = y + layer.shared(x) * jax.nn.sigmoid(x @ layer.shared_gate[...])
            return y

        expected = weights_of(config, params['router'], X)
        (ours_value, y), gradients = compiled(jax.value_and_grad(ours, (0, 1), has_aux=True))(params, x)
        (value, dense_y), plain_gradients = compiled(jax.value_and_grad(plain, (0, 1), has_aux=True))(params, x)
        np.testing.assert_allclose(y, dense_y, atol=1e-9)
        np.testing.assert_allclose(ours_value, value, rtol=1e-12)
        for path, gradient in jax.tree_util.tree_leaves_with_path(plain_gradients):
            mine = dict(jax.tree_util.tree_leaves_with_path(gradients))[path]
            np.testing.assert_allclose(mine, gradient, atol=1e-10, err_msg=str(path))


def test_sums_of_the_router():
    with jax.enable_x64():
        graph, params = built(MOE)
        segments = jnp.asarray(np.where(np.arange(8) < 5, 1, 0) * np.array([[1], [1], [0]]))
        _, sums = nnx.merge(graph, params)(jnp.asarray(X), Context(segments))
        logits = X @ np.asarray(params['router']['kernel'])
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = weights_of(MOE, params['router'], X) > 0
        balance = z = entropy = 0.0
        load = np.zeros(4)
        for row in range(2):
            f, p = chosen[row, :5].mean(0) / 2, scores[row, :5].mean(0)
            balance += 5 * 4 * (f * p).sum()
            z += (np.log(np.exp(logits[row, :5]).sum(-1)) ** 2).sum()
            entropy -= (scores[row, :5] * np.log(scores[row, :5])).sum()
            load += chosen[row, :5].sum(0)
        expected = {'balance': balance, 'z': z, 'entropy': entropy, 'load': load, 'loss': 0.01 * balance + 0.001 * z}
        expected |= {'routed': 10, 'assignments': 20, 'dropped': 0}
        assert set(sums) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(sums[name], value, rtol=1e-10, err_msg=name)


def test_a_bias_changes_the_choice_and_its_gradient_is_the_excess():
    with jax.enable_x64():
        graph, params = built(moe({'bias_rate': 0.1, 'balance_loss': 0.0, 'z_loss': 0.0}))
        params['router']['bias'] = jnp.asarray([9.0, 0.0, 0.0, -9.0])

        def loss(params):
            return nnx.merge(graph, params)(jnp.asarray(X), Context())[1]['loss']

        sums = nnx.merge(graph, params)(jnp.asarray(X), Context())[1]
        assert sums['loss'] == 0
        assert sums['load'][0] == 24
        assert sums['load'][3] == 0
        gradient = jax.grad(loss)(params)
        np.testing.assert_array_equal(gradient['router']['bias'], 4 * np.asarray(sums['load']) - 48)
        np.testing.assert_array_equal(gradient['router']['kernel'], 0)


def drops(expert, most):
    """Kept choices of one group [n, C], first choices first."""
    kept, load = np.zeros(expert.shape, bool), {}
    for column in range(expert.shape[1]):
        for token in range(expert.shape[0]):
            e = expert[token, column]
            kept[token, column] = load.get(e, 0) < most
            load[e] = load.get(e, 0) + 1
    return kept


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    groups=st.integers(1, 3),
    size=st.sampled_from([1, 2, 4, 6]),
    experts=st.integers(1, 5),
    factor=st.sampled_from([0.5, 1.0, 1.25, 9.0]),
    zigzag=st.booleans(),
)
def test_drops(seed, groups, size, experts, factor, zigzag):
    generator = np.random.default_rng(seed)
    columns, length = min(2, experts), groups * size
    expert = np.argsort(generator.random((2, length, experts)), -1)[..., :columns].astype(np.int32)
    chosen = generator.random((2, length, 1)) < 0.8
    capacity = Capacity(factor, size)
    most = capacity.tokens(length, columns, experts)
    assert most == min(size, max(1, int(np.ceil(factor * size * columns / experts))))
    order = generator.permutation(length) if zigzag else np.arange(length)
    kept = compiled(_within_capacity, static_argnums=(2, 3))(
        expert[:, order], np.broadcast_to(chosen, expert.shape)[:, order], capacity, experts, order if zigzag else None
    )
    for row in range(2):
        for group in range(groups):
            part = slice(group * size, (group + 1) * size)
            numbered = np.where(chosen[row, part], expert[row, part], -1 - np.arange(size)[:, None])
            wanted = drops(numbered, most) & chosen[row, part]
            np.testing.assert_array_equal(np.asarray(kept)[row, np.argsort(order)[part]], wanted)


@pytest.mark.parametrize('factor', [0.4, 1.0])
def test_dropped_choices_add_nothing(factor):
    with jax.enable_x64():
        config = moe(dispatch='capacity', capacity_factor=factor, group_size=4)
        graph, params = built(config)
        layer = nnx.merge(graph, params)
        choices, sums = layer.router(jnp.asarray(X), Context(), Capacity(factor, 4))
        assert 0 < sums['dropped'] < sums['assignments'] == 48
        weights = (jax.nn.one_hot(choices.expert, 4) * (choices.weight * choices.kept)[..., None]).sum(-2)
        assert int((weights > 0).sum()) == 48 - int(sums['dropped'])
        np.testing.assert_allclose(layer(jnp.asarray(X), Context())[0], dense(layer, X, weights), atol=1e-10)
        # With a cache nothing is dropped.
        free = nnx.merge(built(moe())[0], params)
        cached = layer(jnp.asarray(X), Context(offset=0))[0]
        np.testing.assert_array_equal(cached, free(jnp.asarray(X), Context())[0])


@pytest.mark.parametrize('size', [None, 4])
def test_experts_that_choose(size):
    with jax.enable_x64():
        config = moe({'kind': 'expert_choice'}, dispatch='capacity', capacity_factor=1.0, group_size=size)
        graph, params = built(config)
        layer = nnx.merge(graph, params)
        logits = X @ np.asarray(params['router']['kernel'])
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        weights = np.zeros_like(scores)
        size = size or 8
        for row in range(3):
            for start in range(0, 8, size):
                for e in range(4):
                    best = start + np.argsort(-scores[row, start : start + size, e])[: size // 2]
                    weights[row, best, e] = scores[row, best, e]
        y, sums = layer(jnp.asarray(X), Context())
        np.testing.assert_allclose(y, dense(layer, X, weights), atol=1e-10)
        np.testing.assert_array_equal(sums['load'], [12] * 4)
        assert sums['dropped'] == (weights.sum(-1) == 0).sum()
        gradient = jax.grad(lambda x: layer(x, Context())[0].sum())(jnp.asarray(X))
        assert np.isfinite(gradient).all()
        with pytest.raises(UserError, match='cannot generate'):
            layer(jnp.asarray(X), Context(offset=0))


def test_hash_layers():
    with jax.enable_x64():
        config = moe({'kind': 'hash', 'hash': 'balanced', 'hash_ids': 10}, experts_per_token=1)
        graph, params = built(config)
        assert 'router' not in params
        layer = nnx.merge(graph, params)
        ids = np.random.default_rng(0).integers(0, 10, (3, 8))
        y, sums = layer(jnp.asarray(X), Context(token_ids=jnp.asarray(ids)))
        table = balanced_table(None, 10, 4, 0)
        np.testing.assert_allclose(y, dense(layer, X, jax.nn.one_hot(table[ids], 4)), atol=1e-10)
        assert sums['loss'] == 0
        np.testing.assert_array_equal(sums['load'], np.bincount(table[ids].reshape(-1), minlength=4))


def test_a_balanced_table_deals_frequencies_out(tmp_path):
    counts = np.array([100, 1, 1, 60, 40, 30, 30, 0, 0])
    path = tmp_path / 'frequencies.txt'
    np.savetxt(path, counts, fmt='%d')
    table = balanced_table(str(path), None, 3, 0)
    assert sorted(np.bincount(table, counts, 3)) == [72, 90, 100]
    assert sorted(np.bincount(balanced_table(None, 10, 4, 3))) == [2, 2, 3, 3]
    with pytest.raises(UserError, match='cannot read token frequencies'):
        balanced_table(str(tmp_path / 'nothing.txt'), None, 3, 0)


def test_a_random_hash_is_even_and_depends_on_the_seed():
    ids = jnp.arange(40_000)
    first, second = (np.asarray(hashed(ids, seed, 8)) for seed in (0, 1))
    np.testing.assert_allclose(np.bincount(first, minlength=8), 5000, rtol=0.05)
    np.testing.assert_allclose((first == second).mean(), 1 / 8, rtol=0.05)


MISTAKES = {
    'experts_per_token': (lambda: moe(experts_per_token=5), 'experts_per_token is 5 of 4 experts'),
    'choice without capacity': (lambda: moe({'kind': 'expert_choice'}), 'need a capacity'),
    'groups': (lambda: moe({'expert_groups': 3}), '4 experts in 3 groups'),
    'few groups': (
        lambda: moe({'expert_groups': 4}, experts_per_token=2),
        '1 groups of 1 experts have fewer than 2',
    ),
    'biases': (lambda: moe(expert=FeedForwardConfig(8, bias=True)), 'experts have no biases'),
    'gate of nothing': (lambda: moe(shared_gate=True), 'shared_gate without a shared layer'),
    'dispatch': (lambda: moe(dispatch='dropped'), "dispatch is 'dropped'"),
    'kind': (lambda: RouterConfig(kind='topk'), "kind is 'topk'"),
    'hash of nothing': (lambda: RouterConfig(kind='hash', hash='balanced'), 'does not know the vocabulary'),
    'bias of a hash': (lambda: RouterConfig(kind='hash', bias_rate=0.1), 'has a bias_rate'),
    'capacity': (lambda: moe(capacity_factor=0.0), 'capacity_factor is 0.0'),
    'group size': (lambda: Capacity(1.0, 5).group(8), 'rows of 8 tokens cannot be divided into groups of 5'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        make()


def test_width_keeps_the_number_of_experts():
    wide = dataclasses.replace(MOE, shared=FeedForwardConfig(10)).scaled(Fraction(2))
    assert (wide.num_experts, wide.expert.d_ff, wide.shared.d_ff) == (4, 48, 20)
