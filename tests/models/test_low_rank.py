"""Low-rank adapters: they start as nothing, are trained alone, and merge into what they computed."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from llm.errors import UserError
from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.initialization import initialize
from llm.models.layer import LayerConfig
from llm.models.low_rank import LowRankConfig, attach, merge, merging_reader
from llm.models.parameters import named_specs, parameter_specs

LAYER = LayerConfig(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=6), FeedForwardConfig(d_ff=20))
WINDOWED = dataclasses.replace(LAYER, mixer=dataclasses.replace(LAYER.mixer, window=3))
PLAIN = DecoderConfig(vocab_size=31, d_model=16, num_layers=5, pattern=(LAYER, WINDOWED))
INPUTS = np.arange(22).reshape(2, 11)


def _adapted(**settings):
    return dataclasses.replace(PLAIN, low_rank=LowRankConfig(**settings))


def _parameters(config, seed):
    return initialize(parameter_specs(Decoder(config)), config.initialization, seed)


def _logits(config, parameters):
    return nnx.merge(nnx.split(Decoder(config))[0], parameters)(INPUTS)


@pytest.mark.parametrize('scan', [True, False])
def test_starts_as_the_model_that_is_adapted(scan):
    config = dataclasses.replace(_adapted(rank=3), scan_layers=scan)
    base = _parameters(PLAIN, 0)
    np.testing.assert_array_equal(
        _logits(config, attach(base, _parameters(config, 1))),
        _logits(dataclasses.replace(PLAIN, scan_layers=scan), base),
    )


def test_merged_parameters_compute_the_same():
    config = _adapted(rank=3, alpha=1.5)
    shaken = jax.tree.map(
        lambda x: x + 0.1 * np.random.default_rng(x.size).standard_normal(x.shape).astype(np.float32),
        _parameters(config, 1),
    )
    merged = merge(shaken, parameter_specs(Decoder(config)), config.low_rank)
    assert jax.tree.structure(merged) == jax.tree.structure(_parameters(PLAIN, 0))
    np.testing.assert_allclose(_logits(PLAIN, merged), _logits(config, shaken), rtol=1e-5, atol=1e-5)
    # By hand, for the output projection of layer 4: [4, 6, D] and rank 3.
    entry = shaken['remainder']['0']['mixer']['output']
    by_hand = entry['base'][0] + 0.5 * np.einsum('hkr,rd->hkd', entry['down'][0], entry['up'][0])
    np.testing.assert_allclose(merged['remainder']['0']['mixer']['output'][0], by_hand, rtol=1e-6)


def test_targets_alone_are_trained():
    config = _adapted(targets=('query', 'value'))
    trainable = {name for name, spec in named_specs(parameter_specs(Decoder(config))) if spec.trainable}
    assert trainable == {
        f'{group}/mixer/{name}/{factor}'
        for group in ('layers/0', 'layers/1', 'remainder/0')
        for name in ('query', 'value')
        for factor in ('down', 'up')
    }


def test_the_rest_can_be_trained_too():
    specs = dict(named_specs(parameter_specs(Decoder(_adapted(targets=('query',), train_rest=True)))))
    frozen = {name for name, spec in specs.items() if not spec.trainable}
    assert frozen == {f'{group}/mixer/query/base' for group in ('layers/0', 'layers/1', 'remainder/0')}


def test_an_unknown_target_is_named():
    with pytest.raises(UserError, match=r"'querry'.*down, gate, key, output, query, up, value"):
        Decoder(_adapted(targets=('querry',)))


def test_merging_piece_by_piece_is_merging():
    config = _adapted(rank=2, alpha=3.0)
    assert config.low_rank is not None
    specs = parameter_specs(Decoder(config))
    parameters = jax.tree.map(lambda x: x + 0.1, _parameters(config, 0))
    whole = dict(named_specs(merge(parameters, specs, config.low_rank)))
    flat = {path: np.asarray(value) for path, value in named_specs(parameters)}
    read = merging_reader(lambda path, index: flat[path][index], dict(named_specs(specs)), config.low_rank)
    for path, value in whole.items():
        for index in ((), (slice(0, 1),), (0,), (slice(None), slice(1, 3))):
            if len(index) <= value.ndim:
                np.testing.assert_allclose(read(path, index), value[index], atol=1e-6)
