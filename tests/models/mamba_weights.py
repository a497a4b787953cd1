"""Weights of transformers' Mamba layers as our parameters, flat by path below a layer."""

import numpy as np

from llm.models.mamba2 import Mamba2Config

State = dict[str, np.ndarray]
Flat = dict[str, np.ndarray]


def mamba(state: State, prefix: str) -> Flat:
    """A mixer of MambaForCausalLM or JambaForCausalLM."""
    inner, gate = np.split(state[f'{prefix}in_proj.weight'].T, 2, axis=1)
    rank, size = state[f'{prefix}dt_proj.weight'].shape[1], state[f'{prefix}A_log'].shape[1]
    down, b, c = np.split(state[f'{prefix}x_proj.weight'].T, (rank, rank + size), axis=1)
    flat = {
        'input': inner,
        'gate': gate,
        'dt_down': down,
        'b': b,
        'c': c,
        'convolution': state[f'{prefix}conv1d.weight'][:, 0].T,
        'convolution_bias': state[f'{prefix}conv1d.bias'],
        'dt_up': state[f'{prefix}dt_proj.weight'].T,
        'dt_bias': state[f'{prefix}dt_proj.bias'],
        'a_log': state[f'{prefix}A_log'],
        'skip': state[f'{prefix}D'],
        'output': state[f'{prefix}out_proj.weight'].T,
    }
    for name in ('dt', 'b', 'c'):
        if f'{prefix}{name}_layernorm.weight' in state:
            flat[f'{name}_norm/scale'] = state[f'{prefix}{name}_layernorm.weight']
    return {f'mixer/{name}': value for name, value in flat.items()}


def mamba2(state: State, prefix: str, config: Mamba2Config) -> Flat:
    """A mixer of Mamba2ForCausalLM, whose projections and convolutions lie in one matrix each."""
    heads, groups = (config.num_heads, config.head_dim), (config.num_groups, config.state_size)
    f, n = np.prod(heads), np.prod(groups)
    gate, inner, b, c, dt = np.split(state[f'{prefix}in_proj.weight'].T, np.cumsum([f, f, n, n]), axis=1)
    weights = np.split(state[f'{prefix}conv1d.weight'][:, 0].T, (f, f + n), axis=1)
    biases = np.split(state[f'{prefix}conv1d.bias'], (f, f + n))
    flat = {
        'gate': gate.reshape(-1, *heads),
        'input': inner.reshape(-1, *heads),
        'b': b.reshape(-1, *groups),
        'c': c.reshape(-1, *groups),
        'dt': dt,
        'dt_bias': state[f'{prefix}dt_bias'],
        'a_log': state[f'{prefix}A_log'],
        'skip': state[f'{prefix}D'],
        'norm_scale': state[f'{prefix}norm.weight'].reshape(heads),
        'output': state[f'{prefix}out_proj.weight'].T.reshape(*heads, -1),
    }
    for name, shape, weight, bias in zip(('input', 'b', 'c'), (heads, groups, groups), weights, biases, strict=True):
        flat[f'{name}_convolution'] = weight.reshape(-1, *shape)
        flat[f'{name}_convolution_bias'] = bias.reshape(shape)
    return {f'mixer/{name}': value for name, value in flat.items()}
