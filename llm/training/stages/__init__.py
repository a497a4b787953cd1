"""Models as stages of a pipeline, one file for each kind."""

from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.model import ModelConfig
from llm.training.stages.decoder import staged_decoder
from llm.training.stages.encoder import staged_encoder
from llm.training.stages.encoder_decoder import staged_encoder_decoder
from llm.training.stages.model import StagedModel


def staged(config: ModelConfig, z_loss: float) -> StagedModel:
    """The model of `config` as a pipeline runs it.

    Raises:
        UserError: what remat keeps cannot be kept from tick to tick.
    """
    if isinstance(config, DecoderConfig):
        return staged_decoder(config, z_loss)
    if isinstance(config, EncoderConfig):
        return staged_encoder(config, z_loss)
    return staged_encoder_decoder(config, z_loss)


__all__ = ['StagedModel', 'staged']
