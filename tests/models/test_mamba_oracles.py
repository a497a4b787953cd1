"""Mamba, Mamba-2 and Jamba against transformers: the stored Mamba reference, and random models."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llm.inference.generation import Generator, Prompt
from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.normalization import NormConfig
from tests.inference.test_generation import GREEDY, MESH, generate
from tests.models.mamba_weights import Flat, State, mamba, mamba2
from tests.models.small_decoders import compiled, run
from tests.models.test_decoder_oracles import stack

pytestmark = pytest.mark.oracle

V, D, S = 61, 32, 20


def backbone(state: State, config: DecoderConfig, mixers: list[Flat]) -> dict[str, Any]:
    """Parameters of a Mamba or Mamba-2 language model from its state dict and its converted mixers."""
    layers = [mixer | {'mixer_norm/scale': state[f'backbone.layers.{i}.norm.weight']} for i, mixer in enumerate(mixers)]
    embedding = 'backbone.embeddings.weight' if 'backbone.embeddings.weight' in state else 'backbone.embedding.weight'
    rest = {'embedding/table': state[embedding], 'final_norm/scale': state['backbone.norm_f.weight']}
    return stack(config, layers, rest)


def gradient_norms(gradients: dict[str, Any], layers: int) -> dict[str, float]:
    """Norm of each gradient under transformers' names of Mamba, in which several of ours are one parameter."""

    def norm(*arrays: jax.Array) -> float:
        return float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays)))

    norms = {
        'backbone.embeddings.weight': norm(gradients['embedding']['table']),
        'backbone.norm_f.weight': norm(gradients['final_norm']['scale']),
    }
    theirs = {
        'A_log': ('a_log',),
        'D': ('skip',),
        'conv1d.weight': ('convolution',),
        'conv1d.bias': ('convolution_bias',),
        'in_proj.weight': ('input', 'gate'),
        'x_proj.weight': ('dt_down', 'b', 'c'),
        'dt_proj.weight': ('dt_up',),
        'dt_proj.bias': ('dt_bias',),
        'out_proj.weight': ('output',),
    }
    for i in range(layers):
        layer = jax.tree.map(lambda g, i=i: g[i], gradients['layers']['0'])
        norms[f'backbone.layers.{i}.norm.weight'] = norm(layer['mixer_norm']['scale'])
        for name, ours in theirs.items():
            norms[f'backbone.layers.{i}.mixer.{name}'] = norm(*(layer['mixer'][each] for each in ours))
    return norms


