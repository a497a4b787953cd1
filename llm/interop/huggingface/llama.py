"""Llama (SmolLM 1 and 2 and many others are of this type), and what families share that keep its names."""

from collections.abc import Callable, Sequence
from typing import Any

from llm.interop.huggingface.family import Family, all_equal, norm_rows, repeating
from llm.interop.huggingface.rope import read_rope, write_rope
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import Activation, FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.normalization import NormConfig

LAYER = 'model.layers.{layer}'
GATES: dict[str, Activation] = {
    'silu': 'swiglu',
    'swish': 'swiglu',
    'gelu_pytorch_tanh': 'geglu',
    'gelu_new': 'geglu',
    'gelu': 'geglu_exact',
}


def projection_rows(name: str, theirs: str, weight: str, bias: str) -> tuple[Row, ...]:
    """A projection of attention and its bias."""
    return Row(f'mixer/{name}', f'{theirs}.weight', weight), Row(f'mixer/{name}_bias', f'{theirs}.bias', bias)


def linear_rows(names: dict[str, str]) -> tuple[Row, ...]:
    """Matrices stored [out, in], with biases: our path -> their name."""
    return tuple(
        row
        for ours, theirs in names.items()
        for row in (Row(ours, f'{theirs}.weight', 'F D -> D F'), Row(f'{ours}_bias', f'{theirs}.bias'))
    )


ATTENTION = (
    *projection_rows('query', f'{LAYER}.self_attn.q_proj', '(H K) D -> D H K', '(H K) -> H K'),
    *projection_rows('key', f'{LAYER}.self_attn.k_proj', '(G K) D -> D G K', '(G K) -> G K'),
    *projection_rows('value', f'{LAYER}.self_attn.v_proj', '(G K) D -> D G K', '(G K) -> G K'),
    *projection_rows('output', f'{LAYER}.self_attn.o_proj', 'D (H K) -> H K D', ''),
)
QK_NORM = norm_rows({'mixer/query_norm': f'{LAYER}.self_attn.q_norm', 'mixer/key_norm': f'{LAYER}.self_attn.k_norm'})
FEED_FORWARD = linear_rows(
    {
        'feed_forward/gate': f'{LAYER}.mlp.gate_proj',
        'feed_forward/up': f'{LAYER}.mlp.up_proj',
        'feed_forward/down': f'{LAYER}.mlp.down_proj',
    }
)
PRE_NORMS = norm_rows(
    {'mixer_norm': f'{LAYER}.input_layernorm', 'feed_forward_norm': f'{LAYER}.post_attention_layernorm'}
)
OUTSIDE = (
    Row('embedding/table', 'model.embed_tokens.weight'),
    *norm_rows({'final_norm': 'model.norm'}),
    Row('head/kernel', 'lm_head.weight', 'V D -> D V'),
)
TABLE = (*OUTSIDE, *ATTENTION, *QK_NORM, *FEED_FORWARD, *PRE_NORMS)


