"""Mamba layers: packing, states of constant size, how they start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.initialization import Initialization, initialize
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.normalization import NormConfig
from llm.models.parameters import parameter_specs
from tests.models.small_decoders import LAYER, build, compiled, parameters, run, tokens

MIXERS = {
    'mamba': MambaConfig(32, 2, 4, state_norm=NormConfig(), bias=True),
    'mamba2': Mamba2Config(4, 8, 6, num_groups=2, bias=True),
}


def config(*mixers, **changes) -> DecoderConfig:
    pattern = tuple(LayerConfig(mixer, None) for mixer in mixers)
    return DecoderConfig(31, 16, len(pattern) + 1, pattern, position='none', compute_dtype='float64', **changes)


@pytest.mark.parametrize('name', MIXERS)
def test_a_packed_document_gets_what_it_gets_alone(name):
    with jax.enable_x64():
        model = config(MIXERS[name])
        params, inputs = parameters(model), tokens(1, 11)
        packed = run(model, params, inputs, segment_ids=np.repeat([[1, 2, 3]], [5, 2, 4], axis=1))
        alone = [run(model, params, part) for part in np.split(inputs, (5, 7), axis=1)]
        np.testing.assert_allclose(packed, np.concatenate(alone, axis=1), rtol=1e-12, atol=1e-12)


def test_decoding_in_pieces_equals_one_pass_and_padding_leaves_the_state():
    """Rows of 5 and 3 tokens padded to 6, then each goes on by 4 tokens, the second of them padded, then by one."""
    with jax.enable_x64():
        model = config(*MIXERS.values())
        params, inputs = parameters(model), tokens(2, 9)
        expected = run(model, params, inputs)
        decoder = build(model, params)
        decode = compiled(lambda decoder, *arguments, lengths: decoder.decode(*arguments, lengths=lengths))
        cache, offset = decoder.init_cache(2, 0), np.zeros(2, np.int32)
        for lengths, width in (([5, 3], 6), ([4, 1], 4), ([0, 1], 1), ([0, 4], 4)):
            index = np.minimum(offset[:, None] + np.arange(width), 8)
            logits, cache = decode(
                decoder, np.take_along_axis(inputs, index, 1), cache, offset, lengths=jnp.array(lengths)
            )
            for row, length in enumerate(lengths):
                at = slice(offset[row], offset[row] + length)
                np.testing.assert_allclose(logits[row, :length], expected[row, at], rtol=1e-11, atol=1e-11)
            offset = offset + np.array(lengths)
        assert offset.tolist() == [9, 9]


def test_the_cache_does_not_grow_with_the_length():
    recurrent, hybrid = Decoder(config(*MIXERS.values())), Decoder(DecoderConfig(31, 16, 1, (LAYER,)))
    sizes = [
        [x.size for x in jax.tree.leaves(d.init_cache(1, n, 'float32'))] for d in (recurrent, hybrid) for n in (8, 64)
    ]
    assert sizes[0] == sizes[1]
    assert sizes[2] != sizes[3]
    shapes = jax.tree.map(jnp.shape, recurrent.init_cache(3, 8, 'float32'))['layers']
    assert shapes['0'] == {'convolution': (1, 3, 3, 32), 'state': (1, 3, 4, 32)}
    assert shapes['1']['state'] == (1, 3, 4, 8, 6)


def test_parameters_start_as_published():
    model = DecoderConfig(31, 64, 1, (LayerConfig(MambaConfig(4096, 4), None),), position='none')
    mixer = initialize(parameter_specs(Decoder(model)), Initialization(), 0)['layers']['0']['mixer']
    np.testing.assert_allclose(np.exp(mixer['a_log'][0]), np.tile(np.arange(1.0, 17), (4096, 1)), rtol=1e-6)
    steps = np.log10(np.asarray(jax.nn.softplus(mixer['dt_bias'][0])))
    assert -3.001 < steps.min() < -2.99 and -1.01 < steps.max() < -0.999
    assert steps.mean() == pytest.approx(-2, abs=0.05)
    assert np.abs(mixer['dt_up']).max() == pytest.approx(4**-0.5, rel=1e-3)
    assert np.abs(mixer['convolution']).max() == pytest.approx(4**-0.5, rel=1e-3)
    assert (mixer['skip'] == 1).all()
    second = DecoderConfig(31, 64, 1, (LayerConfig(Mamba2Config(2048, 4, 4), None),), position='none')
    rates = np.exp(initialize(parameter_specs(Decoder(second)), Initialization(), 0)['layers']['0']['mixer']['a_log'])
    assert 1 <= rates.min() < 1.05 and 15.95 < rates.max() <= 16
    assert rates.mean() == pytest.approx(8.5, abs=0.4)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: MambaConfig(0, 1), 'd_inner is 0'),
        (lambda: Mamba2Config(3, num_groups=2), 'num_heads 3 is not divisible by num_groups 2'),
        (lambda: MambaConfig(8, 1, implementation='cuda'), "implementation is 'cuda'"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()
