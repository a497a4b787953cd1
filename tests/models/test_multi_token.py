"""Multi-token prediction: parallel heads are decoders with another last layer; modules in sequence are the paper's."""

import dataclasses
import operator

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from llm.errors import UserError
from llm.models.decoder import Decoder
from llm.models.initialization import initialize
from llm.models.multi_token import MultiTokenConfig
from llm.models.parameters import parameter_specs
from tests.models.small_decoders import LAYER, compiled, decoder_config, layer, parameters, tokens

INPUTS = tokens(2, 7)
# Documents of 4 and 3 tokens, and one of 5 before padding.
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 0, 0]], np.int32)


def ahead(config, params, inputs, tokens_ahead=(), **arguments):
    """Logits [B, n, S, V]."""
    graph = nnx.split(Decoder(config))[0]
    return compiled(lambda p, *arrays: nnx.merge(graph, p).logits_ahead(arrays[0], arrays[1], **arrays[2]))(
        params, inputs, tokens_ahead, arguments
    )


@pytest.mark.parametrize(
    ('num_layers', 'scan'), [(4, True), (3, False)], ids=['whole patterns', 'one layer left over, unrolled']
)
def test_a_parallel_head_stands_in_the_place_of_the_last_layer(num_layers, scan):
    pattern = LAYER, layer(mixer={'window': 3})
    plain = decoder_config(*pattern, num_layers=num_layers, scan_layers=scan)
    config = dataclasses.replace(plain, multi_token=MultiTokenConfig(2, 'parallel'))
    params = parameters(config)
    logits = ahead(config, params, INPUTS, segment_ids=SEGMENTS)
    heads = params.pop('multi_token')['heads']
    assert logits.shape == (2, 3, 7, 31)
    graph = nnx.split(Decoder(plain))[0]
    logits_of = compiled(lambda p: nnx.merge(graph, p)(INPUTS, segment_ids=SEGMENTS))
    np.testing.assert_allclose(logits[:, 0], logits_of(params), atol=1e-5)
    group, position, repeat = plain.location(num_layers - 1)
    for depth in range(2):
        other = jax.tree.map(operator.itemgetter(depth), heads)
        last = jax.tree.map(lambda x, new: x.at[repeat].set(new), params[group][position], other)
        changed = params | {group: params[group] | {position: last}}
        np.testing.assert_allclose(logits[:, depth + 1], logits_of(changed), atol=1e-5)


def _rms(x, scale):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * scale


def _rotated(x, positions):
    """Rotary embedding in halves, [S, heads, K]."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    cos, sin = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _block(p, x):
    """A Transformer block on one document, [S, D]."""
    length = torch.arange(len(x))
    y = _rms(x, p['mixer_norm']['scale'])
    query, key, value = (torch.einsum('sd,dhk->shk', y, p['mixer'][name]) for name in ('query', 'key', 'value'))
    query, key = _rotated(query, length), _rotated(key, length)
    key, value = (torch.repeat_interleave(each, 2, 1) for each in (key, value))
    scores = torch.einsum('shk,thk->hst', query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(length[None, :, None] < length[None, None, :], -torch.inf)
    mixed = torch.einsum('hst,thk->shk', scores.softmax(-1), value)
    x = x + torch.einsum('shk,hkd->sd', mixed, p['mixer']['output'])
    y, feed = _rms(x, p['feed_forward_norm']['scale']), p['feed_forward']
    return x + (torch.nn.functional.silu(y @ feed['gate']) * (y @ feed['up'])) @ feed['down']


@pytest.mark.oracle
def test_modules_in_sequence_are_those_of_the_paper():
    """DeepSeek-V3, section 2.2: eq. 21 and 22, and the shared output head, document by document."""
    config = decoder_config(multi_token=MultiTokenConfig(2))
    params = parameters(config)
    following = [np.roll(INPUTS, -shift, axis=1) for shift in (1, 2)]
    logits = ahead(config, params, INPUTS, following, segment_ids=SEGMENTS)
    graph = nnx.split(Decoder(config))[0]
    states = compiled(lambda p: nnx.merge(graph, p).hidden(INPUTS, segment_ids=SEGMENTS))(params)
    theirs = jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float64)), params)
    table, head = theirs['embedding']['table'], theirs['head']['kernel']
    for row, document in ((0, slice(0, 4)), (0, slice(4, 7)), (1, slice(0, 5))):
        state = torch.tensor(np.asarray(states[row, document], np.float64))
        known = torch.tensor(INPUTS[row, document].astype(np.int64))
        for k in (1, 2):
            p = jax.tree.map(lambda x, k=k: x[k - 1], theirs['multi_token']['heads'])
            whole = len(known) - k  # positions whose token k ahead is of this document
            state = state[:whole]
            token = table[known[k:]]
            joined = torch.cat([_rms(state, p['state_norm']['scale']), _rms(token, p['token_norm']['scale'])], -1)
            projection = torch.cat([p['combine'][0], p['combine'][1]])  # 2 D to D
            state = _block(p['layer'], joined @ projection)
            expected = _rms(state, p['final_norm']['scale']) @ head
            found = logits[row, k, document][:whole]
            np.testing.assert_allclose(found, expected, atol=2e-4 * float(expected.abs().max()))


def test_decoding_and_the_start_of_the_decoder_are_as_without():
    plain = decoder_config(initialization=dataclasses.replace(decoder_config().initialization, scheme='gpt2'))
    config = dataclasses.replace(plain, multi_token=MultiTokenConfig(2))
    module, without = (each.build() for each in (config, plain))
    specs, bare = parameter_specs(module), parameter_specs(without)
    assert {name for name in specs if name not in bare} == {'multi_token'}
    started = jax.tree.leaves(initialize(bare, plain.initialization, 0))
    found = initialize(specs, config.initialization, 0)
    further = found.pop('multi_token')
    for exact, actual in zip(started, jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(exact, actual)
    found['multi_token'] = further
    graph = nnx.split(module)[0]

    def decoded(p):
        decoder = nnx.merge(graph, p)
        return decoder(INPUTS), decoder.decode(INPUTS, decoder.init_cache(2, 7), 0)[0]

    whole, one_by_one = compiled(decoded)(found)
    np.testing.assert_allclose(one_by_one, whole, atol=1e-4)


def test_what_a_depth_counts_for():
    assert MultiTokenConfig(3, 'parallel').depth_weight == 1  # Gloeckle et al., eq. 2: a plain sum
    assert MultiTokenConfig(3).depth_weight == pytest.approx(0.1)  # DeepSeek-V3, eq. 25: lambda over D
    assert MultiTokenConfig(2, 'parallel', weight=0.5).depth_weight == 0.25


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'depths': 0}, 'depths is 0'),
        ({'kind': 'both'}, "kind is 'both'"),
        ({'weight': 0.0}, 'weight is 0.0'),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        MultiTokenConfig(**settings)


def test_what_it_does_not_go_with_is_named():
    with pytest.raises(UserError, match='num_outputs of something else'):
        decoder_config(multi_token=MultiTokenConfig(), num_outputs=2)
    config = decoder_config(multi_token=MultiTokenConfig())
    with pytest.raises(UserError, match='would read what it predicts'):
        config.build().logits_ahead(INPUTS, [INPUTS], prefix=INPUTS)
