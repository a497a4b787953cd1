"""The decoder against architectures of transformers that llm.interop does not read; tests/interop has those it does."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.normalization import NormConfig
from tests.models.small_decoders import run

pytestmark = pytest.mark.oracle

State = dict[str, np.ndarray]
Flat = dict[str, np.ndarray]
V, D, H, G, K, F, L, S = 61, 32, 4, 2, 8, 48, 3, 20
LAYER_NORM = NormConfig('layer', 1e-5, bias=True)


def stack(config: DecoderConfig, layers: list[Flat], rest: Flat) -> dict[str, Any]:
    """Nested parameters from each layer's by path ('mixer/query') and the rest by path ('embedding/table')."""
    params: dict[str, Any] = {}

    def put(path: str, value: np.ndarray) -> None:
        *parents, last = path.split('/')
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(value)

    for path, value in rest.items():
        put(path, value)
    groups: dict[tuple[str, str], list[Flat]] = {}
    for i, flat in enumerate(layers):
        groups.setdefault(config.location(i)[:2], []).append(flat)
    for (group, position), members in groups.items():
        for path in members[0]:
            put(f'{group}/{position}/{path}', np.stack([member[path] for member in members]))
    return params


def gpt2_layer(state: State, prefix: str, heads: int) -> Flat:
    """One layer of GPT-2 or GPT-1, whose projections are stored [in, out]."""
    width = state[f'{prefix}.attn.c_proj.bias'].size
    query, key, value = np.split(state[f'{prefix}.attn.c_attn.weight'].reshape(width, 3 * heads, -1), 3, axis=1)
    query_bias, key_bias, value_bias = np.split(state[f'{prefix}.attn.c_attn.bias'].reshape(3 * heads, -1), 3)
    return {
        'mixer/query': query,
        'mixer/key': key,
        'mixer/value': value,
        'mixer/query_bias': query_bias,
        'mixer/key_bias': key_bias,
        'mixer/value_bias': value_bias,
        'mixer/output': state[f'{prefix}.attn.c_proj.weight'].reshape(heads, -1, width),
        'mixer/output_bias': state[f'{prefix}.attn.c_proj.bias'],
        'feed_forward/up': state[f'{prefix}.mlp.c_fc.weight'],
        'feed_forward/up_bias': state[f'{prefix}.mlp.c_fc.bias'],
        'feed_forward/down': state[f'{prefix}.mlp.c_proj.weight'],
        'feed_forward/down_bias': state[f'{prefix}.mlp.c_proj.bias'],
        'mixer_norm/scale': state[f'{prefix}.ln_1.weight'],
        'mixer_norm/bias': state[f'{prefix}.ln_1.bias'],
        'feed_forward_norm/scale': state[f'{prefix}.ln_2.weight'],
        'feed_forward_norm/bias': state[f'{prefix}.ln_2.bias'],
    }


def projections(state: State, prefix: str, output: str = 'o_proj') -> Flat:
    """Query, key, value and output, stored [out, in] as q_proj, k_proj, v_proj and `output`, with any biases."""
    flat = {}
    for name, source in (('query', 'q_proj'), ('key', 'k_proj'), ('value', 'v_proj')):
        flat[f'mixer/{name}'] = state[f'{prefix}.{source}.weight'].T.reshape(D, -1, K)
        if f'{prefix}.{source}.bias' in state:
            flat[f'mixer/{name}_bias'] = state[f'{prefix}.{source}.bias'].reshape(-1, K)
    flat['mixer/output'] = state[f'{prefix}.{output}.weight'].T.reshape(-1, K, D)
    if f'{prefix}.{output}.bias' in state:
        flat['mixer/output_bias'] = state[f'{prefix}.{output}.bias']
    return flat


def norms(state: State, prefix: str, names: dict[str, str]) -> Flat:
    """Scales and biases: our name by theirs."""
    flat = {}
    for theirs, ours in names.items():
        flat[f'{ours}/scale'] = state[f'{prefix}{theirs}.weight']
        if f'{prefix}{theirs}.bias' in state:
            flat[f'{ours}/bias'] = state[f'{prefix}{theirs}.bias']
    return flat