def test_mamba_logits_loss_and_gradients(dev_data):
    from safetensors.numpy import load_file

    folder = dev_data / 'oracles' / 'mamba1'
    settings = json.loads((folder / 'config.json').read_text())
    reference = np.load(folder / 'ref.npz')
    expected = json.loads((folder / 'ref.json').read_text())
    layers = settings['num_hidden_layers']
    mixer = MambaConfig(settings['intermediate_size'], settings['time_step_rank'], settings['state_size'])
    config = DecoderConfig(
        settings['vocab_size'],
        settings['hidden_size'],
        layers,
        (LayerConfig(mixer, None),),
        position='none',
        tied_embeddings=True,
    )
    state = load_file(folder / 'model.safetensors')
    params = backbone(state, config, [mamba(state, f'backbone.layers.{i}.mixer.') for i in range(layers)])
    inputs = reference['input_ids'].astype(np.int32)
    graph, _ = nnx.split(Decoder(config))

    def loss(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graph, params)(inputs)
        likelihoods = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), inputs[:, 1:, None], axis=-1)
        return -likelihoods.mean(), logits

    (value, logits), gradients = compiled(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.abs(logits - reference['logits']).max() <= 1e-4 * np.abs(reference['logits']).max()
    assert float(value) == pytest.approx(expected['loss'], rel=1e-5)
    assert gradient_norms(gradients, layers) == pytest.approx(expected['grad_norms'], rel=1e-4)


def mamba_1() -> tuple:
    from transformers import MambaConfig as Settings
    from transformers import MambaForCausalLM

    oracle = MambaForCausalLM(
        Settings(vocab_size=V, hidden_size=D, num_hidden_layers=3, state_size=8, time_step_rank=3)
    )
    config = DecoderConfig(
        V, D, 3, (LayerConfig(MambaConfig(2 * D, 3, 8), None),), position='none', tied_embeddings=True
    )
    return (
        oracle,
        config,
        lambda state: backbone(state, config, [mamba(state, f'backbone.layers.{i}.mixer.') for i in range(3)]),
    )


def mamba_2() -> tuple:
    """Two groups of b and c, and a length that is no multiple of the chunk."""
    from transformers import Mamba2Config as Settings
    from transformers import Mamba2ForCausalLM

    oracle = Mamba2ForCausalLM(
        Settings(
            vocab_size=V,
            hidden_size=D,
            num_hidden_layers=2,
            state_size=8,
            num_heads=4,
            head_dim=16,
            n_groups=2,
            chunk_size=8,
            tie_word_embeddings=True,
        )
    )
    mixer = Mamba2Config(4, 16, 8, num_groups=2)
    config = DecoderConfig(V, D, 2, (LayerConfig(mixer, None),), position='none', tied_embeddings=True)
    return (
        oracle,
        config,
        lambda state: backbone(state, config, [mamba2(state, f'backbone.layers.{i}.mixer.', mixer) for i in range(2)]),
    )


def jamba() -> tuple:
    """Attention at one layer of four, Mamba with normalised states at the others; every feed-forward layer is dense."""
    from transformers import JambaConfig, JambaForCausalLM

    oracle = JambaForCausalLM(
        JambaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_layer_period=4,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=1,
            num_experts_per_tok=1,
            mamba_d_state=8,
            mamba_dt_rank=3,
            use_mamba_kernels=False,
            tie_word_embeddings=True,
            attn_implementation='eager',
        )
    )
    norm = NormConfig('rms', 1e-6)
    recurrent = LayerConfig(MambaConfig(2 * D, 3, 8, state_norm=norm), FeedForwardConfig(48), norm)
    attention = LayerConfig(AttentionConfig(4, 2, 8), FeedForwardConfig(48), norm)
    pattern = (recurrent, attention, recurrent, recurrent)
    config = DecoderConfig(V, D, 5, pattern, norm, position='none', tied_embeddings=True)

    def convert(state: State) -> dict[str, Any]:
        layers = []
        for i in range(5):
            prefix = f'model.layers.{i}.'
            flat = {
                'mixer_norm/scale': state[f'{prefix}input_layernorm.weight'],
                'feed_forward_norm/scale': state[f'{prefix}pre_ff_layernorm.weight'],
            }
            for name in ('gate', 'up', 'down'):
                flat[f'feed_forward/{name}'] = state[f'{prefix}feed_forward.{name}_proj.weight'].T
            if f'{prefix}mamba.D' in state:
                flat |= mamba(state, f'{prefix}mamba.')
            else:
                for name in ('query', 'key', 'value'):
                    weight = state[f'{prefix}self_attn.{name[0]}_proj.weight']
                    flat[f'mixer/{name}'] = weight.T.reshape(D, -1, 8)
                flat['mixer/output'] = state[f'{prefix}self_attn.o_proj.weight'].T.reshape(-1, 8, D)
            layers.append(flat)
        rest = {
            'embedding/table': state['model.embed_tokens.weight'],
            'final_norm/scale': state['model.final_layernorm.weight'],
        }
        return stack(config, layers, rest)

    return oracle, config, convert


@pytest.mark.parametrize('make', [mamba_1, mamba_2, jamba], ids=lambda make: make.__name__)
def test_logits_and_greedy_tokens_are_those_of_transformers(make):
    import torch

    torch.manual_seed(0)
    oracle, config, convert = make()
    oracle.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.ndim == 1 or 'A_log' in name else 0.2 * noise)
    params = convert({name: x.detach().numpy() for name, x in oracle.state_dict().items()})
    inputs = np.random.default_rng(0).integers(1, V, (2, S))
    with torch.no_grad():
        expected = oracle(torch.tensor(inputs)).logits.numpy()
    logits = run(config, params, inputs.astype(np.int32))
    assert np.abs(logits - expected).max() <= 2e-5 * np.abs(expected).max()

    new = 12
    oracle.generation_config.eos_token_id = None
    with torch.no_grad():
        whole = oracle.generate(torch.tensor(inputs), max_new_tokens=new, do_sample=False)
    prompts = [Prompt(tuple(row.tolist())) for row in inputs]
    made, _ = generate(Generator(config, GREEDY, MESH), params, prompts, new)
    assert made == whole[:, S:].tolist()
