"""Which models GGUF files hold: for each architecture, its keys, by way of a Hugging Face family.

A key of the metadata says what a setting of config.json says, so the family that reads and writes config.json knows
what it means; only names are translated here. Sources: llama.cpp's `constants.py`, `conversion/` and `src/models/`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llm.errors import UserError
from llm.interop.gguf import tables
from llm.interop.gguf.rotary import START, plain, read_scaling, write_scaling
from llm.interop.huggingface.families import FAMILIES
from llm.interop.huggingface.family import Family
from llm.interop.huggingface.jamba import period
from llm.interop.loading import Tensor
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig

# Say nothing that changes logits, or what tensors say as well.
_HARMLESS = {'vocab_size', 'attention.value_length', 'tensor_data_layout', 'context_length'}
_ROTATED = 'rope.dimension_count'
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One kind of model that general.architecture names.

    Attributes:
        name.
        model_type: of the family that has the same models.
        table: see llm.interop.gguf.tables.
        keys: key, without the architecture -> setting of config.json.
        constants: settings that every such model has.
        fixed: keys that every file has with this value, or not at all.
        tied: whether llama.cpp runs such models with tied embeddings.
        factors: whether it divides their frequencies by tensors of factors.
        fraction: setting of the part of a head that is rotated; '' where all of it is.
        written: more keys, of the settings: for llama.cpp, which wants what others say as well, or by layer.
        derived: settings that follow from keys, settings so far and tensors.
        own_keys: that `written` gives and `derived` takes.
    """

    name: str
    model_type: str
    table: tuple[Row, ...]
    keys: Mapping[str, str]
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tied: bool = True
    factors: bool = False
    fraction: str = ''
    written: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    derived: Callable[[dict[str, Any], Settings, Mapping[str, Tensor]], Settings] = lambda keys, settings, tensors: {}
    own_keys: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """Of Hugging Face models."""
        return FAMILIES[self.model_type]

    def rows(self, config: DecoderConfig) -> tuple[Row, ...]:
        """The table for a model: `groups` is a number there."""
        groups = str(getattr(config.layer(0).mixer, 'num_groups', 1))
        return tuple(dataclasses.replace(row, axes=row.axes.replace('groups', groups)) for row in self.table)

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether a file of this name is of this kind: some names are those of models with and without experts."""
        return ('expert_count' in self.keys) == bool(metadata.get(f'{self.name}.expert_count'))

    def settings(self, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Settings:
        """The config.json that says what the metadata say.

        Raises:
            UserError: a key is unknown, or has a value that is not supported.
        """
        start = f'{self.name}.'
        given = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
        settings: Settings = {'model_type': self.model_type, **self.constants}
        embedding = tensors.get('token_embd.weight')
        if embedding is not None:
            settings['vocab_size'] = embedding.shape[0]
        settings['tie_word_embeddings'] = 'output.weight' not in tensors
        scaling = {key.removeprefix(START): given.pop(key) for key in [*given] if key.startswith(START)}
        for key, value in given.items():
            if key in self.keys:
                settings[self.keys[key]] = _one(value, key, where)
            elif key in self.fixed:
                if plain(value) != self.fixed[key]:
                    raise UserError(f'{start}{key} is {value!r:.40}, not {self.fixed[key]}', where=where, fix=_FIX)
            elif key not in _HARMLESS and key not in self.own_keys and key != _ROTATED:
                raise UserError(f'the key {start}{key} ({value!r:.40}) is unknown', where=where, fix=_FIX)
        try:
            settings |= self.derived(given, settings, tensors)
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise UserError(f'its keys do not say what a {self.name} needs ({error})', where=where, fix=_FIX) from error
        rotated = given.get(_ROTATED)
        if (rotated is not None or scaling) and settings.get(self.keys.get('attention.head_count', '')):
            self._read_rotation(settings, given, scaling, tensors, where)
        return settings

    def _read_rotation(
        self,
        settings: Settings,
        given: Mapping[str, Any],
        scaling: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        where: str,
    ) -> None:
        """Put into the settings what keys say of rotation."""
        heads, width = (settings.get(self.keys[key]) for key in ('attention.head_count', 'embedding_length'))
        size = settings.get('qk_rope_head_dim', settings.get('head_dim'))
        if size is None and isinstance(heads, int) and isinstance(width, int):
            size = width // heads
        rotated = given.get(_ROTATED, size)
        if type(size) is not int or type(rotated) is not int or not 0 < rotated <= size:
            raise UserError(f'{self.name}.{_ROTATED} is {rotated!r:.40}, and heads have {size}', where=where, fix=_FIX)
        if self.fraction:
            settings[self.fraction] = rotated / size
        elif rotated != size:
            raise UserError(f'{self.name}.{_ROTATED} is {rotated}, not {size}', where=where, fix=_FIX)
        base, length = settings.get(self.keys.get('rope.freq_base', ''), 10_000.0), given.get('context_length')
        if type(length) is int and length > 0 and isinstance(base, float):
            if found := read_scaling(scaling, tensors, length, rotated, base, where):
                settings['rope_scaling'] = found
        elif scaling:
            raise UserError('scales rotation and has no context_length', where=where, fix=_FIX)

    def metadata(self, settings: Settings, config: DecoderConfig, length: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keys and values for a model with these settings of config.json, which say more than keys can; more tensors.

        Raises:
            UserError: llama.cpp does not run such a model.
        """
        if config.tied_embeddings and not self.tied:
            raise UserError(
                f'its embeddings are tied, and llama.cpp has no {self.name} of that kind',
                where='DecoderConfig.tied_embeddings',
                fix='Export it to a Hugging Face directory.',
            )
        found: dict[str, Any] = {'context_length': length, 'vocab_size': config.vocab_size, **self.fixed}
        found |= {key: settings[name] for key, name in self.keys.items() if settings.get(name) is not None}
        found |= self.written(settings)
        tensors: dict[str, Any] = {}
        if config.position == 'rope':
            mixers: list[Any] = [layer.mixer for layer in config.layers]
            # Where layers differ, those that see all before them are scaled.
            mixer = next((each for each in mixers if each.window is None), mixers[0])
            scaling = mixer.rotary.scaling
            if scaling.kind == 'longrope':
                found['context_length'] = round(scaling.original_length * scaling.factor)
            found[_ROTATED] = mixer.rotary.size
            found.setdefault('attention.value_length', mixer.value_dim)
            over = (settings.get('rope_scaling') or {}).get('mscale_all_dim')
            keys, tensors = write_scaling(mixer.rotary, length, factors=self.factors, over=over)
            found |= keys
        return {f'{self.name}.{key}': value for key, value in found.items()}, tensors


