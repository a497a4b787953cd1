"""Decoding with a cache equals the full forward pass at every position."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from tests.models.small_decoders import DECODER, build, compiled, decoder_config, layer, parameters, run, tokens

LENGTH = 12
HYBRID = decoder_config(
    layer({'window': 3, 'logit_soft_cap': 2.0}),
    layer({'num_kv_heads': 1, 'rotary_fraction': 0.5}, norm_position='sandwich'),
    num_layers=5,
    max_positions=LENGTH,
    compute_dtype='float64',
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_equal(left, right):
    np.testing.assert_allclose(left, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('position', ['rope', 'alibi', 'learned', 'sinusoidal', 'none'])
def test_prompts_of_any_length_then_token_by_token(position):
    """Rows with prompts of 1 to 7 tokens, padded on the right, each continued from its own length to the end."""
    config = dataclasses.replace(HYBRID, position=position)
    params, inputs = parameters(config), tokens(3, LENGTH)
    expected = run(config, params, inputs)
    model = build(config, params)
    lengths = np.array([4, 1, 7])
    prompts = np.where(np.arange(7) < lengths[:, None], inputs[:, :7], 30)
    decode = compiled(lambda model, *arguments: model.decode(*arguments))
    logits, cache = decode(model, prompts, model.init_cache(3, LENGTH), 0)
    for row, length in enumerate(lengths):
        assert_equal(logits[row, :length], expected[row, :length])
    offsets = lengths.copy()
    for _ in range(LENGTH):
        # Rows that are done go on past the end: what they compute is not stored and not looked at.
        column = np.minimum(offsets, LENGTH - 1)
        logits, cache = decode(model, np.take_along_axis(inputs, column[:, None], axis=1), cache, offsets)
        for row in np.flatnonzero(offsets < LENGTH):
            assert_equal(logits[row, 0], expected[row, offsets[row]])
        offsets = offsets + 1


@pytest.mark.parametrize('scan', [True, False])
def test_chunked_prefill(scan):
    config = dataclasses.replace(HYBRID, scan_layers=scan)
    params, inputs = parameters(config), tokens(2, LENGTH)
    expected = run(config, params, inputs)
    model = build(config, params)
    decode = compiled(lambda model, *arguments: model.decode(*arguments))
    cache = model.init_cache(2, LENGTH)
    for start in range(0, LENGTH, 4):
        logits, cache = decode(model, inputs[:, start : start + 4], cache, jnp.int32(start))
        assert_equal(logits, expected[:, start : start + 4])


def test_going_back_writes_over_the_cache():
    """Speculative decoding throws tokens away by decoding from an earlier offset."""
    params, inputs = parameters(HYBRID), tokens(2, LENGTH)
    expected = run(HYBRID, params, inputs)
    model = build(HYBRID, params)
    decode = compiled(lambda model, *arguments: model.decode(*arguments))
    cache = model.init_cache(2, LENGTH)
    _, cache = decode(model, np.flip(inputs, axis=1), cache, 0)
    logits, cache = decode(model, inputs, cache, 0)
    assert_equal(logits, expected)


def test_hidden_states_are_those_of_the_full_pass():
    model = build(dataclasses.replace(HYBRID, num_layers=1))
    inputs = tokens(2, 6)

    @compiled
    def both(model):
        return model.hidden(inputs), model.decode_hidden(inputs, model.init_cache(2, 6), 0)[0]

    assert_equal(*both(model))


def test_the_cache_mirrors_the_layers():
    cache = build(HYBRID).init_cache(3, 8, 'bfloat16')
    shapes = jax.tree.map(lambda array: (array.shape, str(array.dtype)), cache)
    window, single = ((2, 3, 8, 2, 8), 'bfloat16'), ((2, 3, 8, 1, 8), 'bfloat16')
    last = ((1, 3, 8, 2, 8), 'bfloat16')
    assert shapes == {
        'layers': {'0': {'key': window, 'value': window}, '1': {'key': single, 'value': single}},
        'remainder': {'0': {'key': last, 'value': last}},
    }
    assert build(DECODER).init_cache(1, 8)['layers']['0']['key'].dtype == jnp.float32


def test_tokens_that_do_not_fit_are_refused():
    model = build(DECODER)
    cache = model.init_cache(1, 8)
    with pytest.raises(UserError, match='3 tokens from 6 on do not fit a cache of length 8'):
        model.decode(tokens(1, 3), cache, 6)
    with pytest.raises(UserError, match='9 tokens from 0 on do not fit a cache of length 8'):
        model.decode(tokens(1, 9), cache, jnp.int32(0))
