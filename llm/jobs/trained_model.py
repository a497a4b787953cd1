"""A trained decoder as other jobs need it: its config, vocabulary and parameters, from the directory of its run."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm.configuration import load_job
from llm.data.vocabularies import Vocabulary, load_vocabulary
from llm.errors import UserError
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.model import ModelConfig
from llm.models.parameters import named_specs, parameter_specs
from llm.parallel.sharding import AxisRules, parameter_sharding
from llm.training.checkpoints import Restored, committed_steps, restore_parameters
from llm.training.checkpoints.directory import step_path
from llm.training.step import StepConfig

VOCABULARY = 'vocabulary'


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What a run directory says of its model, without the parameters.

    Attributes:
        directory: of the run.
        config: of the decoder.
        sequence_length: tokens per row that it was trained on; None if the run does not say.
        vocabulary: that it was trained with.
        steps: of the checkpoints there are, rising; damaged ones among them.
    """

    directory: Path
    config: DecoderConfig
    sequence_length: int | None
    vocabulary: Vocabulary
    steps: tuple[int, ...]

    def restore(self, mesh: Mesh, rules: AxisRules, step: int | None = None) -> Restored:
        """The parameters of the newest whole checkpoint, or that of `step`, where the rules put them on the mesh.

        Raises:
            UserError: there is no whole checkpoint, it does not fit the config, it was trained with another
                vocabulary, or the mesh cannot divide a parameter.
        """
        specs = parameter_specs(Decoder(self.config))
        leaves = [
            jax.ShapeDtypeStruct(
                spec.shape, jnp.float32, sharding=parameter_sharding(spec.axes, spec.shape, mesh, rules, name)
            )
            for name, spec in named_specs(specs)
        ]
        abstract: Any = jax.tree.unflatten(jax.tree.structure(specs), leaves)
        if step is not None and step not in self.steps:
            raise UserError(
                f'there is no checkpoint of step {step}',
                where=str(self.directory),
                fix=f'There are those of {", ".join(map(str, self.steps)) or "no step"}.',
            )
        path = self.directory if step is None else step_path(self.directory / 'checkpoints', step)
        restored = restore_parameters(path, abstract)
        digest = restored.metadata.get('vocabulary', self.vocabulary.digest)
        if digest != self.vocabulary.digest:
            raise UserError(
                f'the checkpoint of step {restored.step} was trained with another vocabulary than '
                f'{self.directory / VOCABULARY} (digest {digest[:12]}, not {self.vocabulary.digest[:12]})',
                where=str(restored.path),
                fix='Bring back the vocabulary that the run was trained with.',
            )
        return restored


def open_trained_model(run_directory: str | Path) -> TrainedModel:
    """Read the config and the vocabulary of a run, which may still be going on.

    Raises:
        UserError: this is not a directory of a run that trains a decoder, or config and vocabulary do not fit.
    """
    directory = Path(run_directory).expanduser()
    config, sequence_length = read_run(directory)
    vocabulary = load_vocabulary(directory / VOCABULARY)
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f'the vocabulary has {vocabulary.size} tokens and the model {config.vocab_size}: it is not the one that '
            'the model was trained with',
            where=str(directory / VOCABULARY),
            fix='Bring back the vocabulary that the run was trained with.',
        )
    steps = tuple(committed_steps(directory / 'checkpoints'))
    return TrainedModel(directory, config, sequence_length, vocabulary, steps)


def read_run(directory: Path) -> tuple[DecoderConfig, int | None]:
    """The decoder of a run, and the tokens per row that it was trained on, if the run says.

    Raises:
        UserError: this is not a directory of a run that trains a decoder, or of a converted one.
    """
    config, length, job = _read_job(directory)
    if not isinstance(config, DecoderConfig):
        raise UserError(
            f'the job of this run, {job}, trains no decoder',
            where=str(directory / 'config.gin'),
            fix='Give the directory of a pretrain run.',
        )
    return config, length


def read_any_run(directory: Path) -> tuple[ModelConfig, int | None]:
    """`read_run` for models of every kind.

    Raises:
        UserError: this is not a directory of a run that trains a model, or of a converted one.
    """
    config, length, job = _read_job(directory)
    if not isinstance(config, ModelConfig):
        raise UserError(f'the job of this run, {job}, trains no model', where=str(directory / 'config.gin'))
    return config, length


def _read_job(directory: Path) -> tuple[Any, int | None, str]:
    """What a run says of its model, its rows, and its job."""
    config_file = directory / 'config.gin'
    if not config_file.is_file():
        raise UserError(
            'this is not the directory of a run: it has no config.gin', where=str(directory), fix='Check the path.'
        )
    job, _ = load_job([str(config_file)])
    config, step = getattr(job, 'model', None), getattr(job, 'step', None)
    # A converted model says it itself.
    said = getattr(job, 'sequence_length', None)
    return config, step.sequence_length if isinstance(step, StepConfig) else said, type(job).__name__
