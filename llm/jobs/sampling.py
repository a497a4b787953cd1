"""Samples drawn on the way through training, so that a person can read what the model has learnt so far."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from llm.data.token_cache import Boundaries
from llm.data.vocabularies import Vocabulary
from llm.errors import UserError
from llm.inference.generation import Decoding, Generator, Prompt
from llm.inference.sampling import SamplingConfig, check_seed
from llm.inference.streaming import stream_text
from llm.jobs.prompts import prompt_tokens
from llm.models.decoder import DecoderConfig
from llm.training.metrics import JsonLines
from llm.training.trainer import Trainer

# Nobody waits for single tokens here, and fewer calls cost less.
_TOKENS_PER_CALL = 64


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """What to draw from the model each time.

    Attributes:
        prompts: texts to continue, each as the beginning of a document; '' for a document from its start.
        max_new_tokens: of each continuation, which ends earlier where the model ends the document.
        sampling: how tokens are chosen.
        seed: of the choices, the same at every step, so that what changes is the model.
    """

    prompts: tuple[str, ...] = ('',)
    max_new_tokens: int = 128
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, top_p=0.95)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise UserError('SamplesConfig.prompts is empty', fix="Give at least one; '' starts a document.")
        if self.max_new_tokens < 1:
            raise UserError(f'SamplesConfig.max_new_tokens is {self.max_new_tokens}', fix='Use at least 1.')
        check_seed(self.seed, 'SamplesConfig')


@dataclasses.dataclass(frozen=True)
class Sample:
    """A line of samples.jsonl: what the model of `step` continued `prompt` with."""

    step: int
    prompt: str
    continuation: str


class SampleWriter:
    """Draws the samples of a step and appends them to a file; compiled once, the first time.

    Attributes:
        last: the samples drawn last, none at first.
    """

    def __init__(
        self, config: SamplesConfig, trainer: Trainer, vocabulary: Vocabulary, path: Path, start_step: int
    ) -> None:
        self._config = config
        assert isinstance(trainer.model_config, DecoderConfig)  # Pretrain sees to it
        self._generator = Generator(
            trainer.model_config,
            config.sampling,
            trainer.mesh,
            trainer.rules,
            num_tokens=vocabulary.size,
            tokens_per_call=min(_TOKENS_PER_CALL, config.max_new_tokens),
        )
        self._prompts = [
            Prompt(prompt_tokens(vocabulary, text), index=index) for index, text in enumerate(config.prompts)
        ]
        self._stop_tokens = (Boundaries.of(vocabulary).end,)
        self._token_bytes = vocabulary.token_bytes()
        # Shows a prompt that is too long before the first step of training rather than after it.
        self._start({})
        # Every process draws, since the model is spread over them; one writes.
        self._lines = JsonLines(path, start_step) if jax.process_index() == 0 else None
        self.last: list[Sample] = []

    def __call__(self, parameters: Any, step: int) -> list[Sample]:
        """Draw from the model with these parameters, and return when the samples are on the disk.

        Raises:
            UserError: the file cannot be written.
        """
        texts = [''] * len(self._prompts)
        for new in stream_text(self._start(parameters), self._token_bytes):
            texts = [text + more for text, more in zip(texts, new, strict=True)]
        self.last = [Sample(step, *pair) for pair in zip(self._config.prompts, texts, strict=True)]
        if self._lines is not None:
            for sample in self.last:
                self._lines.append(dataclasses.asdict(sample))
            self._lines.sync()
        return self.last

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _start(self, parameters: Any) -> Decoding:
        config = self._config
        return self._generator.start(
            parameters, self._prompts, config.max_new_tokens, seed=config.seed, stop_tokens=self._stop_tokens
        )


def sample_to_file(
    config: SamplesConfig, trainer: Trainer, vocabulary: Vocabulary, path: Path, start_step: int
) -> SampleWriter:
    """What the training loop calls with (parameters, step): draws samples and appends them to `path` as JSON lines.

    Two runs of one config write the same file, however often they were killed: lines after `start_step`, the step that
    was restored, are cut.

    Raises:
        UserError: a prompt is longer than the model's positions, or the file cannot be written.
    """
    return SampleWriter(config, trainer, vocabulary, path, start_step)


def format_samples(samples: list[Sample]) -> str:
    """Samples for a person to read: each with its prompt, first by itself and then continued."""
    return '\n'.join(
        f'--- step {sample.step}, continuing {sample.prompt!r} ---\n{(sample.prompt + sample.continuation).rstrip()}'
        for sample in samples
    )
