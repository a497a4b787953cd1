"""Mamba (Gu and Dao 2023) and Mamba-2 (Dao and Gu 2024; Codestral Mamba is one): mixers alone, without positions."""

import math
from typing import Any

from llm.interop.huggingface.family import Family, all_equal, norm_rows
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig
from llm.models.layer import LayerConfig, MixerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.normalization import NormConfig

_LAYER = 'backbone.layers.{layer}'
_AROUND = (
    Row('embedding/table', 'backbone.embeddings.weight'),
    *norm_rows({'mixer_norm': f'{_LAYER}.norm', 'final_norm': 'backbone.norm_f'}),
    Row('head/kernel', 'lm_head.weight', 'V D -> D V'),
)
# How steps are drawn at the start, and what chooses a kernel or a precision.
_HARMLESS = (
    *('time_step_min', 'time_step_max', 'time_step_floor', 'time_step_scale', 'time_step_init_scheme'),
    *('rescale_prenorm_residual', 'residual_in_fp32', 'fused_add_norm', 'use_mambapy', 'use_associative_scan'),
    *('use_mamba_kernels', 'chunk_size'),
)
# Of the original repositories, which transformers does not look at.
_UNREAD = ('d_model', 'd_inner', 'n_layer', 'ssm_cfg', 'pad_vocab_size_multiple', 'norm_before_gate')


def mixer_rows(theirs: str) -> tuple[Row, ...]:
    """A Mamba layer of that name."""
    return (
        Row(('mixer/input', 'mixer/gate'), f'{theirs}.in_proj.weight', '(* F) D -> D F'),
        Row(('mixer/input_bias', 'mixer/gate_bias'), f'{theirs}.in_proj.bias', '(* F) -> F'),
        Row('mixer/convolution', f'{theirs}.conv1d.weight', 'F 1 W -> W F'),
        Row('mixer/convolution_bias', f'{theirs}.conv1d.bias'),
        Row(('mixer/dt_down', 'mixer/b', 'mixer/c'), f'{theirs}.x_proj.weight', '(* N) F -> F N'),
        Row('mixer/dt_up', f'{theirs}.dt_proj.weight', 'F R -> R F'),
        Row('mixer/dt_bias', f'{theirs}.dt_proj.bias'),
        Row('mixer/a_log', f'{theirs}.A_log'),
        Row('mixer/skip', f'{theirs}.D'),
        Row('mixer/output', f'{theirs}.out_proj.weight', 'D F -> F D', beside='mixer/a_log'),
        Row('mixer/output_bias', f'{theirs}.out_proj.bias', beside='mixer/a_log'),
    )


def _parts(*names: str, ending: str = '') -> tuple[str, ...]:
    return tuple(f'mixer/{name}{ending}' for name in names)


_CONVOLVED = ('input', 'b', 'c')
_MIXER = f'{_LAYER}.mixer'
_MAMBA2 = (
    *_AROUND,
    Row(_parts('gate', *_CONVOLVED, 'dt'), f'{_MIXER}.in_proj.weight', '(* ...) D -> D ...'),
    Row(_parts('gate', *_CONVOLVED, 'dt_projection', ending='_bias'), f'{_MIXER}.in_proj.bias', '(* ...) -> ...'),
    Row(_parts(*_CONVOLVED, ending='_convolution'), f'{_MIXER}.conv1d.weight', '(* ...) 1 W -> W ...'),
    Row(_parts(*_CONVOLVED, ending='_convolution_bias'), f'{_MIXER}.conv1d.bias', '(* ...) -> ...'),
    Row('mixer/dt_bias', f'{_MIXER}.dt_bias'),
    Row('mixer/a_log', f'{_MIXER}.A_log'),
    Row('mixer/skip', f'{_MIXER}.D'),
    Row('mixer/norm_scale', f'{_MIXER}.norm.weight', '(H K) -> H K'),
    Row('mixer/output', f'{_MIXER}.out_proj.weight', 'D (H K) -> H K D'),
    Row('mixer/output_bias', f'{_MIXER}.out_proj.bias'),
)


def read_rank(settings: Settings, name: str, width: int) -> int:
    """The rank of the projection to time steps, a number or 'auto'."""
    return math.ceil(width / 16) if settings.raw(name) in (None, 'auto') else settings.take(name, int)


def pass_over(settings: Settings) -> None:
    """Know what says nothing of the model of any of these families."""
    settings.pass_over(*_HARMLESS)


