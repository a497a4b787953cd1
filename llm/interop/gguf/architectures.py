"""Which models GGUF files hold: for each architecture, its tensors and its keys, by way of a Hugging Face family.

A key of the metadata says what a setting of config.json says, so the family that reads and writes config.json knows
what it means; only names are translated here. Sources: llama.cpp's `constants.py` and `convert_hf_to_gguf.py`.

Llama's queries and keys are stored for rotation of neighbours: a head's halves are interleaved. Gemma's norms are
stored with their 1.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm.errors import UserError
from llm.interop.huggingface.families import FAMILIES
from llm.interop.huggingface.family import Family
from llm.interop.tables import Row
from llm.models.decoder import DecoderConfig

_LAYER = 'blk.{layer}'
# Say nothing that changes logits, or what tensors say as well.
_HARMLESS = {'vocab_size', 'rope.dimension_count', 'attention.value_length', 'tensor_data_layout', 'context_length'}
FREQUENCIES = 'rope_freqs.weight'


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One value of general.architecture.

    Attributes:
        name.
        model_type: of the family that has the same models.
        table: see llm.interop.tables.
        keys: key, without the architecture -> setting of config.json.
        constants: settings that every such model has.
    """

    name: str
    model_type: str
    table: tuple[Row, ...]
    keys: Mapping[str, str]
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def family(self) -> Family:
        """Of Hugging Face models."""
        return FAMILIES[self.model_type]

    def settings(self, metadata: Mapping[str, Any], tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The config.json that says what the metadata say.

        Raises:
            UserError: a key is unknown, or has a value that is not supported.
        """
        start = f'{self.name}.'
        given = {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}
        settings: dict[str, Any] = {'model_type': self.model_type, **self.constants}
        embedding = tensors.get('token_embd.weight')
        if embedding is not None:
            settings['vocab_size'] = embedding.shape[0]
        settings['tie_word_embeddings'] = 'output.weight' not in tensors
        scaling = {key.removeprefix('rope.scaling.'): given.pop(key) for key in [*given] if 'rope.scaling.' in key}
        for key, value in given.items():
            if key in self.keys:
                settings[self.keys[key]] = _plain(value, key, where)
            elif key not in _HARMLESS:
                raise UserError(
                    f'the key {start}{key} ({value!r:.40}) is unknown',
                    where=where,
                    fix='This model cannot be converted as it is.',
                )
        size = settings.get('head_dim')
        heads, width = settings.get('num_attention_heads'), settings.get('hidden_size')
        if size is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
            size = width // heads
        for key in ('rope.dimension_count', 'attention.value_length'):
            if given.get(key, size) != size and self.name != 'gpt2':
                raise UserError(f'{start}{key} is {given[key]!r:.40}, not {size}', where=where, fix='Not supported.')
        if rope := _read_scaling(scaling, tensors, given.get('context_length'), where):
            settings['rope_scaling'] = rope
        return settings

    def metadata(self, settings: Mapping[str, Any], config: DecoderConfig, length: int) -> dict[str, Any]:
        """Keys and values for a model with these settings of config.json, which say more than keys can."""
        found: dict[str, Any] = {'context_length': length, 'vocab_size': config.vocab_size}
        found |= {key: settings[name] for key, name in self.keys.items() if settings.get(name) is not None}
        mixer: Any = config.pattern[0].mixer
        if mixer.rotary.size:
            found |= {'rope.dimension_count': mixer.rotary.size, 'attention.value_length': mixer.head_dim}
        rope = settings.get('rope_scaling')
        if rope is not None and rope['rope_type'] == 'linear':
            found |= {'rope.scaling.type': 'linear', 'rope.scaling.factor': rope['factor']}
        return {f'{self.name}.{key}': value for key, value in found.items()}


def _read_scaling(
    scaling: dict[str, Any], tensors: Mapping[str, Any], length: Any, where: str
) -> dict[str, Any] | None:
    kind = scaling.get('type', 'none')
    if FREQUENCIES in tensors:
        # What Llama 3.1 computes from five numbers, as a factor for each frequency.
        if kind not in ('none', 'linear') or scaling.get('factor', 1.0) != 1.0 or type(length) is not int:
            raise UserError(f'has {FREQUENCIES} and scaling {scaling!r:.60}', where=where, fix='Not supported.')
        factors = [float(each) for each in tensors[FREQUENCIES].read()]
        both = {'short_factor': factors, 'long_factor': factors, 'attention_factor': 1.0, 'factor': 1.0}
        return {'rope_type': 'longrope', **both, 'original_max_position_embeddings': length}
    if kind == 'none':
        return None
    if kind != 'linear' or set(scaling) - {'type', 'factor', 'finetuned', 'original_context_length'}:
        raise UserError(f'rope.scaling is {scaling!r:.80}', where=where, fix="Only 'linear' is supported.")
    return {'rope_type': 'linear', 'factor': scaling.get('factor', 1.0)}


def _plain(value: Any, key: str, where: str) -> Any:
    """Numbers that a list gives for each layer, where all are equal."""
    if isinstance(value, list):
        if not value or any(each != value[0] for each in value):
            raise UserError(f'the key {key} differs from layer to layer', where=where, fix='Not supported.')
        return value[0]
    # fp32, of numbers that were written down in decimal: 1e-05, not 9.999999747378752e-06.
    return float(f'{value:.7g}') if isinstance(value, float) else value


def _rows(names: Mapping[str, str], axes: str = '', bias: str = '', offset: float = 0.0) -> tuple[Row, ...]:
    return tuple(
        row
        for ours, theirs in names.items()
        for row in (
            Row(ours, f'{theirs}.weight', axes, offset),
            Row(f'{ours}_bias', f'{theirs}.bias', bias),
        )
    )


def _norms(names: Mapping[str, str], offset: float = 0.0) -> tuple[Row, ...]:
    return tuple(
        row
        for ours, theirs in names.items()
        for row in (Row(f'{ours}/scale', f'{theirs}.weight', '', offset), Row(f'{ours}/bias', f'{theirs}.bias'))
    )


def _llama_like(norms: Mapping[str, str], *, interleaved: bool = False, offset: float = 0.0) -> tuple[Row, ...]:
    """Tensors with Llama's names."""
    size, ours = ('k 2', '(2 k)') if interleaved else ('K', 'K')
    return (
        Row('embedding/table', 'token_embd.weight'),
        Row('head/kernel', 'output.weight', 'V D -> D V'),
        *_rows({'mixer/query': f'{_LAYER}.attn_q'}, f'(H {size}) D -> D H {ours}', f'(H {size}) -> H {ours}'),
        *_rows({'mixer/key': f'{_LAYER}.attn_k'}, f'(G {size}) D -> D G {ours}', f'(G {size}) -> G {ours}'),
        *_rows({'mixer/value': f'{_LAYER}.attn_v'}, '(G K) D -> D G K', '(G K) -> G K'),
        *_rows({'mixer/output': f'{_LAYER}.attn_output'}, 'D (H K) -> H K D'),
        *_rows({'feed_forward/gate': f'{_LAYER}.ffn_gate', 'feed_forward/up': f'{_LAYER}.ffn_up'}, 'F D -> D F'),
        *_rows({'feed_forward/down': f'{_LAYER}.ffn_down'}, 'D F -> F D'),
        *_norms(
            {'final_norm': 'output_norm', **{name: f'{_LAYER}.{theirs}' for name, theirs in norms.items()}}, offset
        ),
    )


_PRE_NORMS = {'mixer_norm': 'attn_norm', 'feed_forward_norm': 'ffn_norm'}
_QK_NORMS = {'mixer/query_norm': 'attn_q_norm', 'mixer/key_norm': 'attn_k_norm'}
_SANDWICH = {'mixer_output_norm': 'post_attention_norm', 'feed_forward_output_norm': 'post_ffw_norm'}
_QKV = ('mixer/query', 'mixer/key', 'mixer/value')
_LLAMA_KEYS = {
    'block_count': 'num_hidden_layers',
    'embedding_length': 'hidden_size',
    'feed_forward_length': 'intermediate_size',
    'attention.head_count': 'num_attention_heads',
    'attention.head_count_kv': 'num_key_value_heads',
    'attention.key_length': 'head_dim',
    'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
    'rope.freq_base': 'rope_theta',
}
_GEMMA2_KEYS = {
    **_LLAMA_KEYS,
    'attention.sliding_window': 'sliding_window',
    'attn_logit_softcapping': 'attn_logit_softcapping',
    'final_logit_softcapping': 'final_logit_softcapping',
}
_GPT2_KEYS = {
    'block_count': 'n_layer',
    'embedding_length': 'n_embd',
    'feed_forward_length': 'n_inner',
    'attention.head_count': 'n_head',
    'attention.layer_norm_epsilon': 'layer_norm_epsilon',
    'context_length': 'n_positions',
}
_GPT2_TABLE = (
    Row('embedding/table', 'token_embd.weight'),
    Row('positions/table', 'position_embd.weight'),
    Row('head/kernel', 'output.weight', 'V D -> D V'),
    Row(_QKV, f'{_LAYER}.attn_qkv.weight', '(* H K) D -> D H K'),
    Row(tuple(f'{name}_bias' for name in _QKV), f'{_LAYER}.attn_qkv.bias', '(* H K) -> H K'),
    *_rows({'mixer/output': f'{_LAYER}.attn_output'}, 'D (H K) -> H K D'),
    *_rows({'feed_forward/up': f'{_LAYER}.ffn_up'}, 'F D -> D F'),
    *_rows({'feed_forward/down': f'{_LAYER}.ffn_down'}, 'D F -> F D'),
    *_norms({'final_norm': 'output_norm', 'mixer_norm': f'{_LAYER}.attn_norm'}),
    *_norms({'feed_forward_norm': f'{_LAYER}.ffn_norm'}),
)

# When a model is written, the first that can describe it is taken.
ARCHITECTURES: dict[str, Architecture] = {
    each.name: each
    for each in (
        Architecture('llama', 'llama', _llama_like(_PRE_NORMS, interleaved=True), _LLAMA_KEYS),
        Architecture('qwen2', 'qwen2', _llama_like(_PRE_NORMS), _LLAMA_KEYS),
        Architecture('qwen3', 'qwen3', _llama_like(_PRE_NORMS | _QK_NORMS), _LLAMA_KEYS),
        Architecture(
            'gemma2',
            'gemma2',
            _llama_like(_PRE_NORMS | _SANDWICH, offset=1.0),
            _GEMMA2_KEYS,
            {'hidden_activation': 'gelu_pytorch_tanh'},
        ),
        Architecture('gpt2', 'gpt2', _GPT2_TABLE, _GPT2_KEYS, {'activation_function': 'gelu_new'}),
    )
}
