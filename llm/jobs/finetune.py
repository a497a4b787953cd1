"""The finetune job: a trained model learns from examples to classify, tag, say a number, answer, or embed texts."""

import contextlib
import dataclasses
import json
from pathlib import Path

from llm.configuration import Invocation, render
from llm.data.examples import ShuffledExamples
from llm.data.labelled import (
    LabelledExample,
    LabelledFiles,
    LabelledRows,
    PairRows,
    Task,
    label_names,
    read_labelled,
)
from llm.data.loader import Loader
from llm.data.vocabularies import Vocabulary, load_vocabulary
from llm.errors import TRY_AGAIN, UserError
from llm.evaluation.reports import update_summary, write_report
from llm.jobs.compilation_cache import enable_compilation_cache
from llm.jobs.describe import describe
from llm.jobs.finetuned_model import check_task, finetuned_model, has_dropout, num_outputs, parameters_to_start
from llm.jobs.scoring_labels import AnswersConfig, Scorer
from llm.jobs.scoring_pairs import PairScorer
from llm.jobs.trained_model import TrainedModel, open_trained_model
from llm.jobs.training_run import (
    COMPLETE,
    VOCABULARY,
    claim_run,
    keep_vocabulary,
    mark_complete,
    restored_state,
    say,
)
from llm.models.encoder import EncoderConfig
from llm.models.encoder_decoder import EncoderDecoderConfig
from llm.models.low_rank import LowRankConfig
from llm.models.model import ModelConfig
from llm.models.pooling import PoolingConfig
from llm.parallel import processes
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.sharding import AxisRules
from llm.scaling.accounting import count, row_tokens
from llm.training.checkpoints import CheckpointConfig, Checkpointer
from llm.training.contrastive import ContrastiveConfig
from llm.training.environment import environment
from llm.training.loop import Evaluation, LoopConfig, TrainingLoop
from llm.training.metrics import MetricsWriter
from llm.training.optimizers import OptimizerConfig
from llm.training.parametrization import trained
from llm.training.run_directory import write_atomically
from llm.training.step import State, StepConfig
from llm.training.trainer import Trainer

_LABELS = 'labels.json'
_CHANGEABLE = ('run_directory', 'base', 'mesh', 'rules', 'pipeline', 'checkpoint', 'loop.profile_first_step')


