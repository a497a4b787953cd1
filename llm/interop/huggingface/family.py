"""What a family of Hugging Face models is to us, and the pieces that many of them share."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm.errors import UserError
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.initialization import Initialization
from llm.models.layer import LayerConfig, MixerConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.moe import MoeConfig
from llm.models.position import RotaryScaling


@dataclasses.dataclass(frozen=True)
class Family:
    """One value of `model_type`.

    Attributes:
        model_type: of its config.json.
        architecture: of the language model among its classes, 'LlamaForCausalLM'.
        table: see llm.interop.tables.
        read: its settings -> our config.
        write: our config -> its settings, as far as they can say it: what they cannot, the settings read back show,
            and the model is refused. Never partly right: `write` may assume that all layers are as it needs them.
        prefix: of names that older checkpoints leave out, and of all but the head in a checkpoint without one.
        ignored: regular expressions of names of tensors that may be there and say nothing (masks, inverse frequencies).
    """

    model_type: str
    architecture: str
    table: tuple[Row, ...]
    read: Callable[[Settings], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    prefix: str = 'model.'
    ignored: tuple[str, ...] = (r'.*\.rotary_emb\.inv_freq',)


def norm_rows(names: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows of norms: our path -> their name without '.weight'."""
    return tuple(
        Row(f'{ours}/{part}', f'{theirs}.{theirs_part}')
        for ours, theirs in names.items()
        for part, theirs_part in (('scale', 'weight'), ('bias', 'bias'))
    )


def repeating(layers: Sequence[LayerConfig]) -> tuple[LayerConfig, ...]:
    """The shortest pattern of which the layers are repetitions, the last perhaps cut short."""
    for size in range(1, len(layers) + 1):
        if all(layer == layers[i % size] for i, layer in enumerate(layers)):
            return tuple(layers[:size])
    return tuple(layers)


def described(config: DecoderConfig) -> DecoderConfig:
    """What a config.json can say of a model: not how it is trained and run."""

    def layer(index: int) -> LayerConfig:
        found = dataclasses.replace(config.layer(index), dropout=0.0)
        if isinstance(found.feed_forward, MoeConfig):
            found = dataclasses.replace(found, feed_forward=_described_experts(found.feed_forward))
        return dataclasses.replace(found, mixer=_described_mixer(found.mixer))

    pattern = repeating([layer(i) for i in range(config.num_layers)])
    return dataclasses.replace(
        config,
        pattern=pattern,
        leading=(),
        embedding_dropout=0.0,
        compute_dtype='float32',
        scan_layers=True,
        remat='none',
        remat_names=(),
        initialization=Initialization(),
        max_positions=config.max_positions if config.position == 'learned' else None,
    )


def _described_mixer(mixer: MixerConfig) -> MixerConfig:
    if isinstance(mixer, MambaConfig | Mamba2Config):
        return dataclasses.replace(mixer, implementation='auto')
    mixer = dataclasses.replace(mixer, implementation='auto', scale=mixer.score_scale)
    if isinstance(mixer, AttentionConfig):
        mixer = dataclasses.replace(mixer, base_head_dim=None)
        if not mixer.rotary.size:
            mixer = dataclasses.replace(mixer, rotary_base=10_000.0, rotary_scaling=RotaryScaling())
    return mixer


def _described_experts(moe: MoeConfig) -> MoeConfig:
    router = dataclasses.replace(moe.router, balance_loss=0.0, z_loss=0.0)
    return MoeConfig(moe.num_experts, moe.experts_per_token, moe.expert, moe.shared, moe.shared_gate, router)


def all_equal(config: DecoderConfig, what: Callable[[LayerConfig], Any]) -> Any:
    """What all layers have in common.

    Raises:
        UserError: they do not.
    """
    values = [what(layer) for layer in config.pattern]
    if any(value != values[0] for value in values):
        raise UserError(f'layers differ: {values[0]!r:.60} and others', where='DecoderConfig.pattern')
    return values[0]