def linear(state: State, prefix: str, names: dict[str, str]) -> Flat:
    """Feed-forward matrices, stored [out, in], with any biases: our name by theirs."""
    flat = {}
    for theirs, ours in names.items():
        flat[f'feed_forward/{ours}'] = state[f'{prefix}{theirs}.weight'].T
        if f'{prefix}{theirs}.bias' in state:
            flat[f'feed_forward/{ours}_bias'] = state[f'{prefix}{theirs}.bias']
    return flat


def llama_like(state: State, config: DecoderConfig, layer_norms: dict[str, str]) -> dict[str, Any]:
    """Llama and the many that keep its names."""
    layers = []
    for i in range(L):
        prefix = f'model.layers.{i}.'
        flat = projections(state, f'{prefix}self_attn') | norms(state, prefix, layer_norms)
        names = {'gate_proj': 'gate', 'up_proj': 'up', 'down_proj': 'down'}
        present = {theirs: ours for theirs, ours in names.items() if f'{prefix}mlp.{theirs}.weight' in state}
        layers.append(flat | linear(state, f'{prefix}mlp.', present))
    rest = {'embedding/table': state['model.embed_tokens.weight']} | norms(state, 'model.', {'norm': 'final_norm'})
    if not config.tied_embeddings:
        rest['head/kernel'] = state['lm_head.weight'].T
    return stack(config, layers, rest)


PRE = {'input_layernorm': 'mixer_norm', 'post_attention_layernorm': 'feed_forward_norm'}
SIZES = {'vocab_size': V, 'hidden_size': D, 'num_hidden_layers': L, 'num_attention_heads': H}
LLAMA_SIZES = SIZES | {'num_key_value_heads': G, 'head_dim': K, 'intermediate_size': F, 'tie_word_embeddings': False}


def layer(mixer: dict[str, Any], feed_forward: FeedForwardConfig | None = None, **changes: Any) -> LayerConfig:
    mixer = {'num_heads': H, 'num_kv_heads': G, 'head_dim': K} | mixer
    return LayerConfig(AttentionConfig(**mixer), feed_forward or FeedForwardConfig(F), **changes)


def nemotron() -> tuple:
    from transformers import NemotronConfig, NemotronForCausalLM

    norm = NormConfig('layer', 1e-5, bias=True, unit_offset=True)
    mixer = {'rotary_fraction': 0.5, 'rotary_base': 10_000.0}
    config = DecoderConfig(V, D, L, (layer(mixer, FeedForwardConfig(F, 'relu_squared'), norm=norm),), norm)
    rope = {'rope_type': 'default', 'rope_theta': 10_000.0, 'partial_rotary_factor': 0.5}
    oracle = NemotronForCausalLM(NemotronConfig(**LLAMA_SIZES, norm_eps=1e-5, rope_parameters=rope))
    return oracle, config, lambda state: llama_like(state, config, PRE)


def falcon() -> tuple:
    """Parallel branches that share a norm, multi-query attention."""
    from transformers import FalconConfig, FalconForCausalLM

    oracle = FalconForCausalLM(
        FalconConfig(
            **SIZES,
            ffn_hidden_size=F,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            alibi=False,
        )
    )
    feed_forward = FeedForwardConfig(F, 'gelu')
    pattern = (layer({'num_kv_heads': 1}, feed_forward, norm=LAYER_NORM, parallel=True),)
    config = DecoderConfig(V, D, L, pattern, LAYER_NORM, tied_embeddings=True)

    def convert(state: State) -> dict[str, Any]:
        layers = []
        for i in range(L):
            prefix = f'transformer.h.{i}.'
            query, key, value = np.split(state[f'{prefix}self_attention.query_key_value.weight'], (H * K, H * K + K))
            split = {'a.q_proj.weight': query, 'a.k_proj.weight': key, 'a.v_proj.weight': value}
            split['a.dense.weight'] = state[f'{prefix}self_attention.dense.weight']
            layers.append(
                projections(split, 'a', 'dense')
                | norms(state, prefix, {'input_layernorm': 'mixer_norm'})
                | linear(state, f'{prefix}mlp.', {'dense_h_to_4h': 'up', 'dense_4h_to_h': 'down'})
            )
        rest = {'embedding/table': state['transformer.word_embeddings.weight']}
        return stack(config, layers, rest | norms(state, 'transformer.', {'ln_f': 'final_norm'}))

    return oracle, config, convert


