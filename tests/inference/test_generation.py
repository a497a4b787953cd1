"""The decoding loop against full forward passes, and what must not change what a prompt is continued with."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from llm.errors import UserError
from llm.inference.generation import Generator, Prompt
from llm.inference.sampling import SamplingConfig
from llm.models.decoder import Decoder
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.moe import MoeConfig
from llm.models.normalization import NormConfig
from llm.models.parameters import parameter_specs
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.sharding import AxisRules, parameter_sharding
from tests.models.small_decoders import LAYER, decoder_config, layer, parameters, run, tokens
from tests.models.small_encoders import built, hybrid_t5

GREEDY = SamplingConfig(temperature=0)
MESH = make_mesh(MeshConfig(data=1))
PLAIN = decoder_config(num_layers=1, vocab_size=32)
# Grouped and single key heads, a window, a layer left over after the pattern.
HYBRID = decoder_config(
    layer({'window': 3, 'logit_soft_cap': 2.0}),
    layer({'num_kv_heads': 1, 'rotary_fraction': 0.5}, norm_position='sandwich'),
    num_layers=3,
    max_positions=40,
    compute_dtype='float64',
)
RECURRENT = {
    'mamba': (LayerConfig(MambaConfig(32, 2, 4), None),),
    'mamba2': (LayerConfig(Mamba2Config(4, 8, 6, num_groups=2), None),),
    'hybrid': (
        LayerConfig(MambaConfig(32, 2, 4, state_norm=NormConfig()), MoeConfig(4, 2, FeedForwardConfig(16))),
        LAYER,
        LayerConfig(Mamba2Config(4, 8, 6), None),
    ),
}
PROMPTS = [Prompt(tuple(tokens(1, length, seed=length)[0].tolist()), index) for index, length in enumerate((5, 1, 9))]


def generate(generator, params, prompts, max_new_tokens, **settings):
    """All new tokens of each prompt, and why each ended."""
    decoding = generator.start(params, prompts, max_new_tokens, **settings)
    continuations = [[] for _ in prompts]
    for new in decoding:
        for continuation, more in zip(continuations, new, strict=True):
            continuation.extend(more)
    return continuations, decoding.ends


@pytest.fixture(scope='module')
def sampler():
    """Parameters of PLAIN, and what draws from it."""
    return parameters(PLAIN), Generator(PLAIN, SamplingConfig(temperature=1.5, top_p=0.95), MESH, tokens_per_call=5)


@pytest.mark.parametrize('kind', ['rope', 'alibi', 'learned', 'sinusoidal', 'none', *RECURRENT])
def test_greedy_is_the_argmax_of_the_full_forward_pass(kind):
    new = 12
    with jax.enable_x64(True):
        if kind in RECURRENT:
            pattern = RECURRENT[kind]
            config = dataclasses.replace(HYBRID, pattern=pattern, num_layers=len(pattern) + 1, position='none')
        else:
            config = dataclasses.replace(HYBRID, position=kind)
        params = parameters(config)
        found, ends = generate(Generator(config, GREEDY, MESH), params, PROMPTS, new)
        rows = np.zeros((3, 9 + new), np.int32)
        for row, prompt, continuation in zip(rows, PROMPTS, found, strict=True):
            row[: len(prompt.tokens) + new] = [*prompt.tokens, *continuation]
        # A pass over all tokens has at each place what a pass over those up to it has.
        choices = run(config, params, rows).argmax(axis=-1)
    for row, prompt, continuation in zip(choices, PROMPTS, found, strict=True):
        start = len(prompt.tokens)
        assert row[start - 1 : start - 1 + new].tolist() == continuation
    assert ends == ['length'] * 3
    assert len({tuple(continuation) for continuation in found}) == 3


def test_an_encoder_decoder_goes_on_from_recurrent_states():
    """Rows of the decoder of different lengths, whose padding no state may see."""
    texts = [tuple(tokens(1, length, seed=length)[0].tolist()) for length in (3, 12, 7)]
    prompts = [dataclasses.replace(each, encoder_tokens=text) for each, text in zip(PROMPTS, texts, strict=True)]
    new, config = 9, hybrid_t5(compute_dtype='float64')
    with jax.enable_x64(True):
        graph, params = built(config)
        found, _ = generate(Generator(config, GREEDY, MESH), params, prompts, new)
        rows, sources = np.zeros((3, 9 + new), np.int32), np.zeros((3, 12), np.int32)
        for row, source, prompt, continuation in zip(rows, sources, prompts, found, strict=True):
            row[: len(prompt.tokens) + new] = [*prompt.tokens, *continuation]
            source[: len(prompt.encoder_tokens)] = prompt.encoder_tokens
        ids = np.arange(12) < np.array([len(text) for text in texts])[:, None]
        sides = {'segment_ids': np.ones(rows.shape, np.int32), 'encoder_segment_ids': ids.astype(np.int32)}
        run_all = jax.jit(lambda params: nnx.merge(graph, params)(rows, sources, **sides))
        choices = run_all(params).argmax(axis=-1)
    for row, prompt, continuation in zip(choices, prompts, found, strict=True):
        start = len(prompt.tokens)
        assert row[start - 1 : start - 1 + new].tolist() == continuation
    assert len({tuple(continuation) for continuation in found}) == 3


def test_a_batch_and_its_prompts_alone_give_the_same_samples(sampler):
    params, generator = sampler
    together, _ = generate(generator, params, PROMPTS, 12, seed=7)
    alone = [generate(generator, params, [prompt], 12, seed=7)[0][0] for prompt in reversed(PROMPTS)]
    assert together == alone[::-1]
    assert generate(generator, params, PROMPTS, 12, seed=8)[0] != together
    longer, _ = generate(generator, params, PROMPTS, 40, seed=7)  # a longer cache
    assert [continuation[:12] for continuation in longer] == together


def test_samples_of_one_prompt_differ(sampler):
    params, generator = sampler
    prompts = [Prompt(PROMPTS[0].tokens, index, number) for index, number in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(continuation) for continuation in generate(generator, params, prompts, 12)[0]}) == 3


@pytest.mark.parametrize('sizes', [{'data': 1, 'tensor': 2}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
def test_a_mesh_gives_what_one_device_gives(sizes):
    params = parameters(PLAIN)
    expected, _ = generate(Generator(PLAIN, GREEDY, MESH), params, PROMPTS, 12)
    mesh, rules = make_mesh(MeshConfig(**sizes)), AxisRules()
    spread = jax.tree.map(
        lambda spec, value: jax.device_put(value, parameter_sharding(spec.axes, spec.shape, mesh, rules, '')),
        parameter_specs(Decoder(PLAIN)),
        params,
    )
    generator = Generator(PLAIN, GREEDY, mesh, rules)
    assert generate(generator, spread, PROMPTS, 12)[0] == expected


def test_ends_at_the_first_stop_token(sampler):
    params, generator = sampler
    whole, _ = generate(generator, params, PROMPTS, 20)
    stops = {whole[0][7], whole[1][0]}
    cut = [next((i for i, token in enumerate(row) if token in stops), 20) for row in whole]
    found, ends = generate(generator, params, PROMPTS, 20, stop_tokens=stops)
    assert found == [row[:end] for row, end in zip(whole, cut, strict=True)]
    assert ends == ['length' if end == 20 else 'stop_token' for end in cut]
    assert cut[0] <= 7
    assert cut[1] == 0


def test_a_row_that_the_caller_ends_gets_nothing_more(sampler):
    params, generator = sampler
    decoding = generator.start(params, PROMPTS, 20)
    counts = []
    for new in decoding:
        counts.append([len(tokens) for tokens in new])
        if len(counts) == 2:
            decoding.finish(1)
    assert counts == [[1, 1, 1], [5, 5, 5], [5, 0, 5], [5, 0, 5], [4, 0, 4]]
    assert decoding.ends == ['length', 'finished', 'length']


def test_learned_positions_end_a_row_and_refuse_a_longer_prompt():
    config = decoder_config(num_layers=1, position='learned', max_positions=10)
    params, generator = parameters(config), Generator(config, GREEDY, MESH)
    found, ends = generate(generator, params, PROMPTS, 20)
    assert [len(continuation) for continuation in found] == [5, 9, 1]
    assert ends == ['length'] * 3
    inputs = np.zeros((1, 10), np.int32)
    inputs[0, :9] = PROMPTS[2].tokens
    assert found[2] == [run(config, params, inputs)[0, 8].argmax()]
    with pytest.raises(UserError, match='prompt 4: the prompt has 10 tokens, but the model has 10 positions'):
        generator.start(params, [Prompt((0,) * 10, index=3)], 1)


def test_ids_past_the_vocabulary_are_never_chosen():
    params = parameters(PLAIN)
    for sampling in (GREEDY, SamplingConfig(temperature=50.0)):
        generator = Generator(PLAIN, sampling, MESH, num_tokens=6)
        found, _ = generate(generator, params, PROMPTS, 30)
        assert max(max(continuation) for continuation in found) == 5


def test_few_programs_are_compiled():
    """One of each kind for a batch of up to four prompts of up to 32 tokens and continuations that end by 64."""
    compiled = []
    params, generator = parameters(PLAIN), Generator(PLAIN, SamplingConfig(top_k=9), MESH)

    def listen(event, duration, **_):
        compiled.append(event) if event == '/jax/core/compile/backend_compile_duration' else None

    generate(generator, params, PROMPTS, 40)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for length in (2, 30):
            generate(generator, params, [*PROMPTS, Prompt((3,) * length, 3)], 34, seed=length)
        assert not compiled
        generate(generator, params, [Prompt((3,) * 33)], 1)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_to_continue(sampler):
    params, generator = sampler
    assert generate(generator, params, [], 5) == ([], [])
    with pytest.raises(ValueError, match='at least one token'):
        generator.start(params, [Prompt(())], 5)
