"""What holds of encoders and encoder-decoders whatever they compute: packing, decoding, sharing, mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.errors import UserError
from llm.models.encoder import EncoderConfig
from llm.models.relative_bias import RelativeBiasConfig
from tests.models.small_decoders import compiled
from tests.models.small_encoders import V, bert, built, hybrid_t5, t5

RNG = np.random.default_rng(0)


def tokens(batch, length):
    return jnp.asarray(RNG.integers(0, V, (batch, length)))


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize('model', [t5, hybrid_t5])
def test_packed_documents_do_not_see_each_other_on_either_side(model):
    graph, params = built(model())
    run = compiled(lambda params, *both, **ids: nnx.merge(graph, params)(*both, **ids))
    encoder, decoder = tokens(1, 12), tokens(1, 9)
    packed = run(
        *(params, decoder, encoder),
        segment_ids=jnp.asarray([[1] * 4 + [2] * 3 + [0] * 2]),
        encoder_segment_ids=jnp.asarray([[1] * 7 + [2] * 4 + [0]]),
    )
    close(packed[:, :4], run(params, decoder[:, :4], encoder[:, :7]))
    close(packed[:, 4:7], run(params, decoder[:, 4:7], encoder[:, 7:11]))


def test_packed_documents_do_not_see_each_other_in_an_encoder():
    encoder = tokens(1, 12)
    graph, params = built(bert())
    alone = compiled(lambda params, inputs, **ids: nnx.merge(graph, params)(inputs, **ids))
    packed = alone(params, encoder, segment_ids=jnp.asarray([[1] * 7 + [2] * 5]))
    close(packed, jnp.concatenate([alone(params, encoder[:, :7]), alone(params, encoder[:, 7:])], axis=1))


@pytest.mark.parametrize('position', ['relative', 'rope'])
def test_decoding_gives_what_the_whole_row_gives(position):
    config = t5(3)
    bias = config.decoder.relative_bias if position == 'relative' else None
    config = dataclasses.replace(
        config,
        position=position,
        encoder=dataclasses.replace(
            config.encoder, relative_bias=bias and dataclasses.replace(bias, bidirectional=True)
        ),
        decoder=dataclasses.replace(config.decoder, relative_bias=bias, num_layers=3),
    )
    graph, params = built(config)
    encoder, decoder, ids = tokens(2, 6), tokens(2, 7), jnp.asarray([[1] * 6, [1] * 4 + [0] * 2])

    @compiled
    def both(params):
        model = nnx.merge(graph, params)
        whole = model(decoder, encoder, segment_ids=jnp.ones((2, 7), int), encoder_segment_ids=ids)
        cache = model.init_cache(model.encode(encoder, segment_ids=ids), 7, ids)
        first, cache = model.decode(decoder[:, :4], cache, 0)
        # Rows may go on from different places: the second reads its fourth token again.
        second, cache = model.decode(jnp.stack([decoder[0, 4:6], decoder[1, 3:5]]), cache, jnp.asarray([4, 3]))
        return whole, first, second

    whole, first, second = both(params)
    close(first, whole[:, :4])
    close(second, jnp.stack([whole[0, 4:6], whole[1, 3:5]]))


@pytest.mark.parametrize('scan', [True, False])
def test_shared_layers_are_layers_with_equal_parameters(scan):
    shared = bert(3)
    layers = dataclasses.replace(shared.layers, shared_layers=True, scan_layers=scan)
    graph, params = built(dataclasses.replace(shared, layers=layers))
    apart, _ = built(shared)
    repeated = params | {
        'encoder': {'layers': jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), params['encoder']['layers'])}
    }
    inputs = tokens(2, 8)
    close(
        compiled(lambda p: nnx.merge(graph, p)(inputs))(params),
        compiled(lambda p: nnx.merge(apart, p)(inputs))(repeated),
    )
    assert shared.layers.location(2) == ('layers', '0', 2) and layers.location(2) == ('layers', '0', 0)


def test_buckets_hold_ever_more_distances():
    assert RelativeBiasConfig().edges() == (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)
    distances = jnp.asarray([0, 1, -1, 7, 8, 11, -12, 127, 10_000, -10_000])
    assert RelativeBiasConfig().buckets(distances).tolist() == [0, 17, 1, 23, 24, 24, 9, 31, 31, 15]
    causal = RelativeBiasConfig(bidirectional=False)
    assert causal.buckets(jnp.asarray([5, 0, -5, -15, -16, -1000])).tolist() == [0, 0, 5, 15, 16, 31]


@pytest.mark.parametrize(
    ('make', 'what'),
    [
        (lambda: bert(max_positions=None), 'need max_positions'),
        (lambda: bert(next_sentence=True), 'what the pooler gives'),
        (lambda: bert(embedding_size=8, head=None), 'need a head'),
        (lambda: bert(embedding_dropout=1.0), 'embedding_dropout is 1.0'),
        (lambda: bert(compute_dtype='int8'), "compute_dtype is 'int8'"),
        (lambda: EncoderConfig(9, 32, t5().decoder, max_positions=4), 'attention has causal = True'),
        (lambda: t5(decoder=t5().encoder), 'attention has causal = False'),
        (lambda: t5(encoder=hybrid_t5().decoder), 'EncoderDecoderConfig.encoder: MambaConfig reads in one direction'),
        (lambda: t5(position='learned'), "position is 'learned'"),
        (lambda: t5(position='rope').build(), "position is 'rope' and relative_bias"),
        (lambda: RelativeBiasConfig(30), '30 buckets'),
        (lambda: RelativeBiasConfig(32, 10), 'distances up to 10'),
        (lambda: dataclasses.replace(bert().layers, num_layers=0), 'num_layers is 0'),
        (lambda: dataclasses.replace(bert().layers, pattern=()), 'pattern is empty'),
        (
            lambda: dataclasses.replace(
                bert().layers, num_layers=3, pattern=bert().layers.pattern * 2, shared_layers=True
            ),
            'no whole number of patterns',
        ),
        (lambda: dataclasses.replace(t5().decoder.pattern[0], norm_position='sandwich'), 'cross-attention stands in'),
        (lambda: nnx.merge(*built(bert()))(jnp.zeros((1, 41), int)), 'longer than the 40 learned positions'),
    ],
)
def test_mistakes_are_named(make, what):
    with pytest.raises(UserError, match=what):
        make()
