"""A job that holds a model, so that a preset of gin_configs/models can be loaded as a run loads it."""

import dataclasses

from llm.configuration import Invocation
from llm.models.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Hold:
    """Does nothing with `model`."""

    model: DecoderConfig

    def __call__(self, invocation: Invocation) -> None:
        """Do nothing."""
