"""What a family of Hugging Face models is to us, and the pieces that many of them share."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from llm.errors import UserError
from llm.interop.huggingface.settings import Settings
from llm.interop.tables import Row
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.initialization import Initialization
from llm.models.layer import LayerConfig, MixerConfig
from llm.models.long_attention import LongAttentionConfig
from llm.models.mamba import MambaConfig
from llm.models.mamba2 import Mamba2Config
from llm.models.model import ModelConfig
from llm.models.moe import MoeConfig
from llm.models.position import RotaryScaling
from llm.models.stack import StackConfig

# Of Longformer: what a row has room for, where settings say nothing of it.
GLOBAL_TOKENS = 64
M = TypeVar('M', bound=ModelConfig)


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
        kind: of our configs.
        other_architectures: classes that can be read besides `architecture` and the model without a head.
        parts: the config as `read` gave it, with the parts outside the layers that the model really has: which is for
            the tensors to say. Takes the config and the paths of our parameters that there are. None: always the same.
        copies: tensors that may be there and then must be equal to another, by names: tied, and saved twice.
        renamed: regular expressions of endings of older names, and what they are now.
    """

    model_type: str
    architecture: str
    table: tuple[Row, ...]
    read: Callable[[Settings], ModelConfig]
    write: Callable[[Any], dict[str, Any]]
    prefix: str = 'model.'
    ignored: tuple[str, ...] = (r'.*\.rotary_emb\.inv_freq',)
    kind: type[ModelConfig] = DecoderConfig
    other_architectures: tuple[str, ...] = ()
    parts: Callable[[Any, Collection[str]], Any] | None = None
    copies: tuple[tuple[str, str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()


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


def described(config: M) -> M:
    """What a config.json can say of a model: not how it is trained and run."""
    changes: dict[str, Any] = {'compute_dtype': 'float32', 'initialization': Initialization()}
    if isinstance(config, DecoderConfig):
        changes |= {
            'pattern': repeating([_described_layer(config.layer(i)) for i in range(config.num_layers)]),
            'leading': (),
            'embedding_dropout': 0.0,
            'scan_layers': True,
            'remat': 'none',
            'remat_names': (),
            'max_positions': config.max_positions if config.position == 'learned' else None,
        }
    elif isinstance(config, EncoderConfig):
        changes |= {'layers': _described_stack(config.layers), 'embedding_dropout': 0.0, 'first_is_global': False}
        changes |= {'max_positions': config.max_positions if config.position == 'learned' else None}
    else:
        changes |= {'encoder': _described_stack(config.encoder), 'decoder': _described_stack(config.decoder)}
        changes |= {'dropout': 0.0}
    return dataclasses.replace(config, **changes)


def _described_stack(stack: StackConfig) -> StackConfig:
    pattern = repeating([_described_layer(stack.layer(i)) for i in range(stack.num_layers)])
    return dataclasses.replace(stack, pattern=pattern, scan_layers=True, remat='none', remat_names=())


def _described_layer(layer: LayerConfig) -> LayerConfig:
    found = dataclasses.replace(layer, dropout=0.0)
    if isinstance(found.feed_forward, MoeConfig):
        found = dataclasses.replace(found, feed_forward=_described_experts(found.feed_forward))
    if found.cross is not None:
        found = dataclasses.replace(found, cross=_described_attention(found.cross))
    return dataclasses.replace(found, mixer=_described_mixer(found.mixer))


def _described_attention(mixer: AttentionConfig) -> AttentionConfig:
    mixer = dataclasses.replace(mixer, implementation='auto', scale=mixer.score_scale, base_head_dim=None)
    if not mixer.rotary.size:
        mixer = dataclasses.replace(mixer, rotary_base=10_000.0, rotary_scaling=RotaryScaling())
    if isinstance(mixer, LongAttentionConfig) and mixer.global_tokens:
        mixer = dataclasses.replace(mixer, global_tokens=GLOBAL_TOKENS)
    return mixer


def _described_mixer(mixer: MixerConfig) -> MixerConfig:
    if isinstance(mixer, MambaConfig | Mamba2Config):
        return dataclasses.replace(mixer, implementation='auto')
    if isinstance(mixer, AttentionConfig):
        return _described_attention(mixer)
    return dataclasses.replace(mixer, implementation='auto', scale=mixer.score_scale)


def _described_experts(moe: MoeConfig) -> MoeConfig:
    router = dataclasses.replace(moe.router, balance_loss=0.0, z_loss=0.0)
    return MoeConfig(moe.num_experts, moe.experts_per_token, moe.expert, moe.shared, moe.shared_gate, router)


def all_equal(config: DecoderConfig | StackConfig, what: Callable[[LayerConfig], Any]) -> Any:
    """What all layers have in common.

    Raises:
        UserError: they do not.
    """
    values = [what(layer) for layer in config.pattern]
    if any(value != values[0] for value in values):
        raise UserError(f'layers differ: {values[0]!r:.60} and others', where=f'{type(config).__name__}.pattern')
    return values[0]
