"""The decoder as a whole: layout, packing, windows, dropout, remat, muP and what it refuses."""

import dataclasses
from collections import Counter

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.errors import UserError
from llm.models.decoder import Decoder
from llm.models.normalization import NormConfig
from llm.models.parameters import count_parameters, named_specs, parameter_specs
from llm.models.remat import REMAT_NAMES
from tests.models.small_decoders import DECODER, LAYER, build, compiled, decoder_config, layer, parameters, run, tokens

POSITIONS = ('rope', 'alibi', 'learned', 'sinusoidal', 'none')
HYBRID = decoder_config(layer({'window': 3}), layer({'num_kv_heads': 4}), num_layers=5, compute_dtype='float64')


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def loss_and_gradients(config, params, **arguments):
    graph, _ = nnx.split(Decoder(config))
    inputs = tokens(2, 9)

    def loss(params):
        logits = nnx.merge(graph, params)(inputs, **arguments)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), inputs[:, 1:, None], axis=-1).mean()

    return compiled(jax.value_and_grad(loss))(params)


def assert_equal_trees(left, right, tolerance):
    """Every array within `tolerance` of its largest value."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True):
        assert float(jnp.abs(a - b).max()) <= tolerance * float(jnp.abs(b).max()), jax.tree_util.keystr(path)


def test_layers_are_stored_by_position_in_the_pattern():
    specs = dict(named_specs(parameter_specs(Decoder(HYBRID))))
    assert specs['layers/0/mixer/key'].shape == (2, 16, 2, 8)
    assert specs['layers/1/mixer/key'].shape == (2, 16, 4, 8)
    assert specs['remainder/0/mixer/key'].shape == (1, 16, 2, 8)
    assert not any(name.startswith('remainder/1') for name in specs)
    assert [HYBRID.location(i) for i in range(5)] == [
        ('layers', '0', 0),
        ('layers', '1', 0),
        ('layers', '0', 1),
        ('layers', '1', 1),
        ('remainder', '0', 0),
    ]
    assert [HYBRID.layer(i) for i in range(5)] == [HYBRID.pattern[i % 2] for i in range(5)]


def test_fewer_layers_than_the_pattern_are_all_remainder(float64):
    config = dataclasses.replace(HYBRID, num_layers=1)
    names = {name.split('/')[0] for name, _ in named_specs(parameter_specs(Decoder(config)))}
    assert names == {'embedding', 'final_norm', 'head', 'remainder'}
    assert run(config, parameters(config), tokens(1, 4)).shape == (1, 4, 31)


def test_layer_i_uses_the_parameters_at_its_location(float64):
    """The pattern of two as one unrolled pattern of five gives the same function of the same layers."""
    flat = dataclasses.replace(HYBRID, pattern=tuple(HYBRID.layer(i) for i in range(5)))
    params = parameters(HYBRID)
    regrouped = {name: params[name] for name in ('embedding', 'final_norm', 'head')}
    regrouped['layers'] = {}
    for i in range(5):
        group, position, repeat = HYBRID.location(i)
        regrouped['layers'][str(i)] = jax.tree.map(lambda p, r=repeat: p[r : r + 1], params[group][position])
    expected = run(HYBRID, params, tokens(2, 9))
    np.testing.assert_allclose(run(flat, regrouped, tokens(2, 9)), expected, rtol=1e-12, atol=1e-12)


def test_scanned_layers_drop_as_unrolled_ones(float64):
    pattern = tuple(dataclasses.replace(part, dropout=0.3) for part in HYBRID.pattern)
    config = dataclasses.replace(HYBRID, pattern=pattern, embedding_dropout=0.2)
    params, inputs, key = parameters(config), tokens(2, 9), jax.random.key(3)
    unrolled = run(dataclasses.replace(config, scan_layers=False), params, inputs, dropout_key=key)
    np.testing.assert_allclose(run(config, params, inputs, dropout_key=key), unrolled, rtol=1e-12, atol=1e-12)


def test_loops_and_recomputation_change_no_gradient(float64):
    plain = decoder_config(compute_dtype='float64')
    params = parameters(plain)
    expected = loss_and_gradients(plain, params)
    for remat, names, scan in (
        ('none', (), False),
        ('full', (), False),
        ('dots', (), True),
        ('dots_no_batch', (), True),
        ('names', ('attention', 'feed_forward_hidden'), True),
        ('offload', ('layer_input',), True),
        ('offload', REMAT_NAMES, False),
    ):
        config = dataclasses.replace(plain, remat=remat, remat_names=names, scan_layers=scan)
        assert_equal_trees(loss_and_gradients(config, params), expected, 1e-12)


def test_recomputation_repeats_the_dropout(float64):
    plain = decoder_config(layer(dropout=0.3), num_layers=1, compute_dtype='float64')
    params, key = parameters(plain), jax.random.key(0)
    expected = loss_and_gradients(plain, params, dropout_key=key)
    config = dataclasses.replace(plain, remat='full')
    assert_equal_trees(loss_and_gradients(config, params, dropout_key=key), expected, 1e-12)


def test_remat_keeps_what_it_says():
    """Residuals of the backward pass, counted in values, fall from kind to kind; names keep exactly the named ones."""
    inputs = tokens(2, 8)

    def residuals(remat, names=()):
        config = decoder_config(remat=remat, remat_names=names, scan_layers=False)
        graph, _ = nnx.split(Decoder(config))
        params = parameters(config)
        # A backward pass is a pytree of what it keeps: parameters, which all kinds keep, and activations.
        backward = jax.eval_shape(lambda params: jax.vjp(lambda p: nnx.merge(graph, p)(inputs), params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    none, dots, no_batch, full = (residuals(kind) for kind in ('none', 'dots', 'dots_no_batch', 'full'))
    assert none > dots > no_batch > full
    hidden = 2 * 8 * 24 * DECODER.num_layers
    assert residuals('names', ('feed_forward_hidden',)) == full + hidden
    # The input of a layer that is kept by name takes the place of the one kept as an argument.
    assert residuals('offload', ('layer_input', 'feed_forward_hidden')) == full + hidden


@pytest.mark.parametrize('scan', [True, False])
def test_offload_sends_to_the_host_what_it_says(scan):
    """Forward, every layer sends both of the named activations to the host; backward, they are taken back."""
    config = decoder_config(
        remat='offload', remat_names=('layer_input', 'feed_forward_hidden'), scan_layers=scan, num_layers=3
    )
    graph, _ = nnx.split(Decoder(config))
    inputs, width = tokens(2, 8), {'layer_input': 16, 'feed_forward_hidden': 24}

    def loss(params):
        return nnx.merge(graph, params)(inputs).sum()

    program = jax.make_jaxpr(jax.grad(loss))(parameters(config))
    moved = Counter(transfers(program.jaxpr))
    times = 1 if scan else 3  # the body of the loop is there once
    shapes = [(2, 8, size) for size in width.values()]
    memories = (jax.memory.Space.Host, jax.memory.Space.Device)
    assert moved == {(memory, shape): times for memory in memories for shape in shapes}


def transfers(jaxpr):
    """(memory, shape) of every array that is moved to a memory, programs within the program looked into."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'device_put':
            yield from ((array.aval.memory_space, array.aval.shape) for array in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from transfers(inner)


@pytest.mark.parametrize('position', POSITIONS)
def test_packed_documents_equal_separate_ones(float64, position):
    config = decoder_config(
        layer({'window': 4}), LAYER, position=position, max_positions=16, compute_dtype='float64', num_layers=3
    )
    params, lengths = parameters(config), (5, 1, 7)
    # What comes after a token does not change its logits, so separate documents may share padded rows.
    documents = tokens(3, 7)
    separate = run(config, params, documents)
    expected = np.concatenate([separate[i, :length] for i, length in enumerate(lengths)])
    packed = np.concatenate([documents[i, :length] for i, length in enumerate(lengths)])[None]
    arguments = {'segment_ids': np.repeat([1, 2, 3], lengths)[None]}
    if position == 'rope':  # the others rely on positions that restart with the segments by themselves
        arguments['positions'] = np.concatenate([np.arange(length) for length in lengths])[None]
    logits = run(config, params, packed, **arguments)[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-10, atol=1e-10)


def influence(config, length=10):
    """Which inputs [S] change which logits [S]: influence[t, s] is true if token s moves logits t."""
    rows = np.repeat(tokens(1, length), length + 1, axis=0)  # the last row stays as it is
    rows[np.arange(length), np.arange(length)] = (rows[np.arange(length), np.arange(length)] + 1) % 31
    logits = np.asarray(run(config, parameters(config), rows))
    return np.abs(logits[:-1] - logits[-1]).max(axis=-1).T > 1e-5


def test_a_token_sees_itself_and_what_is_before():
    assert (influence(decoder_config()) == np.tril(np.ones((10, 10), bool))).all()


def test_a_window_of_w_sees_w_tokens_and_layers_add_up():
    distance = np.subtract.outer(np.arange(10), np.arange(10))
    one = influence(decoder_config(layer({'window': 3}), num_layers=1))
    assert (one == ((distance >= 0) & (distance < 3))).all()
    two = influence(decoder_config(layer({'window': 3}), num_layers=2))
    assert (two == ((distance >= 0) & (distance < 5))).all()


def test_dropout_follows_the_key_and_needs_one():
    config = decoder_config(layer(dropout=0.5), embedding_dropout=0.5)
    params, inputs = parameters(config), tokens(2, 8)
    graph, _ = nnx.split(Decoder(config))
    logits = compiled(lambda key: nnx.merge(graph, params)(inputs, dropout_key=key))
    assert (logits(jax.random.key(0)) == logits(jax.random.key(0))).all()
    assert (logits(jax.random.key(0)) != logits(jax.random.key(1))).any()
    assert (run(config, params, inputs) == run(DECODER, params, inputs)).all()


def test_layers_drop_differently():
    """Branches that add one to every element of zero: what is left after dropout counts the masks that kept it."""
    config = decoder_config(
        layer(feed_forward={'bias': True, 'activation': 'relu'}, dropout=0.5, norm=None), final_norm=None
    )
    params = jax.tree.map(jnp.zeros_like, parameters(config))
    params['layers']['0']['feed_forward']['down_bias'] += 1.0
    hidden = build(config, params).hidden(tokens(4, 8), dropout_key=jax.random.key(0))
    values, counts = np.unique(hidden, return_counts=True)
    assert values.tolist() == [0.0, 2.0, 4.0]
    # Independent masks: 1/4, 1/2, 1/4 of 512 elements; equal masks would never give 2.
    assert abs(counts[1] - 256) < 60


def test_tied_embeddings_are_one_parameter():
    config = decoder_config(tied_embeddings=True)
    model = build(config)
    specs = parameter_specs(Decoder(config))
    assert 'head' not in specs
    assert count_parameters(parameter_specs(Decoder(DECODER))) - count_parameters(specs) == 16 * 31
    hidden = np.random.default_rng(0).standard_normal((1, 4, 16)).astype(np.float32)
    expected = hidden @ np.asarray(model.embedding.table[...]).T
    np.testing.assert_allclose(model.logits(jnp.asarray(hidden)), expected, rtol=1e-5, atol=1e-5)


def test_embedding_multiplier_scales_the_embedding():
    params = parameters(decoder_config(num_layers=1))
    for multiplier, factor in ((None, 4.0), (3.0, 3.0)):
        config = decoder_config(embedding_multiplier=multiplier, num_layers=1)
        scaled = {**params, 'embedding': {'table': params['embedding']['table'] * factor}}
        expected = run(decoder_config(num_layers=1), scaled, tokens(1, 5))
        np.testing.assert_allclose(run(config, params, tokens(1, 5)), expected, rtol=1e-5, atol=1e-5)


def test_final_soft_cap_bounds_the_logits():
    params = parameters(DECODER)
    logits = run(DECODER, params, tokens(1, 5))
    capped = run(decoder_config(final_logit_soft_cap=0.5), params, tokens(1, 5))
    np.testing.assert_allclose(capped, 0.5 * np.tanh(logits / 0.5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('tied', [True, False])
def test_mup_divides_the_logits_by_the_width(tied):
    params = parameters(decoder_config(tied_embeddings=tied))
    logits = run(decoder_config(tied_embeddings=tied), params, tokens(1, 5))
    scaled = run(decoder_config(tied_embeddings=tied, mup_base_width=4), params, tokens(1, 5))
    np.testing.assert_allclose(scaled, logits * 4 / 16, rtol=1e-6, atol=1e-7)
    same = run(decoder_config(tied_embeddings=tied, mup_base_width=16), params, tokens(1, 5))
    assert (same == logits).all()


def test_a_config_at_its_own_width_is_itself():
    assert HYBRID.at_width(16) == HYBRID
    wide = HYBRID.at_width(48)
    assert wide.at_width(16) == HYBRID
    assert (wide.pattern[0].mixer.num_heads, wide.pattern[0].mixer.num_kv_heads) == (12, 6)
    assert (wide.pattern[0].mixer.head_dim, wide.pattern[0].feed_forward.d_ff) == (8, 72)
    narrow = HYBRID.at_width(4)
    assert (narrow.pattern[0].mixer.num_heads, narrow.pattern[0].mixer.num_kv_heads) == (1, 1)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
def test_logits_are_float32_and_activations_of_the_compute_dtype(dtype):
    config = decoder_config(compute_dtype=dtype)
    params = parameters(DECODER)
    assert jax.eval_shape(build(config, params).hidden, tokens(1, 4)).dtype == dtype
    logits = run(config, params, tokens(1, 4))
    assert logits.dtype == jnp.float32
    tolerance = {'bfloat16': 0.1, 'float16': 0.01, 'float32': 0}[dtype]
    expected = run(DECODER, params, tokens(1, 4))
    assert float(jnp.abs(logits - expected).max()) <= tolerance * float(jnp.abs(expected).max())


def test_everything_stays_float64(float64):
    model = build(HYBRID)
    assert jax.eval_shape(model, tokens(1, 4)).dtype == jnp.float64
    assert 'f32' not in str(jax.make_jaxpr(lambda: model(tokens(1, 4)))())


def test_learned_positions_end():
    config = decoder_config(position='learned', max_positions=8)
    model = build(config)
    assert jax.eval_shape(model, tokens(1, 8)).shape == (1, 8, 31)
    with pytest.raises(UserError, match='9 tokens is longer than the 8 learned positions'):
        model(tokens(1, 9))
    with pytest.raises(UserError, match='9 tokens is longer than the 8 learned positions'):
        model.init_cache(1, 9)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_layers': 0}, 'num_layers is 0'),
        ({'d_model': -1}, 'd_model is -1'),
        ({'pattern': ()}, 'pattern is empty'),
        ({'position': 'learned'}, 'learned positions need max_positions'),
        ({'position': 'rotary'}, "position is 'rotary'"),
        ({'position': 'sinusoidal', 'd_model': 15}, 'd_model 15 is odd'),
        ({'compute_dtype': 'fp32'}, "compute_dtype is 'fp32'"),
        ({'embedding_dropout': 1.0}, 'embedding_dropout is 1.0'),
        ({'remat': 'some'}, "remat is 'some'"),
        ({'remat': 'names'}, "remat is 'names' and remat_names is ()"),
        ({'remat_names': ('query',)}, "remat is 'none' and remat_names is"),
        ({'remat': 'offload'}, "remat is 'offload' and remat_names is ()"),
        ({'remat': 'names', 'remat_names': ('queries',)}, 'queries'),
        ({'mup_base_width': 0}, 'mup_base_width is 0'),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(UserError) as error:
        dataclasses.replace(DECODER, **changes)
    assert message in str(error.value)


def test_norms_count_among_the_parameters():
    with_bias = decoder_config(layer(norm=NormConfig(kind='layer', bias=True)))
    extra = count_parameters(parameter_specs(Decoder(with_bias))) - count_parameters(parameter_specs(Decoder(DECODER)))
    assert extra == 2 * 2 * 16
    without = decoder_config(layer(norm=None), final_norm=None)
    fewer = count_parameters(parameter_specs(Decoder(DECODER))) - count_parameters(parameter_specs(Decoder(without)))
    assert fewer == (2 * 2 + 1) * 16
