"""SmolLM 3: Llama, but every fourth layer does without rotation. (SmolLM 1 and 2 are of the type llama.)"""

from typing import Any

from llm.interop.huggingface import llama
from llm.interop.huggingface.family import Family, all_equal
from llm.interop.huggingface.rope import read_rope
from llm.interop.huggingface.settings import Settings
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig


def _read(settings: Settings) -> DecoderConfig:
    num_layers = settings.take('num_hidden_layers', int)
    interval = settings.take('no_rope_layer_interval', int, 4)
    rotated = settings.raw('no_rope_layers')
    if rotated is None:
        rotated = [int((i + 1) % max(interval, 1) != 0) for i in range(num_layers)]
    if not isinstance(rotated, list) or len(rotated) != num_layers or not all(each in (0, 1) for each in rotated):
        raise settings.unsupported('no_rope_layers', f'needs a 0 or 1 for each of {num_layers} layers')
    window = settings.optional('sliding_window', int)
    slides = settings.take('use_sliding_window', bool, False)
    settings.pass_over('max_window_layers', 'pretraining_tp')
    bias = settings.take('attention_bias', bool, False)
    feed_forward = FeedForwardConfig(
        settings.take('intermediate_size', int),
        settings.choose('hidden_act', llama.GATES, 'silu'),
        settings.take('mlp_bias', bool, False),
    )
    mixer = read_rope(settings, base=2_000_000.0) | {'qkv_bias': bias, 'output_bias': bias}
    return llama.read(
        settings,
        mixer,
        feed_forward=feed_forward,
        windows=llama.sliding(settings, num_layers, window if slides else None, [not each for each in rotated]),
        change=lambda i: {} if rotated[i] else {'rotary_fraction': 0.0},
        tied=True,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    types = llama.layer_types(config)
    layers = [config.layer(i) for i in range(config.num_layers)]
    feed_forward = all_equal(config, lambda layer: layer.feed_forward)
    return {
        **llama.write(config),
        **types,
        'use_sliding_window': types['sliding_window'] is not None,
        'no_rope_layers': [int(layer.attention.rotary.size > 0) for layer in layers],
        'attention_bias': layers[0].attention.qkv_bias,
        'mlp_bias': feed_forward.bias,
    }


SMOLLM3 = Family('smollm3', 'SmolLM3ForCausalLM', llama.TABLE, _read, _write)
