"""What a fine-tuned model says of examples that it was not trained on, and how right it is."""

import dataclasses
import json
import re
from typing import Any

import numpy as np

from llm.data.labelled import LabelledExample, LabelledRows
from llm.data.token_cache import Boundaries
from llm.data.vocabularies import Vocabulary
from llm.errors import UserError
from llm.evaluation import metrics
from llm.inference.generation import Generator, Prompt
from llm.inference.sampling import SamplingConfig
from llm.inference.streaming import check_stop, stream_text
from llm.jobs.prompts import prompt_tokens
from llm.models.decoder import DecoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class AnswersConfig:
    """How answers are made and scored, where the task is generation.

    Attributes:
        examples: how many of the evaluation examples are answered at each evaluation, the first ones.
        max_new_tokens: of an answer.
        sampling: how tokens are chosen; temperature 0 takes the likeliest.
        stop: an answer ends before the first of these strings, as with `generate`.
        pattern: a regular expression whose group is what counts of an answer: r'#### (-?[0-9.,]+)' for GSM8K; how often
            it is right is `answer_accuracy`. None: there is no such figure.
    """

    examples: int = 64
    max_new_tokens: int = 256
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    stop: tuple[str, ...] = ()
    pattern: str | None = None

    def __post_init__(self) -> None:
        check_stop(self.stop)
        if self.examples < 1 or self.max_new_tokens < 1:
            raise UserError('examples and max_new_tokens must be positive', where='AnswersConfig')
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise UserError(f'pattern is no regular expression: {error}', where='AnswersConfig') from error
            if groups != 1:
                raise UserError(f'pattern has {groups} groups', where='AnswersConfig', fix='Put one in parentheses.')


class Scorer:
    """Called with parameters and what the model said of each row, the figures; see llm.evaluation.metrics.

    Attributes:
        num_batches: of the evaluation rows.
        step: what says it, and the loss; None where answers are made from the parameters, one token at a time.
        last: the figures found last. predictions: what the model said then, as (example, label said).
    """

    def __init__(self, trainer: Trainer, rows: LabelledRows, vocabulary: Vocabulary, answers: AnswersConfig) -> None:
        self._trainer, self._rows = trainer, rows
        self._vocabulary, self._answers = vocabulary, answers
        self.step = None if rows.task == 'generation' else trainer.prediction_step
        size = trainer.step_config.batch_size
        self.num_batches = -(-rows.num_rows // size)
        self.last: dict[str, float] = {}
        self.predictions: list[tuple[LabelledExample, Any]] = []
        self._generator: Generator | None = None

    def __call__(self, parameters: Any, found: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """Compare; answers are made first."""
        task, examples = self._rows.task, list(self._rows.examples)
        if task == 'generation':
            examples = examples[: self._answers.examples]
            said: list[Any] = self._answered(parameters, examples)
            self.last = self._answer_scores(said, [str(example.label) for example in examples])
        else:
            said = self._read([each['predicted'] for each in found])
            if task == 'classification':
                self.last = metrics.classification(said, [example.label for example in examples])
            elif task == 'regression':
                self.last = metrics.regression(said, [float(str(example.label)) for example in examples])
            else:
                # Words that a row had no room for were not read, and count for nothing.
                real = [list(example.label)[: len(tags)] for example, tags in zip(examples, said, strict=True)]
                self.last = metrics.span_f1(said, real)
        self.predictions = list(zip(examples, said, strict=True))
        return self.last

    def as_json_lines(self) -> str:
        """Of the predictions: where the example is, its label, and what the model said."""
        lines = [
            {'where': example.where, 'label': example.label, 'predicted': said} for example, said in self.predictions
        ]
        return ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)

    def _read(self, batches: list[np.ndarray]) -> list[Any]:
        """A label, a number, or the tags of its words for each example."""
        size, labels = self._trainer.step_config.batch_size, self._rows.labels
        found: list[Any] = []
        for index, outputs in enumerate(batches):
            indices = np.arange(index * size, min((index + 1) * size, self._rows.num_rows))
            weights = self._rows.rows(indices)['loss_weights']
            for row, positions in enumerate(map(np.flatnonzero, weights)):
                read = outputs[row, positions]
                if self._rows.task == 'regression':
                    found.append(float(read[0, 0]))
                else:
                    tags = [labels[i] for i in read.argmax(-1).tolist()]
                    found.append(tags if self._rows.task == 'tagging' else tags[0])
        return found

    def _answered(self, parameters: Any, examples: list[LabelledExample]) -> list[str]:
        trainer, answers = self._trainer, self._answers
        if self._generator is None:
            assert isinstance(trainer.model_config, DecoderConfig | EncoderDecoderConfig)
            self._generator = Generator(
                trainer.model_config,
                answers.sampling,
                trainer.mesh,
                trainer.rules,
                num_tokens=self._vocabulary.size,
                tokens_per_call=min(64, answers.max_new_tokens),
            )
        size, texts = trainer.step_config.batch_size, []
        boundaries, token_bytes = Boundaries.of(self._vocabulary), self._vocabulary.token_bytes()
        for begin in range(0, len(examples), size):
            prompts = [self._prompt(number) for number in range(begin, min(begin + size, len(examples)))]
            made = [''] * len(prompts)
            decoding = self._generator.start(parameters, prompts, answers.max_new_tokens, stop_tokens=(boundaries.end,))
            for new in stream_text(decoding, token_bytes, answers.stop):
                made = [text + more for text, more in zip(made, new, strict=True)]
            texts += made
        return texts

    def _prompt(self, number: int) -> Prompt:
        """What comes before the answer: what was read in training, too."""
        row = self._rows.rows([number])
        if 'encoder_inputs' in row:
            read = row['encoder_inputs'][0, row['encoder_segment_ids'][0] > 0]
            return Prompt((Boundaries.of(self._vocabulary).pad,), number, encoder_tokens=tuple(read.tolist()))
        return Prompt(prompt_tokens(self._vocabulary, self._rows.examples[number].texts[0]), number)

    def _answer_scores(self, said: list[str], real: list[str]) -> dict[str, float]:
        scores = metrics.generation(said, real)
        if self._answers.pattern is not None:
            pattern = re.compile(self._answers.pattern)

            def counts(text: str) -> str | None:
                found = pattern.search(text)
                return None if found is None else found.group(1)

            right = [counts(a) is not None and counts(a) == counts(b) for a, b in zip(said, real, strict=True)]
            scores['answer_accuracy'] = float(np.mean(right))
        return scores
