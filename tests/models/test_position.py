"""Positions against their papers' formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.errors import UserError
from llm.models.position import (
    Rotary,
    RotaryScaling,
    alibi_slopes,
    rotary_table,
    rotate,
    segment_positions,
    sinusoids,
)


def test_rotation_is_that_of_the_paper():
    """Su et al. 2021, eq. 15: each pair, as a complex number, is multiplied by exp(i m theta_j)."""
    rotary = Rotary(head_dim=8, base=100.0, fraction=1.0)
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 1000, 0, 1]])
    rotated = rotate(jnp.asarray(x), rotary_table(rotary, jnp.asarray(positions), jnp.float32))
    pairs = x[..., :4] + 1j * x[..., 4:]
    theta = 100.0 ** (-np.arange(4) / 4)
    expected = pairs * np.exp(1j * positions[:, :, None, None] * theta)
    np.testing.assert_allclose(rotated[..., :4], expected.real, atol=1e-4)
    np.testing.assert_allclose(rotated[..., 4:], expected.imag, atol=1e-4)


# Against transformers: tests/interop. Here what each scaling is for.
@pytest.mark.parametrize(
    ('scaling', 'length'),
    [
        (RotaryScaling('linear', 4.0), 64),
        (RotaryScaling('dynamic', 4.0, 32), 64),
        (RotaryScaling('llama3', 4.0, 32), 64),
        (RotaryScaling('yarn', 4.0, 32), 64),
        (RotaryScaling('longrope', 4.0, 32, short_factors=(1.0,) * 8, long_factors=(1.0, 2, 3, 4, 5, 6, 7, 8)), 64),
    ],
    ids=lambda value: getattr(value, 'kind', ''),
)
def test_scaling_slows_the_slowest_frequency_most_and_leaves_the_order(scaling, length):
    rotary = Rotary(head_dim=16, base=10_000.0, fraction=1.0, scaling=scaling)
    slowing = rotary.slowing(length)
    assert slowing.shape == (8,) and np.all(np.diff(slowing) <= 1e-12) and slowing[0] <= 1
    if scaling.kind in ('linear', 'llama3', 'yarn'):
        assert slowing[-1] == pytest.approx(1 / scaling.factor)
    if scaling.kind != 'linear':
        assert slowing[0] == 1
    if scaling.kind in ('dynamic', 'longrope'):
        np.testing.assert_allclose(rotary.slowing(32), 1.0)


def test_dynamic_scaling_stretches_the_slowest_wave_as_rows_grow():
    """So that it turns in `times` as long a row as it did (factor 1) where rows are `times` as long."""
    rotary = Rotary(16, 100.0, 1.0, RotaryScaling('dynamic', 1.0, 32))
    assert rotary.slowing(96)[-1] == pytest.approx(1 / 3)


def test_attention_factor_scales_cosines_and_sines():
    plain = Rotary(8, 100.0, 1.0)
    scaled = Rotary(8, 100.0, 1.0, RotaryScaling('yarn', 1.0, 32, attention_factor=1.25))
    positions = jnp.arange(5)[None]
    for one, other in zip(*(rotary_table(r, positions, jnp.float32) for r in (plain, scaled)), strict=True):
        np.testing.assert_allclose(1.25 * one, other, rtol=1e-6)


def test_rotary_embeddings_have_an_order():
    """A dict of them is a pytree, and keys of dicts are sorted."""
    kinds = [Rotary(8, 100.0, 1.0, RotaryScaling('linear', factor)) for factor in (2.0, 4.0)] + [Rotary(8, 100.0, 1.0)]
    assert len(jax.tree.leaves(dict.fromkeys(kinds, 0))) == 3


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: RotaryScaling('ntk'), "kind is 'ntk'"),
        (lambda: RotaryScaling('linear', 0.5), 'factor is 0.5'),
        (lambda: RotaryScaling('yarn', 2.0), 'original_length is 0'),
        (lambda: RotaryScaling('llama3', 2.0, 8, low_frequency_factor=4.0), 'low_frequency_factor 4.0 is not below'),
        (lambda: RotaryScaling('yarn', 2.0, 8, beta_fast=0.5), 'beta_slow 1.0 is not below'),
        (lambda: RotaryScaling('longrope', 2.0, 8), '0 short_factors'),
        (lambda: RotaryScaling('linear', 2.0, short_factors=(1.0,)), '1 short_factors'),
        (lambda: RotaryScaling('longrope', 2.0, 8, short_factors=(1.0,), long_factors=(-1.0,)), '1 short_factors'),
    ],
)
def test_scalings_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_scores_depend_on_the_distance_only():
    rotary = Rotary(head_dim=16, base=10_000.0, fraction=0.5)
    with jax.enable_x64(True):
        query, key = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 1, 1, 16)))

        def score(m, n):
            rows = (rotate(x, rotary_table(rotary, jnp.asarray([[p]]), jnp.float64)) for x, p in ((query, m), (key, n)))
            return float(jnp.vdot(*rows))

        assert score(3, 1) == pytest.approx(score(103, 101), rel=1e-9)
        assert score(3, 1) != pytest.approx(score(3, 2), rel=1e-3)


def test_the_rest_of_the_head_is_left_alone():
    rotary = Rotary(head_dim=8, base=10_000.0, fraction=0.25)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 2, 8)), jnp.bfloat16)
    rotated = rotate(x, rotary_table(rotary, jnp.arange(4)[None], jnp.float32))
    assert rotated.dtype == jnp.bfloat16
    assert (rotated[..., 2:] == x[..., 2:]).all()
    assert (rotated[:, 1:, :, :2] != x[:, 1:, :, :2]).all()


def test_alibi_slopes_are_those_of_the_paper():
    """Press et al. 2022, section 3, for 8 and 16 heads; the authors' code for 12 (BLOOM and MPT follow it)."""
    assert alibi_slopes(8) == tuple(1 / 2**i for i in range(1, 9))
    assert alibi_slopes(16) == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    assert alibi_slopes(12) == pytest.approx(list(alibi_slopes(8)) + [2 ** (-i / 2) for i in (1, 3, 5, 7)])
    assert alibi_slopes(1) == (2**-8,)


def test_sinusoids_are_those_of_the_paper():
    """Vaswani et al. 2017, section 3.5, element by element."""
    table = sinusoids(jnp.arange(20), 6, jnp.float32)
    for position in (0, 1, 19):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert float(table[position, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-5)
            assert float(table[position, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-5)


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=3, max_size=3))
def test_positions_restart_with_each_segment(rows):
    length = 25
    segment_ids = np.zeros((len(rows), length), np.int32)
    expected = np.zeros_like(segment_ids)
    for i, row in enumerate(rows):
        lengths = [*row, length - sum(row)]  # the last one is padding, with id 0
        segment_ids[i] = np.repeat([*range(1, len(row) + 1), 0], lengths)
        expected[i] = np.concatenate([np.arange(n) for n in lengths])
    np.testing.assert_array_equal(segment_positions(jnp.asarray(segment_ids)), expected)