# Of an evaluation, beside loss, perplexity and tokens.
_FIGURES = {
    'classification': ('accuracy', 'macro_f1', 'micro_f1'),
    'regression': ('mean_squared_error', 'pearson', 'spearman'),
    'tagging': ('accuracy', 'span_precision', 'span_recall', 'span_f1'),
    'generation': ('exact_match', 'bleu', 'rouge1', 'rouge2', 'rougeL'),
    'embedding': ('recall_at_1', 'recall_at_5', 'recall_at_10', 'mrr'),
}


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train the model of another run further, on labelled examples or pairs of texts.

    Its run directory is one that `generate` and `finetune` read like a pretrain run's, with predictions.jsonl beside.

    Attributes:
        run_directory: where everything about the run is kept; run again, it resumes.
        base: the directory of the run whose model it is.
        task: what is learnt; see llm.data.labelled.
        training, evaluation: the files; evaluation is the set 'validation'.
        model: as it is trained; None for the base's, with an output for the task, `low_rank` and `dropout`.
        low_rank: adapters that are trained instead of the whole model; read when `model` is None.
        dropout: rate of all layers, and of what they read; None for the base's. Read when `model` is None.
        answers: of generation, how answers are made and scored.
        target_length: tokens of an encoder-decoder's answer; None for as many as the encoder reads.
        contrastive: of embedding, how vectors are made and compared.
    """

    run_directory: str
    base: str
    task: Task
    training: LabelledFiles
    evaluation: LabelledFiles
    optimizer: OptimizerConfig
    step: StepConfig
    loop: LoopConfig
    model: ModelConfig | None = None
    low_rank: LowRankConfig | None = None
    dropout: float | None = None
    answers: AnswersConfig = AnswersConfig()
    target_length: int | None = None
    contrastive: ContrastiveConfig = ContrastiveConfig()
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()
    pipeline: PipelineConfig = PipelineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        where = 'Finetune'
        if self.target_length is not None and self.target_length < 2:
            raise UserError(f'target_length is {self.target_length}', where=where, fix='Use at least 2.')
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(f'dropout is {self.dropout}', where=where, fix='Use a rate in [0, 1), or None.')

    @property
    def pooling(self) -> PoolingConfig | None:
        """How states become the vector of a text, if that is what is learnt: other jobs read it with the model."""
        return self.contrastive.pooling if self.task == 'embedding' else None

    def __call__(self, invocation: Invocation) -> int:
        """Run it: a fresh run starts, a stopped one resumes, a finished one says so; TRY_AGAIN if it stops early."""
        self._check_best_metric()
        self._check_pairs()
        directory = Path(self.run_directory)
        examples = read_labelled(self.training, self.task)
        held_out = read_labelled(self.evaluation, self.task)
        labels = label_names(examples, self.task)
        base = None if (directory / VOCABULARY).exists() and self.model is not None else open_trained_model(self.base)
        model = self._model(base, labels)
        if invocation.dry_run:
            total_steps = self.loop.total_steps
            row = row_tokens(model, self.step.sequence_length)
            if isinstance(model, EncoderDecoderConfig):
                row = dataclasses.replace(row, decoder=self.target_length or row.text)
            print(describe(model, self.optimizer, self.step, total_steps, self.mesh, self.rules, self.pipeline, row))
            return 0
        trainer = Trainer(
            model,
            self.optimizer,
            self.step,
            self.loop.total_steps,
            self.mesh,
            self.rules,
            pipeline=self.pipeline,
            contrastive=self.contrastive if self.task == 'embedding' else None,
        )
        first = processes.is_first()
        resolved = dataclasses.replace(self, model=model)
        with contextlib.ExitStack() as stack:
            begin = processes.from_first(
                'claiming the run directory',
                lambda: claim_run(directory, resolved, render(resolved), _CHANGEABLE, stack),
            )
            processes.check_shared(directory / 'config.json')
            checkpointer = stack.enter_context(Checkpointer(directory / 'checkpoints', self.checkpoint))
            if begin == COMPLETE:
                if first:
                    print(f'{directory}: already complete; see {write_report(directory)}')
                return 0
            enable_compilation_cache()
            say(f'{begin} {directory}')
            vocabulary = processes.first_then_others('the vocabulary', lambda: self._vocabulary(directory, base))
            rows = self._rows(examples, vocabulary, labels, model)
            evaluation_rows = self._rows(held_out, vocabulary, labels, model)
            shuffled = ShuffledExamples(rows, self.step.seed, 'training')
            data = {'vocabulary': vocabulary.digest, 'data': shuffled.digest}
            for name, digest in data.items():
                processes.check_same(name, digest)
            batches = stack.enter_context(Loader(shuffled, self.step.batch_size, trainer.batch_sharding))
            evaluation_batches = stack.enter_context(
                Loader(evaluation_rows, self.step.batch_size, trainer.batch_sharding)
            )
            state, rejected = self._state(trainer, checkpointer, data, base)
            start = int(state['step'])
            scorer = (
                PairScorer(trainer, evaluation_rows)
                if isinstance(evaluation_rows, PairRows)
                else Scorer(trainer, evaluation_rows, vocabulary, self.answers)
            )
            if first:
                write_atomically(directory / _LABELS, json.dumps(labels) + '\n')
                self._record_facts(directory, trainer, rows, evaluation_rows, rejected)
            loop = TrainingLoop(
                trainer=trainer,
                config=self.loop,
                batches=batches,
                evaluations={
                    'validation': Evaluation(evaluation_batches, scorer.num_batches, step=scorer.step, score=scorer),
                },
                checkpointer=checkpointer,
                writer=stack.enter_context(MetricsWriter(directory, start, enabled=first)),
                run_directory=directory,
                metadata=data,
            )
            ended = loop.run(state)
            saved = processes.from_first('the last checkpoint', lambda: str(checkpointer.latest_step()))
            complete = ended and saved == str(loop.last_step)
            code = 0 if complete else TRY_AGAIN
            if not first:
                return code
            if complete:
                write_atomically(directory / 'predictions.jsonl', scorer.as_json_lines())
                mark_complete(directory, loop.last_step)
            report = write_report(directory)
        scores = ', '.join(f'{name} {value:.4g}' for name, value in scorer.last.items())
        print(f'{directory}: {"complete" if complete else "stopped, run the same command to go on"}; {scores}')
        print(f'see {report}')
        return code

    def _check_best_metric(self) -> None:
        """Before anything else is done."""
        own = _FIGURES[self.task]
        if self.task == 'generation' and self.answers.pattern is not None:
            own = (*own, 'answer_accuracy')
        if self.task == 'embedding' and self.evaluation.label is not None:
            own = ('pearson', 'spearman')
        known = [f'validation/{name}' for name in ('loss', 'perplexity', *own)]
        # Patience reads it too, whether or not a best checkpoint is kept.
        wanted = self.checkpoint.best_metric
        if wanted is not None and wanted not in known:
            raise UserError(
                f'nothing is called {wanted!r} in this run',
                where='CheckpointConfig.best_metric',
                fix=f'Use one of {", ".join(known)}.',
            )

    def _check_pairs(self) -> None:
        """Whether what is asked for can train an embedding."""
        if self.task != 'embedding':
            return
        if self.evaluation.second_text is None:
            raise UserError(
                'an embedding is evaluated on pairs of texts',
                where='LabelledFiles.second_text',
                fix='Set it for the validation files.',
            )
        if self.step.batch_size == 1 and self.training.negative is None:
            raise UserError(
                "a text's negatives are the other texts of the batch, and a batch of 1 has none: its loss is 0",
                where='StepConfig.batch_size',
                fix='Use more, as 64.',
            )

    def _model(self, base: TrainedModel | None, labels: tuple[str, ...]) -> ModelConfig:
        """The model that is trained: the one given, or what becomes of the base's."""
        if self.model is None:
            assert base is not None
            model = finetuned_model(base.config, self.task, labels, self.low_rank, self.dropout)
        else:
            model = self.model
            check_task(model, self.task)
            wanted, outputs = num_outputs(self.task, labels), getattr(model, 'num_outputs', None)
            if outputs != wanted:
                raise UserError(
                    f'the model has num_outputs = {outputs}, and the task needs {wanted}',
                    where='Finetune.model',
                    fix='Change it, or use None for the model of the base.',
                )
        if self.task == 'embedding' and self.training.second_text is None and not has_dropout(model):
            raise UserError(
                'a text is paired with itself, and a model without dropout says the same of both: nothing is learnt',
                where='Finetune.dropout',
                fix='Use a rate, as 0.1, or pairs of texts: LabelledFiles.second_text.',
            )
        return model

    def _rows(
        self,
        examples: list[LabelledExample],
        vocabulary: Vocabulary,
        labels: tuple[str, ...],
        model: ModelConfig,
    ) -> LabelledRows | PairRows:
        length = self.step.sequence_length
        if self.task == 'embedding':
            return PairRows(examples, vocabulary, length)
        encoder, two_sided = isinstance(model, EncoderConfig), isinstance(model, EncoderDecoderConfig)
        return LabelledRows(
            examples,
            vocabulary,
            self.task,
            length,
            labels,
            'first' if encoder else 'last',
            token_types=isinstance(model, EncoderConfig) and model.token_types > 1,
            target_length=(self.target_length or length) if two_sided else None,
        )

    def _vocabulary(self, directory: Path, base: TrainedModel | None) -> Vocabulary:
        """The run's own copy of its base's vocabulary."""
        if base is not None:
            keep_vocabulary(directory, base.vocabulary)
        return load_vocabulary(directory / VOCABULARY)

    def _state(
        self, trainer: Trainer, checkpointer: Checkpointer, data: dict[str, str], base: TrainedModel | None
    ) -> tuple[State, list[str]]:
        """The train state to go on from, and what was wrong with newer checkpoints."""
        restored = restored_state(
            trainer, checkpointer, data, 'Bring back the files as they were, or start another run directory.'
        )
        if restored is not None:
            return restored
        state = trainer.fresh_state()
        base = base or open_trained_model(self.base)
        found = base.restore(trainer.mesh, trainer.rules).state
        state['parameters'] = parameters_to_start(found, state['parameters'], trainer.model_config, base.config)
        return state, []

    def _record_facts(
        self,
        directory: Path,
        trainer: Trainer,
        rows: LabelledRows | PairRows,
        evaluation: LabelledRows | PairRows,
        rejected: list[str],
    ) -> None:
        here = environment(dict(trainer.mesh.shape))
        write_atomically(directory / 'environment.json', json.dumps(here, indent=1, sort_keys=True) + '\n')
        counts = count(trainer.model_config, trainer.specs)
        part = trained(trainer.specs, trainer.specs)
        update_summary(
            directory,
            {
                'total_steps': self.loop.total_steps,
                'facts': {
                    'task': self.task,
                    'parameters': counts.total,
                    'parameters trained': count(trainer.model_config, part).total,
                    'training examples': rows.num_rows,
                    'cut to fit a row': rows.cut,
                    'validation examples': evaluation.num_rows,
                    **({'classes': len(rows.labels)} if isinstance(rows, LabelledRows) and rows.labels else {}),
                },
                'warnings': rejected,
            },
        )
