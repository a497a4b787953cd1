"""The stacks of layers of a model, each with what is its own: the tokens that it reads, and what it computes again."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.layer import LayerConfig
from llm.models.model import ModelConfig
from llm.models.remat import RematKind
from llm.models.stack import StackConfig
from llm.scaling.accounting import RowTokens


@dataclasses.dataclass(frozen=True)
class PlannedStack:
    """Layers that read the same tokens.

    Attributes:
        group: where its parameters are in those of the model; None for all of them.
        config: what says how its layers run: pattern, remat, remat_names, scan_layers.
        layers: in the order in which they run.
        tokens: that it reads of a row. memory: of an encoder's output that its layers attend to, and that goes from
            stage to stage of a pipeline beside its own tokens.
        before: how many of the layers, the first ones, come before a pipeline's stages. All of these run them together,
            each some of the rows, and once more for the backward pass.
        prefix: whether the beginning of each document is read in both directions.
    """

    group: str | None
    config: DecoderConfig | StackConfig
    layers: tuple[LayerConfig, ...]
    tokens: int
    memory: int = 0
    before: int = 0
    prefix: bool = False


def stacks_of(model: ModelConfig, row: RowTokens) -> tuple[PlannedStack, ...]:
    """The stacks in the order in which they run; the stages of a pipeline have layers of the last."""
    if isinstance(model, DecoderConfig):
        layers, before = model.layers + model.further_layers, len(model.leading)
        return (PlannedStack(None, model, layers, row.text, before=before, prefix=row.prefix),)
    if isinstance(model, EncoderConfig):
        return (_stack('encoder', model.layers, row.text),)
    encoder = _stack('encoder', model.encoder, row.text, before=model.encoder.num_layers)
    return encoder, _stack('decoder', model.decoder, row.read, memory=row.text)


def _stack(group: str, config: StackConfig, tokens: int, memory: int = 0, before: int = 0) -> PlannedStack:
    layers = tuple(map(config.layer, range(config.num_layers)))
    return PlannedStack(group, config, layers, tokens, memory, before)


def _configs(model: ModelConfig) -> Iterator[tuple[str, DecoderConfig | StackConfig]]:
    if isinstance(model, DecoderConfig):
        yield '', model
    elif isinstance(model, EncoderConfig):
        yield 'layers', model.layers
    else:
        yield from (('encoder', model.encoder), ('decoder', model.decoder))


def remat_of(model: ModelConfig) -> tuple[tuple[RematKind, tuple[str, ...]], ...]:
    """(remat, remat_names) of every stack."""
    return tuple((config.remat, config.remat_names) for _, config in _configs(model))


def with_remat(model: ModelConfig, remat: RematKind, names: tuple[str, ...] = ()) -> Any:
    """The same model, all of whose stacks compute this again."""
    changed: dict[str, Any] = {
        name: dataclasses.replace(config, remat=remat, remat_names=names) for name, config in _configs(model)
    }
    return changed[''] if '' in changed else dataclasses.replace(model, **changed)


def outputs_of(model: ModelConfig) -> int:
    """Columns of the logits: the vocabulary, or what else the model says."""
    own = None if isinstance(model, EncoderDecoderConfig) else model.num_outputs
    return model.vocab_size if own is None else own