def mpt() -> tuple:
    """ALiBi, with six heads: no power of two."""
    from transformers import MptConfig, MptForCausalLM

    heads, width = 6, 48
    oracle = MptForCausalLM(
        MptConfig(vocab_size=V, d_model=width, n_layers=L, n_heads=heads, expansion_ratio=4, max_seq_len=S)
    )
    norm = NormConfig('layer', 1e-5)
    mixer = {'num_heads': heads, 'num_kv_heads': heads, 'head_dim': K}
    pattern = (layer(mixer, FeedForwardConfig(4 * width, 'gelu'), norm=norm),)
    config = DecoderConfig(V, width, L, pattern, norm, position='alibi', tied_embeddings=True)

    def convert(state: State) -> dict[str, Any]:
        layers = []
        for i in range(L):
            prefix = f'transformer.blocks.{i}.'
            whole = state[f'{prefix}attn.Wqkv.weight'].T.reshape(width, 3, heads, K)
            flat = {f'mixer/{name}': whole[:, j] for j, name in enumerate(('query', 'key', 'value'))}
            flat['mixer/output'] = state[f'{prefix}attn.out_proj.weight'].T.reshape(heads, K, width)
            layers.append(
                flat
                | norms(state, prefix, {'norm_1': 'mixer_norm', 'norm_2': 'feed_forward_norm'})
                | linear(state, f'{prefix}ffn.', {'up_proj': 'up', 'down_proj': 'down'})
            )
        rest = {'embedding/table': state['transformer.wte.weight']}
        return stack(config, layers, rest | norms(state, 'transformer.', {'norm_f': 'final_norm'}))

    return oracle, config, convert


def gpt1() -> tuple:
    """Norms after the branches, learned positions."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    oracle = OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=V, n_positions=S, n_embd=D, n_layer=L, n_head=H, afn='gelu')
    )
    mixer = {'num_kv_heads': H, 'qkv_bias': True, 'output_bias': True}
    feed_forward = FeedForwardConfig(4 * D, 'gelu_tanh', bias=True)
    pattern = (layer(mixer, feed_forward, norm=LAYER_NORM, norm_position='post'),)
    config = DecoderConfig(V, D, L, pattern, None, position='learned', max_positions=S, tied_embeddings=True)

    def convert(state: State) -> dict[str, Any]:
        layers = [gpt2_layer(state, f'transformer.h.{i}', H) for i in range(L)]
        rest = {
            'embedding/table': state['transformer.tokens_embed.weight'],
            'positions/table': state['transformer.positions_embed.weight'],
        }
        return stack(config, layers, rest)

    return oracle, config, convert


@pytest.mark.parametrize(
    'architecture',
    [nemotron, falcon, mpt, gpt1],
    ids=lambda f: f.__name__,
)
def test_logits_equal_transformers(architecture: Callable[[], tuple]):
    import torch

    torch.manual_seed(0)
    oracle, config, convert = architecture()
    inputs = np.random.default_rng(0).integers(0, V, (2, S))
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        expected = oracle.eval()(torch.from_numpy(inputs)).logits.numpy()
    state = {name: tensor.detach().numpy() for name, tensor in oracle.state_dict().items()}
    logits = run(config, convert(state), inputs.astype(np.int32))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