_FIX = 'This model cannot be converted as it is.'


def _one(value: Any, key: str, where: str) -> Any:
    """Numbers that a list gives for each layer, where all are equal."""
    if isinstance(value, list):
        if not value or any(each != value[0] for each in value):
            raise UserError(f'the key {key} differs from layer to layer', where=where, fix='Not supported.')
        return value[0]
    return plain(value)


_BLOCKS = {
    'block_count': 'num_hidden_layers',
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
}
_EPSILON = 'attention.layer_norm_rms_epsilon'
_BY_HEAD = {
    **_BLOCKS,
    'attention.head_count_kv': 'num_key_value_heads',
    _EPSILON: 'rms_norm_eps',
    'rope.freq_base': 'rope_theta',
}
_LLAMA = {**_BY_HEAD, 'attention.key_length': 'head_dim'}
_LAYER_NORM = {key: name for key, name in _BY_HEAD.items() if key != _EPSILON}
_LAYER_NORM_EPSILON = 'attention.layer_norm_epsilon'
_EXPERTS_USED = {'expert_used_count': 'num_experts_per_tok'}
_WINDOW, _PATTERN = 'attention.sliding_window', 'attention.sliding_window_pattern'
_GEMMA = {
    **_LLAMA,
    _WINDOW: 'sliding_window',
    'final_logit_softcapping': 'final_logit_softcapping',
}
_SSM = {
    'block_count': 'num_hidden_layers',
    'embedding_length': 'hidden_size',
    _EPSILON: 'layer_norm_epsilon',
    'ssm.conv_kernel': 'conv_kernel',
    'ssm.state_size': 'state_size',
}
_NO_HEADS = {'feed_forward_length': 0, 'attention.head_count': 0}


def _gemma_scale(layers: int) -> Callable[..., Settings]:
    """llama.cpp tells the 27B, alone in scaling by width / heads, by its layers."""

    def derived(keys: dict[str, Any], settings: Settings, tensors: Mapping[str, Tensor]) -> Settings:
        wide = settings['num_hidden_layers'] == layers
        size = settings['hidden_size'] / settings['num_attention_heads'] if wide else settings.get('head_dim', 256)
        return {'query_pre_attn_scalar': size}

    return derived


def _gemma3(keys: dict[str, Any], settings: Settings, tensors: Mapping[str, Tensor]) -> Settings:
    count, pattern = settings['num_hidden_layers'], keys.get(_PATTERN, 6)
    if type(pattern) is int:
        pattern = [(i + 1) % pattern != 0 for i in range(count)]
    if not settings.get('sliding_window'):
        pattern = [False] * count
    types = ['sliding_attention' if each else 'full_attention' for each in pattern]
    return {'layer_types': types, **_gemma_scale(62)(keys, settings, tensors)}


def _gemma3_pattern(settings: Settings) -> dict[str, Any]:
    local = [each == 'sliding_attention' for each in settings['layer_types']]
    return {_PATTERN: local} if any(local) else {}


