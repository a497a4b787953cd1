"""Jobs that hold a model, so that a preset of gin_configs/models can be loaded as a run loads it."""

import dataclasses

from llm.configuration import Invocation
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig


@dataclasses.dataclass(frozen=True)
class Hold:
    """Does nothing with `model`."""

    model: DecoderConfig

    def __call__(self, invocation: Invocation) -> None:
        """Do nothing."""


@dataclasses.dataclass(frozen=True)
class HoldAny:
    """Does nothing with `model`."""

    model: EncoderConfig | EncoderDecoderConfig

    def __call__(self, invocation: Invocation) -> None:
        """Do nothing."""
