"""Latent attention against its formula, its cache, and its absorbed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.models.context import Context
from llm.models.latent_attention import LatentAttentionConfig
from tests.models.small_decoders import LAYER, build, compiled, decoder_config, parameters, run, tokens

LATENT = LatentAttentionConfig(4, latent=12, plain_dim=8, rotary_dim=4, value_dim=6)


def config(mixer=LATENT, **changes):
    layer = dataclasses.replace(LAYER, mixer=mixer)
    return decoder_config(layer, compute_dtype='float64', **changes)


@pytest.mark.parametrize('neighbours', [False, True])
@pytest.mark.parametrize('query_latent', [None, 10])
def test_formula(query_latent, neighbours):
    """DeepSeek-V2, eq. 9 to 19 and 37 to 47, in NumPy."""
    with jax.enable_x64():
        mixer = dataclasses.replace(LATENT, query_latent=query_latent, rotary_neighbours=neighbours)
        model = config(mixer, num_layers=1)
        params = parameters(model)
        decoder = build(model, params)
        p = jax.tree.map(lambda x: np.asarray(x[0]), params['layers']['0']['mixer'])
        x = np.random.default_rng(0).standard_normal((2, 5, 16))

        def norm(x, scale):
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

        angles = np.arange(5)[:, None] * 10_000.0 ** (-np.arange(0, 4, 2) / 4)

        def rotate(x):
            if neighbours:
                first, second = x[..., ::2], x[..., 1::2]
            else:
                first, second = x[..., :2], x[..., 2:]
            cos, sin = (f(angles).reshape(1, 5, *(1,) * (x.ndim - 3), 2) for f in (np.cos, np.sin))
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

        source = x
        if query_latent:
            source = norm(x @ p['query_down'], p['query_norm']['scale'])
        query = np.einsum('bsd,dhk->bshk', source, p['query_up' if query_latent else 'query'])
        latent = norm(x @ p['latent'], p['latent_norm']['scale'])
        plain_key = np.einsum('bsr,rhk->bshk', latent, p['key'])
        value = np.einsum('bsr,rhk->bshk', latent, p['value'])
        rotary_key = rotate(x @ p['rotary_key'])
        scores = np.einsum('bshk,bthk->bhst', query[..., :8], plain_key)
        scores = (scores + np.einsum('bshk,btk->bhst', rotate(query[..., 8:]), rotary_key)) / np.sqrt(12)
        scores = np.where(np.tril(np.ones((5, 5), bool)), scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        expected = np.einsum('bhst,bthk,hkd->bsd', weights, value, p['output'])

        context = Context(rotary=decoder.rotary(jnp.arange(5)[None]))
        layer = jax.tree.map(lambda x: x[0], decoder.layers['0'].mixer)
        np.testing.assert_allclose(layer(jnp.asarray(x), context)[0], expected, atol=1e-10)


def test_a_cache_holds_the_latent_and_changes_nothing():
    """Prompts of both lengths: one whose keys are made anew, and single tokens, which are absorbed."""
    with jax.enable_x64():
        model = config()
        decoder, inputs = build(model), tokens(2, 14)
        mixer = jax.tree.map(lambda x: x[0], decoder.layers['0'].mixer)
        assert mixer._absorbing(1) and not mixer._absorbing(12 * 14 // 10 + 1)
        expected = decoder(inputs)
        cache = decoder.init_cache(2, 14)
        assert {name: x.shape for name, x in cache['layers']['0'].items()} == {
            'latent': (2, 2, 14, 12),
            'rotary_key': (2, 2, 14, 4),
        }
        step = compiled(decoder.decode)
        found, cache = decoder.decode(inputs[:, :12], cache, 0)
        np.testing.assert_allclose(found, expected[:, :12], atol=1e-10)
        for index in (12, 13):
            found, cache = step(inputs[:, index : index + 1], cache, jnp.int32(index))
            np.testing.assert_allclose(found[:, 0], expected[:, index], atol=1e-10)
        # Ten tokens at once, absorbed too, and the same.
        assert mixer._absorbing(10)
        found, _ = decoder.decode(inputs[:, :10], decoder.init_cache(2, 14), 0)
        np.testing.assert_allclose(found, expected[:, :10], atol=1e-10)


def test_segments_are_apart():
    with jax.enable_x64():
        model = config()
        params, inputs = parameters(model), tokens(1, 9)
        segments = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]], np.int32)
        whole = run(model, params, inputs, segment_ids=segments)
        np.testing.assert_allclose(whole[:, 4:], run(model, params, inputs[:, 4:]), atol=1e-10)


MISTAKES = {
    'odd': (lambda: dataclasses.replace(LATENT, rotary_dim=3), 'rotary_dim 3 is odd'),
    'zero': (lambda: dataclasses.replace(LATENT, latent=0), 'latent is 0'),
    'wide values': (lambda: dataclasses.replace(LATENT, value_dim=13), 'value_dim 13 is more than'),
    'positions': (lambda: build(config(position='alibi')), 'latent attention has rotary_dim'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        make()