def read(
    settings: Settings,
    mixer: dict[str, Any],
    *,
    feed_forward: FeedForwardConfig | None = None,
    norm: NormConfig | None = None,
    windows: Sequence[int | None] | None = None,
    change: Callable[[int], dict[str, Any]] | None = None,
    layer: dict[str, Any] | None = None,
    tied: bool = False,
    **model: Any,
) -> DecoderConfig:
    """A model whose settings have Llama's names.

    Args:
        mixer: fields of AttentionConfig besides sizes; head_dim may be among them.
        feed_forward, norm: unless they are as in Llama.
        windows: of each layer. change: fields of AttentionConfig that differ from layer to layer.
        layer: fields of LayerConfig.
        tied: whether embeddings are, if the file does not say.
        model: fields of DecoderConfig.
    """
    settings.expect(is_encoder_decoder=False, add_cross_attention=False)
    width, num_layers = settings.take('hidden_size', int), settings.take('num_hidden_layers', int)
    heads = settings.take('num_attention_heads', int)
    if 'head_dim' not in mixer:
        size = settings.optional('head_dim', int)
        mixer = {**mixer, 'head_dim': settings.whole_heads(width, heads) if size is None else size}
    mixer['num_heads'] = heads
    mixer['num_kv_heads'] = settings.take('num_key_value_heads', int, heads)
    settings.pass_over('max_position_embeddings')
    norm = norm or NormConfig('rms', settings.take('rms_norm_eps', float, 1e-6))
    feed_forward = feed_forward or FeedForwardConfig(
        settings.take('intermediate_size', int), settings.choose('hidden_act', GATES, 'silu')
    )

    def mixer_of(index: int) -> AttentionConfig:
        own = {} if windows is None else {'window': windows[index]}
        return AttentionConfig(**mixer | own | (change(index) if change else {}))

    layers = [LayerConfig(mixer_of(i), feed_forward, norm, **layer or {}) for i in range(num_layers)]
    return DecoderConfig(
        settings.take('vocab_size', int),
        width,
        num_layers,
        repeating(layers),
        norm,
        tied_embeddings=settings.take('tie_word_embeddings', bool, tied),
        **model,
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The settings that all such models have; those of rotation from the first layer."""
    layer = config.pattern[0]
    mixer: Any = next((each.mixer for each in config.pattern if each.mixer.rotary.size), layer.mixer)
    feed_forward = all_equal(config, lambda layer: layer.feed_forward)
    gates = {ours: theirs for theirs, ours in reversed(GATES.items())}
    scaling = write_rope(mixer)
    longest = mixer.rotary_scaling.original_length or 2048
    if mixer.rotary_scaling.kind not in ('none', 'linear', 'dynamic'):
        longest = round(longest * mixer.rotary_scaling.factor)
    return {
        'vocab_size': config.vocab_size,
        'hidden_size': config.d_model,
        'num_hidden_layers': config.num_layers,
        'num_attention_heads': mixer.num_heads,
        'num_key_value_heads': mixer.num_kv_heads,
        'head_dim': mixer.head_dim,
        'intermediate_size': feed_forward.d_ff,
        'hidden_act': gates.get(feed_forward.activation),
        'rms_norm_eps': layer.norm.epsilon if layer.norm else None,
        'rope_theta': mixer.rotary_base,
        **({'rope_scaling': scaling} if scaling else {}),
        'max_position_embeddings': longest,
        'tie_word_embeddings': config.tied_embeddings,
    }


def sliding(settings: Settings, num_layers: int, window: int | None, default: Sequence[bool]) -> list[int | None]:
    """The window of each layer from `layer_types`, or from `default` where the file has none."""
    kinds = settings.raw('layer_types')
    if kinds is None:
        slides = list(default)
    else:
        known = {'sliding_attention': True, 'full_attention': False}
        if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
            raise settings.unsupported('layer_types', f'need {num_layers} of {", ".join(known)}')
        slides = [known[kind] for kind in kinds]
    return [window if slide else None for slide in slides]


def layer_types(config: DecoderConfig) -> dict[str, Any]:
    """Settings `layer_types` and `sliding_window` for layers with and without one window."""
    windows = [config.layer(i).attention.window for i in range(config.num_layers)]
    return {
        'sliding_window': next((window for window in windows if window is not None), None),
        'layer_types': ['full_attention' if window is None else 'sliding_attention' for window in windows],
    }


def _read_llama(settings: Settings) -> DecoderConfig:
    settings.expect(pretraining_tp=1)
    bias = settings.take('attention_bias', bool, False)
    feed_forward = FeedForwardConfig(
        settings.take('intermediate_size', int),
        settings.choose('hidden_act', GATES, 'silu'),
        settings.take('mlp_bias', bool, False),
    )
    mixer = read_rope(settings) | {'qkv_bias': bias, 'output_bias': bias}
    return read(settings, mixer, feed_forward=feed_forward)


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    layer = config.pattern[0]
    feed_forward = all_equal(config, lambda layer: layer.feed_forward)
    return write(config) | {'attention_bias': layer.attention.qkv_bias, 'mlp_bias': feed_forward.bias}


LLAMA = Family('llama', 'LlamaForCausalLM', TABLE, _read_llama, _write_llama)