def _mamba2_sizes(settings: Settings) -> dict[str, Any]:
    return {
        'ssm.inner_size': settings['num_heads'] * settings['head_dim'],
        'ssm.time_step_rank': settings['num_heads'],
    }


def _jamba_layers(keys: dict[str, Any], settings: Settings, tensors: Mapping[str, Tensor]) -> Settings:
    key_heads, count = keys['attention.head_count_kv'], settings['num_hidden_layers']
    heads = {each for each in key_heads if each}
    if len(key_heads) != count or len(heads) != 1:
        raise KeyError('attention.head_count_kv')
    has_experts = [f'blk.{i}.ffn_gate_inp.weight' in tensors for i in range(count)]
    return {
        'num_key_value_heads': heads.pop(),
        **period('attn', [bool(each) for each in key_heads]),
        **period('expert', has_experts),
    }


def _jamba_heads(settings: Settings) -> dict[str, Any]:
    every, first = settings['attn_layer_period'], settings['attn_layer_offset']
    heads = settings['num_key_value_heads']
    return {
        'attention.head_count_kv': [heads if i % every == first else 0 for i in range(settings['num_hidden_layers'])],
        'ssm.inner_size': settings['mamba_expand'] * settings['hidden_size'],
    }


def _deepseek2_heads(keys: dict[str, Any], settings: Settings, tensors: Mapping[str, Tensor]) -> Settings:
    rotated = keys[_ROTATED]
    return {
        'qk_rope_head_dim': rotated,
        'qk_nope_head_dim': keys['attention.key_length_mla'] - rotated,
        'q_lora_rank': keys.get('attention.q_lora_rank') or None,
    }


def _deepseek2_sizes(settings: Settings) -> dict[str, Any]:
    latent, rotated = settings['kv_lora_rank'], settings['qk_rope_head_dim']
    return {
        'attention.q_lora_rank': settings['q_lora_rank'] or 0,
        'attention.key_length': latent + rotated,
        'attention.value_length': latent,
        'attention.key_length_mla': settings['qk_nope_head_dim'] + rotated,
    }


