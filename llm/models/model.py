"""Every kind of model that can be trained, and what its config and its module have in common.

A config says `vocab_size`, `d_model`, `compute_dtype`, `initialization` and `mup_base_width`; the `pattern` of its
layers; `batch_kind`, what its batches hold; `longest`, the longest row; it builds the module with `build()`, and gives
itself `at_width(d_model)`. A module has `hidden(**arrays of a batch, dropout_key=, token_index=)` and `projection()`,
which makes logits of that: what a loss is computed from.
"""

from llm.models.decoder import Decoder, DecoderConfig
from llm.models.encoder import Encoder, EncoderConfig
from llm.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from llm.models.layer import LayerConfig

ModelConfig = DecoderConfig | EncoderConfig | EncoderDecoderConfig
Model = Decoder | Encoder | EncoderDecoder


def layers_of(config: ModelConfig) -> tuple[LayerConfig, ...]:
    """Every layer of a model: those of the encoder first, those of multi-token prediction last."""
    if isinstance(config, DecoderConfig):
        return config.layers + config.further_layers
    stacks = (config.encoder, config.decoder) if isinstance(config, EncoderDecoderConfig) else (config.layers,)
    return tuple(stack.layer(index) for stack in stacks for index in range(stack.num_layers))
