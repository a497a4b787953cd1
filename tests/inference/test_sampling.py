"""Filters against transformers' own, draws against the distribution that the filters leave."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm.errors import UserError
from llm.inference.sampling import SamplingConfig, filter_logits, row_keys, sample, token_keys

FILTERS = [
    SamplingConfig(**filters)
    for filters in (
        {'temperature': 0.7},
        {'top_k': 1},
        {'top_k': 5},
        {'top_k': 1000},
        {'top_p': 0.05},
        {'top_p': 0.5},
        {'top_p': 0.999},
        {'top_p': 1.0},
        {'min_p': 0.1},
        {'min_p': 1.0},
        {'temperature': 1.7, 'top_k': 20, 'top_p': 0.8, 'min_p': 0.2},
        {'temperature': 0.5, 'top_k': 3, 'top_p': 0.9},
        {'temperature': 2.0, 'top_p': 0.7, 'min_p': 0.05},
    )
]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def keys(count, seed=0):
    return row_keys(seed, jnp.arange(count), jnp.zeros(count, jnp.int32))


def distribution(logits, config):
    return np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(logits), config), axis=-1))


@pytest.mark.oracle
@pytest.mark.parametrize('config', FILTERS, ids=str)
def test_the_same_distribution_as_transformers(config, float64):
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = 3 * np.random.default_rng(0).standard_normal((16, 97))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
    for value, warper in (
        (config.top_k, TopKLogitsWarper),
        (config.top_p, TopPLogitsWarper),
        (config.min_p, MinPLogitsWarper),
    ):
        if value is not None:
            warpers.append(warper(value))
    expected = torch.softmax(warpers(None, torch.tensor(logits)), dim=-1).numpy()
    found = distribution(logits, config)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=12), st.floats(0.01, 0.99))
@settings(max_examples=60)
def test_top_p_is_the_smallest_set_that_reaches_it(weights, top_p):
    """Weights with many ties, of which the tokens with lower ids come first."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    reached = np.cumsum([weights[i] for i in order]) / sum(weights)
    assume(np.abs(reached - top_p).min() > 1e-9)  # else rounding decides
    smallest = order[: 1 + np.flatnonzero(reached >= top_p)[0]]
    with jax.enable_x64(True):
        logits = np.full(12, -np.inf)  # all lists as long, so that each operation is compiled once
        logits[: len(weights)] = np.log(weights)
        kept = distribution(logits, SamplingConfig(top_p=top_p)) > 0
    assert set(np.flatnonzero(kept)) == set(smallest)


def test_ties():
    logits = jnp.log(jnp.array([[4.0, 1.0, 4.0, 2.0, 2.0, 2.0]]))
    assert (distribution(logits, SamplingConfig(top_k=3)) > 0).tolist() == [[True, False, True, True, True, True]]
    assert (distribution(logits, SamplingConfig(top_p=0.6)) > 0).tolist() == [[True, False, True, True, False, False]]
    assert (distribution(logits, SamplingConfig(min_p=0.5)) > 0).tolist() == [[True, False, True, True, True, True]]
    assert sample(logits, SamplingConfig(temperature=0), keys(1)).tolist() == [0]


def test_logits_already_cut_and_tiny_temperatures():
    """Ids past the vocabulary come as -inf; the smallest temperatures are greedy, not NaN."""
    logits = jnp.array([[-jnp.inf, 2.0, 1.0, -jnp.inf], [500.0, -500.0, 499.0, -jnp.inf]])
    for config in (*FILTERS, SamplingConfig(temperature=1e-6, top_p=0.9, min_p=0.1)):
        found = distribution(logits, config)
        np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-6)
        assert (found[np.isneginf(logits)] == 0).all()
    np.testing.assert_array_equal(distribution(logits, SamplingConfig(temperature=1e-6)), [[0, 1, 0, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize('config', [SamplingConfig(), SamplingConfig(temperature=1.5, top_k=6, top_p=0.9, min_p=0.1)])
def test_draws_follow_the_distribution(config):
    """Pearson's chi-squared test on 20,000 draws, at a level of one in a thousand; the seed is fixed."""
    from scipy import stats

    logits = jnp.asarray(np.random.default_rng(1).standard_normal(12), jnp.float32)
    draws = 20_000
    tokens = jax.jit(lambda rows, keys: sample(rows, config, keys))(jnp.tile(logits, (draws, 1)), keys(draws))
    counts = np.bincount(np.asarray(tokens), minlength=12)
    expected = distribution(logits, config).astype(np.float64) * draws
    possible = expected > 0
    assert (counts[~possible] == 0).all()
    expected = expected[possible] * draws / expected.sum()
    assert stats.chisquare(counts[possible], expected).pvalue > 1e-3


def test_a_row_is_drawn_by_its_own_key():
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((6, 50)))
    row_seeds = keys(6)
    together = sample(logits, SamplingConfig(), row_seeds)
    alone = [sample(logits[i : i + 1], SamplingConfig(), row_seeds[i : i + 1])[0] for i in range(6)]
    assert together.tolist() == alone


def test_keys_differ_by_seed_prompt_sample_and_position():
    drawn = [
        jax.random.key_data(token_keys(row_keys(seed, jnp.array([prompt]), jnp.array([number])), jnp.array([position])))
        for seed, prompt, number, position in itertools.product((0, 1), repeat=4)
    ]
    assert len({tuple(np.asarray(data).ravel().tolist()) for data in drawn}) == 16


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('temperature', -0.1),
        ('temperature', 1e-9),
        ('temperature', math.inf),
        ('temperature', math.nan),
        ('top_k', 0),
        ('top_p', 0.0),
        ('top_p', 1.1),
        ('min_p', 0.0),
        ('min_p', 1.5),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(UserError, match=f'SamplingConfig.{field} is {value}'):
        SamplingConfig(**{field: value})