# When a model is written, the first that can describe it is taken.
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture('llama', 'llama', tables.llama_like(tables.PRE_NORMS, interleaved=True), _LLAMA, factors=True),
    Architecture('qwen2', 'qwen2', tables.llama_like(tables.PRE_NORMS), _LLAMA),
    Architecture('qwen3', 'qwen3', tables.llama_like(tables.PRE_NORMS | tables.QK_NORMS), _LLAMA),
    Architecture(
        'gemma2',
        'gemma2',
        tables.llama_like(tables.PRE_NORMS | tables.OUTPUT_NORMS, offset=1.0),
        {**_GEMMA, 'attn_logit_softcapping': 'attn_logit_softcapping'},
        {'hidden_activation': 'gelu_pytorch_tanh'},
        derived=_gemma_scale(46),
    ),
    Architecture(
        'gemma3',
        'gemma3_text',
        tables.llama_like(tables.PRE_NORMS | tables.OUTPUT_NORMS | tables.QK_NORMS, offset=1.0),
        {**_GEMMA, 'rope.freq_base_swa': 'rope_local_base_freq'},
        {'hidden_activation': 'gelu_pytorch_tanh'},
        derived=_gemma3,
        written=_gemma3_pattern,
        own_keys=(_PATTERN,),
    ),
    Architecture(
        'phi3',
        'phi3',
        tables.PHI3,
        _BY_HEAD,
        factors=True,
        fraction='partial_rotary_factor',
        # llama.cpp passes over the window; 0 tells Phi-4 from others.
        written=lambda settings: {_WINDOW: 0},
        derived=lambda keys, settings, tensors: {'sliding_window': keys.get(_WINDOW) or None},
        own_keys=(_WINDOW,),
    ),
    Architecture(
        'starcoder2',
        'starcoder2',
        tables.llama_like(tables.PRE_NORMS),
        {**_LAYER_NORM, _LAYER_NORM_EPSILON: 'norm_epsilon'},
    ),
    Architecture(
        'stablelm',
        'stablelm',
        tables.STABLELM,
        {
            **_LAYER_NORM,
            _LAYER_NORM_EPSILON: 'layer_norm_eps',
            'use_parallel_residual': 'use_parallel_residual',
        },
        tied=False,
        fraction='partial_rotary_factor',
        derived=lambda keys, settings, tensors: {
            'use_qkv_bias': 'blk.0.attn_q.bias' in tensors,
            'qk_layernorm': 'blk.0.attn_q_norm.weight' in tensors,
        },
    ),
    Architecture(
        'gptneox',
        'gpt_neox',
        tables.FUSED,
        {
            **_BLOCKS,
            _LAYER_NORM_EPSILON: 'layer_norm_eps',
            'use_parallel_residual': 'use_parallel_residual',
            'rope.freq_base': 'rotary_emb_base',
        },
        tied=False,
        fraction='rotary_pct',
    ),
    Architecture(
        'gpt2',
        'gpt2',
        tables.GPT2,
        {
            'block_count': 'n_layer',
            'embedding_length': 'n_embd',
            'feed_forward_length': 'n_inner',
            'attention.head_count': 'n_head',
            _LAYER_NORM_EPSILON: 'layer_norm_epsilon',
            'context_length': 'n_positions',
        },
        {'activation_function': 'gelu_new'},
    ),
    Architecture('olmo2', 'olmo2', tables.OLMO2, _BY_HEAD, tied=False),
    Architecture(
        'llama',
        'mixtral',
        tables.llama_like(tables.PRE_NORMS, interleaved=True),
        {**_LLAMA, **_EXPERTS_USED, 'expert_count': 'num_local_experts'},
        {'sliding_window': None},
        factors=True,
    ),
    Architecture(
        'qwen3moe',
        'qwen3_moe',
        tables.llama_like(tables.PRE_NORMS | tables.QK_NORMS),
        {
            **_LLAMA,
            **_EXPERTS_USED,
            'expert_count': 'num_experts',
            'expert_feed_forward_length': 'moe_intermediate_size',
        },
        {'norm_topk_prob': True},
    ),
    Architecture(
        'olmoe',
        'olmoe',
        tables.OLMOE,
        {**_BY_HEAD, **_EXPERTS_USED, 'expert_count': 'num_experts'},
        tied=False,
    ),
    Architecture(
        'mamba',
        'mamba',
        tables.MAMBA,
        {**_SSM, 'ssm.inner_size': 'intermediate_size', 'ssm.time_step_rank': 'time_step_rank'},
        fixed={**_NO_HEADS, 'ssm.dt_b_c_rms': False},
        # llama.cpp runs no other width.
        derived=lambda keys, settings, tensors: {'intermediate_size': 2 * settings['hidden_size']},
    ),
    Architecture(
        'mamba2',
        'mamba2',
        tables.MAMBA2,
        {**_SSM, 'ssm.group_count': 'n_groups'},
        fixed=_NO_HEADS,
        written=_mamba2_sizes,
        derived=lambda keys, settings, tensors: {
            'num_heads': keys['ssm.time_step_rank'],
            'head_dim': keys['ssm.inner_size'] // keys['ssm.time_step_rank'],
            'expand': keys['ssm.inner_size'] // settings['hidden_size'],
        },
        own_keys=('ssm.inner_size', 'ssm.time_step_rank'),
    ),
    Architecture(
        'jamba',
        'jamba',
        tables.JAMBA,
        {
            **_BLOCKS,
            **_EXPERTS_USED,
            _EPSILON: 'rms_norm_eps',
            'expert_count': 'num_experts',
            'ssm.conv_kernel': 'mamba_d_conv',
            'ssm.state_size': 'mamba_d_state',
            'ssm.time_step_rank': 'mamba_dt_rank',
        },
        written=_jamba_heads,
        derived=_jamba_layers,
        own_keys=('attention.head_count_kv', 'ssm.inner_size'),
    ),
    Architecture(
        'deepseek2',
        'deepseek_v2',
        tables.DEEPSEEK2,
        {
            **_BLOCKS,
            **_EXPERTS_USED,
            'expert_count': 'n_routed_experts',
            'expert_shared_count': 'n_shared_experts',
            'expert_feed_forward_length': 'moe_intermediate_size',
            'expert_weights_scale': 'routed_scaling_factor',
            'leading_dense_block_count': 'first_k_dense_replace',
            'attention.kv_lora_rank': 'kv_lora_rank',
            'attention.value_length_mla': 'v_head_dim',
            'rope.freq_base': 'rope_theta',
        },
        # The norms of latents have an epsilon of their own in the family, and the model's here.
        {'rms_norm_eps': 1e-6},
        {_EPSILON: 1e-6, 'attention.head_count_kv': 1, 'expert_weights_norm': False, 'expert_gating_func': 1},
        written=_deepseek2_sizes,
        derived=_deepseek2_heads,
        own_keys=('attention.q_lora_rank', 'attention.key_length', 'attention.key_length_mla'),
    ),
)
NAMES = tuple(dict.fromkeys(each.name for each in ARCHITECTURES))


def find(metadata: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a file.

    Raises:
        UserError: it is unknown.
    """
    name = metadata.get('general.architecture')
    candidates = [each for each in ARCHITECTURES if each.name == name]
    if not candidates:
        raise UserError(f'general.architecture is {name!r:.40}', where=where, fix=f'Known are {", ".join(NAMES)}.')
    return next((each for each in candidates if each.holds(metadata)), candidates[0])