def _read(settings: Settings, mixer: MixerConfig, norm: NormConfig, width: int, **model: Any) -> DecoderConfig:
    pass_over(settings)
    settings.pass_over(*_UNREAD)
    settings.expect(hidden_act='silu', rms_norm=True)
    layer = LayerConfig(mixer, None, norm)
    return DecoderConfig(d_model=width, pattern=(layer,), final_norm=norm, position='none', **model)


def _norm(settings: Settings) -> NormConfig:
    return NormConfig('rms', settings.take('layer_norm_epsilon', float, 1e-5))


def _read_mamba(settings: Settings) -> DecoderConfig:
    width = settings.take('hidden_size', int, 768)
    expanded = settings.take('expand', int, 2) * width
    mixer = MambaConfig(
        settings.take('intermediate_size', int, expanded),
        read_rank(settings, 'time_step_rank', width),
        settings.take('state_size', int, 16),
        settings.take('conv_kernel', int, 4),
        settings.take('use_conv_bias', bool, True),
        settings.take('use_bias', bool, False),
    )
    return _read(
        settings,
        mixer,
        _norm(settings),
        width,
        vocab_size=settings.take('vocab_size', int, 50280),
        num_layers=settings.take('num_hidden_layers', int, 32),
        tied_embeddings=settings.take('tie_word_embeddings', bool, True),
    )


def _read_mamba2(settings: Settings) -> DecoderConfig:
    width, norm = settings.take('hidden_size', int, 4096), _norm(settings)
    mixer = Mamba2Config(
        settings.take('num_heads', int, 128),
        settings.take('head_dim', int, 64),
        settings.take('state_size', int, 128),
        settings.take('n_groups', int, 8),
        settings.take('conv_kernel', int, 4),
        settings.take('use_conv_bias', bool, True),
        settings.take('use_bias', bool, False),
        norm.epsilon,
    )
    size = mixer.num_heads * mixer.head_dim
    if settings.take('expand', int, 2) * width != size:
        raise settings.unsupported('expand', f'{mixer.num_heads} heads of {mixer.head_dim} are not so many widths')
    settings.expect(intermediate_size=size)
    settings.pass_over('time_step_rank')  # of Mamba
    limit = settings.raw('time_step_limit')
    # JSON has no infinity: transformers 5 writes an object.
    if limit is not None and limit not in ([0, math.inf], [0, {'__float__': 'Infinity'}]):
        raise settings.unsupported('time_step_limit', 'only [0, Infinity] is supported')
    return _read(
        settings,
        mixer,
        norm,
        width,
        vocab_size=settings.take('vocab_size', int, 32768),
        num_layers=settings.take('num_hidden_layers', int, 64),
        tied_embeddings=settings.take('tie_word_embeddings', bool, False),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    mixer: Any = all_equal(config, lambda layer: layer.mixer)
    norm = all_equal(config, lambda layer: layer.norm)
    return {
        'vocab_size': config.vocab_size,
        'hidden_size': config.d_model,
        'num_hidden_layers': config.num_layers,
        'state_size': mixer.state_size,
        'conv_kernel': mixer.convolution_width,
        'use_conv_bias': mixer.convolution_bias,
        'use_bias': mixer.bias,
        'layer_norm_epsilon': norm.epsilon,
        'hidden_act': 'silu',
        'tie_word_embeddings': config.tied_embeddings,
    }


def _write_mamba(config: DecoderConfig) -> dict[str, Any]:
    mixer: Any = config.pattern[0].mixer
    # transformers takes the first where both are there.
    sizes = {'intermediate_size': mixer.d_inner, 'expand': max(1, mixer.d_inner // config.d_model)}
    return _write(config) | sizes | {'time_step_rank': mixer.dt_rank}


def _write_mamba2(config: DecoderConfig) -> dict[str, Any]:
    mixer: Any = config.pattern[0].mixer
    return _write(config) | {
        'num_heads': mixer.num_heads,
        'head_dim': mixer.head_dim,
        'n_groups': mixer.num_groups,
        'expand': mixer.num_heads * mixer.head_dim // config.d_model,
    }


MAMBA = Family('mamba', 'MambaForCausalLM', (*_AROUND, *mixer_rows(_MIXER)), _read_mamba, _write_mamba, 'backbone.')
MAMBA2 = Family('mamba2', 'Mamba2ForCausalLM', _MAMBA2, _read_mamba2, _write_mamba2, 'backbone.')
