"""Initial values: the schemes' standard deviations, and draws that depend on seed and path alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm.errors import UserError
from llm.interop.huggingface.directory import open_directory
from llm.interop.loading import load_parameters
from llm.models import initialization
from llm.models.decoder import Decoder
from llm.models.initialization import Initialization, initialize, residual_branches
from llm.models.normalization import NormConfig
from llm.models.parameters import ParameterSpec, Role, named_specs, parameter_specs
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules, parameter_sharding
from tests.models.small_decoders import DECODER, decoder_config, layer

SPECS = parameter_specs(Decoder(decoder_config(num_layers=3)))
WIDE = parameter_specs(Decoder(decoder_config(vocab_size=512).at_width(256)))


def deviations(specs, scheme):
    """Standard deviation of every drawn parameter, as asked, by name."""
    branches = residual_branches(specs)
    return {n: scheme.standard_deviation(s, branches) for n, s in named_specs(specs) if s.constant is None}


def test_gpt2_scales_what_ends_a_branch():
    assert deviations(SPECS, Initialization('gpt2', std=0.02)) == pytest.approx(
        {
            'embedding/table': 0.02,
            'head/kernel': 0.02,
            'layers/0/feed_forward/down': 0.02 / math.sqrt(6),
            'layers/0/feed_forward/gate': 0.02,
            'layers/0/feed_forward/up': 0.02,
            'layers/0/mixer/key': 0.02,
            'layers/0/mixer/output': 0.02 / math.sqrt(6),
            'layers/0/mixer/query': 0.02,
            'layers/0/mixer/value': 0.02,
        }
    )


def test_fan_in():
    assert deviations(SPECS, Initialization('fan_in', std=0.5)) == pytest.approx(
        {
            'embedding/table': 0.5,
            'head/kernel': 1 / 4,
            'layers/0/feed_forward/down': 1 / math.sqrt(24),
            'layers/0/feed_forward/gate': 1 / 4,
            'layers/0/feed_forward/up': 1 / 4,
            'layers/0/mixer/key': 1 / 4,
            'layers/0/mixer/output': 1 / math.sqrt(32),
            'layers/0/mixer/query': 1 / 4,
            'layers/0/mixer/value': 1 / 4,
        }
    )


def test_t_fixup():
    block, xavier = 0.67 * 3**-0.25, lambda inputs, outputs: math.sqrt(2 / (inputs + outputs))
    assert deviations(SPECS, Initialization('t_fixup')) == pytest.approx(
        {
            'embedding/table': 16**-0.5 * 27**-0.25,
            'head/kernel': xavier(16, 31),
            'layers/0/feed_forward/down': block * xavier(24, 16),
            'layers/0/feed_forward/gate': block * xavier(16, 24),
            'layers/0/feed_forward/up': block * xavier(16, 24),
            'layers/0/mixer/key': xavier(16, 16),
            'layers/0/mixer/output': block * xavier(32, 16),
            'layers/0/mixer/query': xavier(16, 32),
            'layers/0/mixer/value': block * xavier(16, 16),
        }
    )


def test_mup_is_constant_outside_and_fan_in_inside():
    scheme = Initialization('mup', std=0.7, output_std=0.1)
    narrow, wide = deviations(SPECS, scheme), deviations(WIDE, scheme)
    for name in narrow:
        if name == 'embedding/table':
            assert narrow[name] == wide[name] == 0.7
        elif name == 'head/kernel':
            assert narrow[name] == wide[name] == 0.1
        else:
            assert narrow[name] == pytest.approx(4 * wide[name])
    assert narrow['layers/0/mixer/query'] == 1 / 4
    assert not initialize(SPECS, Initialization('mup'), 0)['head']['kernel'].any()


def test_residual_branches_count_every_layer_once_per_branch():
    assert residual_branches(SPECS) == 6
    hybrid = decoder_config(layer({'window': 2}), layer(), num_layers=5)
    assert residual_branches(parameter_specs(Decoder(hybrid))) == 10


@pytest.mark.parametrize('truncated', [False, True])
def test_draws_have_the_deviation_asked_for(truncated):
    scheme = Initialization('fan_in', std=0.5, truncated=truncated)
    params = initialize(WIDE, scheme, 0)
    for (name, expected), values in zip(
        sorted(deviations(WIDE, scheme).items()),
        [p for (_, s), p in zip(named_specs(WIDE), jax.tree.leaves(params), strict=True) if s.constant is None],
        strict=True,
    ):
        assert float(values.std()) == pytest.approx(expected, rel=0.02), name
        assert abs(float(values.mean())) < 5 * expected / math.sqrt(values.size), name
        largest = float(jnp.abs(values).max()) / expected
        # Of more than 10,000 normal draws the largest is beyond three; cut ones end at 2 / 0.8796.
        assert largest < 2.274 if truncated else largest > 3, name


def test_constants_start_where_they_say():
    norm = NormConfig('layer', bias=True, unit_offset=True)
    params = initialize(parameter_specs(Decoder(decoder_config(layer(norm=norm)))), Initialization(), 0)
    assert (params['final_norm']['scale'] == 1).all()
    assert (params['layers']['0']['mixer_norm']['scale'] == 0).all()
    assert (params['layers']['0']['mixer_norm']['bias'] == 0).all()


def test_draws_depend_on_seed_and_path_only():
    params = initialize(SPECS, Initialization(), 0)
    again = initialize({'head': SPECS['head']}, Initialization(), 0)
    assert (params['head']['kernel'] == again['head']['kernel']).all()
    other = initialize({'head': SPECS['head']}, Initialization(), 1)
    assert (params['head']['kernel'] != other['head']['kernel']).all()
    layers = params['layers']['0']
    assert (layers['feed_forward']['up'] != layers['feed_forward']['gate']).all()
    assert (layers['mixer']['query'][0] != layers['mixer']['query'][1]).all()
    traced = jax.jit(functools.partial(initialize, {'head': SPECS['head']}, Initialization()))(jnp.uint32(0))
    np.testing.assert_allclose(params['head']['kernel'], traced['head']['kernel'], rtol=1e-6)


def test_float64_starts_from_the_same_values():
    with jax.enable_x64(True):
        double = initialize({'head': SPECS['head']}, Initialization(), 0, jnp.float64)
    single = initialize({'head': SPECS['head']}, Initialization(), 0)
    assert double['head']['kernel'].dtype == np.float64
    assert (np.asarray(double['head']['kernel'], np.float32) == np.asarray(single['head']['kernel'])).all()


def test_a_sharded_model_starts_in_place_with_the_same_values():
    specs = parameter_specs(Decoder(decoder_config(vocab_size=32)))
    mesh, rules = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2)), AxisRules()
    shardings = jax.tree.map(lambda spec: parameter_sharding(spec.axes, spec.shape, mesh, rules, ''), specs)
    start = functools.partial(initialize, specs, Initialization(truncated=True))
    sharded = jax.jit(start, out_shardings=shardings)(0)
    assert sharded['layers']['0']['mixer']['query'].addressable_shards[0].data.shape == (2, 8, 2, 8)
    for left, right in zip(jax.tree.leaves(sharded), jax.tree.leaves(jax.jit(start)(0)), strict=True):
        # The random bits are equal; their transformation to a normal draw is rounded as each device fuses it.
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6 * 0.02)


def test_flat_and_shaped_draws_have_the_same_bits(monkeypatch):
    specs = {'w': ParameterSpec((3, 4, 5), ('layers', 'embed', 'mlp'), Role.HIDDEN, inputs=(1,), outputs=(2,))}
    for truncated in (False, True):
        scheme = Initialization(truncated=truncated)
        flat = jax.jit(lambda seed, scheme=scheme: initialize(specs, scheme, seed))(0)
        monkeypatch.setattr(initialization, 'MAXIMUM_FLAT_DRAW', 0)
        shaped = jax.jit(lambda seed, scheme=scheme: initialize(specs, scheme, seed))(0)
        monkeypatch.undo()
        np.testing.assert_array_equal(flat['w'], shaped['w'])


def test_impossible_schemes_are_refused():
    with pytest.raises(UserError, match='std is -1'):
        Initialization(std=-1.0)
    with pytest.raises(UserError, match="scheme 'xavier' does not exist"):
        Initialization('xavier')


def test_the_default_decoder_is_drawn_as_gpt2():
    assert DECODER.initialization == Initialization('gpt2', std=0.02)


@pytest.mark.oracle
def test_t5_starts_as_transformers_t5_does(tmp_path):
    """But for the output projection of an untied model, of std 1 there and 1 / sqrt(fan-in) in Mesh TensorFlow."""
    import torch
    import transformers

    sizes = {'vocab_size': 4096, 'd_model': 96, 'd_kv': 16, 'd_ff': 192, 'num_layers': 1, 'num_heads': 8}
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, feed_forward_proj='gated-gelu', tie_word_embeddings=False)
    )
    theirs.init_weights()
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(4096, 96))  # transformers 5 ties it until it loads others
    theirs.save_pretrained(tmp_path)
    checkpoint = open_directory(tmp_path)
    drawn = load_parameters(
        checkpoint.pieces, checkpoint.specs, make_mesh(MeshConfig(), jax.devices()[:1]), AxisRules()
    )
    asked = deviations(checkpoint.specs, Initialization('t5', std=1.0))
    assert asked.pop('head/kernel') == pytest.approx(96**-0.5)
    flat = {'/'.join(str(key.key) for key in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(drawn)}
    assert set(asked) <= set(flat)
    for path, std in asked.items():
        assert np.std(flat[path]) == pytest.approx(std, rel=4 / np.sqrt(flat[path].size)), path
