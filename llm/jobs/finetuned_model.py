"""What becomes of a base's model and parameters when it is fine-tuned: another output, adapters, dropout."""

import dataclasses
from typing import Any

from llm.data.labelled import Task
from llm.errors import UserError
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.low_rank import LowRankConfig, attach
from llm.models.model import ModelConfig, layers_of
from llm.models.stack import StackConfig

# Parts that begin afresh where the base does not have them.
_NEW = ('head', 'classifier', 'pooler')


def num_outputs(task: Task, labels: tuple[str, ...]) -> int | None:
    """How many outputs a model has for a task: none of its own where it says tokens, 0 where its states are it."""
    return {'generation': None, 'embedding': 0, 'regression': 1}.get(task, len(labels))


def finetuned_model(
    base: ModelConfig,
    task: Task,
    labels: tuple[str, ...],
    low_rank: LowRankConfig | None = None,
    dropout: float | None = None,
) -> ModelConfig:
    """The base's model with an output for the task, and adapters.

    An encoder's class or number is read at its first token through a pooler, as BERT does; its tags at the last states.

    Args:
        dropout: rate of all layers and of what they read, in place of the base's; None leaves them.

    Raises:
        UserError: the task is not for this kind of model, or there are adapters already.
    """
    check_task(base, task)
    if base.low_rank is not None and low_rank is not None:
        raise UserError(
            'the base has adapters already', where='Finetune.low_rank', fix='Leave low_rank out to train those on.'
        )
    base = dataclasses.replace(base, low_rank=low_rank or base.low_rank)
    base = base if dropout is None else _with_dropout(base, dropout)
    outputs = num_outputs(task, labels)
    if isinstance(base, EncoderDecoderConfig):
        return base
    if isinstance(base, DecoderConfig):
        # Multi-token prediction is of text, and not used by what comes after.
        return dataclasses.replace(base, num_outputs=outputs, multi_token=None)
    pooler = task in ('classification', 'regression')
    return dataclasses.replace(base, num_outputs=outputs, pooler=pooler, next_sentence=False)


def check_task(model: ModelConfig, task: Task) -> None:
    """Raises UserError where this kind of model cannot do the task."""
    if isinstance(model, EncoderDecoderConfig) and task != 'generation':
        raise UserError(
            f'an encoder-decoder does not do {task}',
            where='Finetune.task',
            fix="Use 'generation', with the label as the text to say, or the run of an encoder or a decoder.",
        )
    if isinstance(model, EncoderConfig) and task == 'generation':
        raise UserError(
            'an encoder does not do generation',
            where='Finetune.task',
            fix='Use the run of a decoder or of an encoder-decoder.',
        )


def has_dropout(model: ModelConfig) -> bool:
    """Whether the model says something else of a text each time that it trains on it."""
    embedded = model.dropout if isinstance(model, EncoderDecoderConfig) else model.embedding_dropout
    return embedded > 0 or any(layer.dropout > 0 for layer in layers_of(model))


def _with_dropout(model: ModelConfig, rate: float) -> ModelConfig:
    def stack(config: StackConfig) -> StackConfig:
        return dataclasses.replace(config, pattern=tuple(dataclasses.replace(x, dropout=rate) for x in config.pattern))

    if isinstance(model, EncoderDecoderConfig):
        return dataclasses.replace(model, encoder=stack(model.encoder), decoder=stack(model.decoder), dropout=rate)
    if isinstance(model, EncoderConfig):
        return dataclasses.replace(model, layers=stack(model.layers), embedding_dropout=rate)
    pattern, leading = (
        tuple(dataclasses.replace(layer, dropout=rate) for layer in layers) for layers in (model.pattern, model.leading)
    )
    return dataclasses.replace(model, pattern=pattern, leading=leading, embedding_dropout=rate)


def parameters_to_start(found: Any, fresh: Any, model: ModelConfig, base: ModelConfig) -> Any:
    """The base's parameters in a model that has adapters or another output: those begin afresh.

    Args:
        found: parameters of `base`. fresh: initial ones of `model`.
    """
    ours, theirs = (
        None if isinstance(config, EncoderDecoderConfig) else config.num_outputs for config in (model, base)
    )
    other = ('head', 'classifier') if ours is not None and ours != theirs else ()
    parameters = {}
    for name, part in fresh.items():
        if name in other or (name in _NEW and name not in found):
            parameters[name] = part
        elif base.low_rank is None and model.low_rank is not None:
            parameters[name] = attach(found[name], part)
        else:
            parameters[name] = found[name]
    return parameters
