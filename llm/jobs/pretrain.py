"""The pretrain job: text to tokens to a trained decoder, in a run directory that says everything about it."""

import contextlib
import dataclasses
import json
from pathlib import Path

from llm.configuration import Invocation
from llm.data.datasets import DataConfig, EvaluationSet
from llm.data.examples import FixedExamples, MixedExamples, StreamedExamples
from llm.data.facts import bad_records, facts
from llm.data.loader import Loader
from llm.data.objectives.sentence_pairs import SentencePairs
from llm.data.packing import PackedRows
from llm.data.sources.standard_library import StandardLibrary
from llm.data.vocabularies import Vocabulary, VocabularyConfig, load_vocabulary
from llm.errors import TRY_AGAIN, UserError
from llm.evaluation.reports import update_summary, write_report
from llm.jobs.baselines import Baselines, result_lines
from llm.jobs.compilation_cache import enable_compilation_cache
from llm.jobs.describe import describe
from llm.jobs.sampling import SamplesConfig, format_samples, sample_to_file
from llm.jobs.training_run import (
    COMPLETE,
    VOCABULARY,
    check_size,
    claim_run,
    keep_vocabulary,
    mark_complete,
    restored_state,
    say,
    train_on_groups,
)
from llm.models.decoder import DecoderConfig
from llm.models.encoder import EncoderConfig
from llm.models.model import ModelConfig
from llm.parallel import processes
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.sharding import AxisRules
from llm.scaling.accounting import RowTokens, TokenFlops, count, flops_per_token, peak_flops, row_tokens
from llm.training.checkpoints import CheckpointConfig, Checkpointer, restore_parameters
from llm.training.environment import environment
from llm.training.loop import Evaluation, LoopConfig, TrainingLoop
from llm.training.metrics import MetricsWriter
from llm.training.optimizers import OptimizerConfig
from llm.training.run_directory import write_atomically
from llm.training.step import State, StepConfig
from llm.training.trainer import Trainer

# What may differ when a run goes on: where it runs and what it keeps, not what it computes.
_CHANGEABLE = (
    *('run_directory', 'mesh', 'rules', 'pipeline', 'checkpoint', 'data.cache_directory', 'data.workers'),
    *('loop.profile_first_step', 'loop.profile_steps'),
)


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Train a model from scratch, or from the parameters of another run, on tokenized text.

    Attributes:
        run_directory: where everything about the run is kept; run again, it resumes.
        vocabulary: what to train on the training text, of the model's size if it has none of its own; or the directory
            of a saved vocabulary.
        samples: what to draw from the model on the way, a decoder; None for nothing.
        initial_parameters: a run directory or checkpoint whose parameters to start from; None to initialise.
        xz_baselines: whether to report what xz makes of the evaluation sets (reads all text into memory).
    """

    run_directory: str
    model: ModelConfig
    data: DataConfig
    vocabulary: VocabularyConfig | str
    optimizer: OptimizerConfig
    step: StepConfig
    loop: LoopConfig
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()
    pipeline: PipelineConfig = PipelineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig | None = None
    initial_parameters: str | None = None
    xz_baselines: bool = False

    def __call__(self, invocation: Invocation) -> int:
        """Run it: a fresh run starts, a stopped one resumes, a finished one says so; TRY_AGAIN if it stops early."""
        self._check_kinds()
        if invocation.dry_run:
            total_steps = self.loop.total_steps
            print(
                describe(
                    self.model,
                    self.optimizer,
                    self.step,
                    total_steps,
                    self.mesh,
                    self.rules,
                    self.pipeline,
                    self._row(),
                )
            )
            return 0
        directory = Path(self.run_directory)
        trainer = Trainer(
            self.model,
            self.optimizer,
            self.step,
            self.loop.total_steps,
            self.mesh,
            self.rules,
            pipeline=self.pipeline,
        )
        # Process 0 writes the run directory; the others read there what it has made.
        first = processes.is_first()
        with contextlib.ExitStack() as stack:
            begin = processes.from_first(
                'claiming the run directory',
                lambda: claim_run(directory, self, invocation.operative_config, _CHANGEABLE, stack),
            )
            processes.check_shared(directory / 'config.json')
            checkpointer = stack.enter_context(Checkpointer(directory / 'checkpoints', self.checkpoint))
            if begin == COMPLETE:
                if first:
                    print(f'{directory}: already complete; see {write_report(directory)}')
                return 0
            enable_compilation_cache()
            say(f'{begin} {directory}')
            vocabulary = processes.first_then_others('the vocabulary', lambda: self._open_vocabulary(directory))
            length, rows = self.step.sequence_length, self.step.batch_size
            examples = processes.first_then_others(
                'tokenising the training text',
                lambda: self.data.open_training(vocabulary, length, batch_size=rows, total_steps=self.loop.total_steps),
            )
            batches = stack.enter_context(Loader(examples, self.step.batch_size, trainer.batch_sharding))
            # The digest of the data covers the vocabulary: that comes first, to be named if it is what differs.
            data = {'vocabulary': vocabulary.digest, 'data': examples.digest}
            for name, digest in data.items():
                processes.check_same(name, digest)
            state, rejected = self._state(trainer, checkpointer, data)
            start = int(state['step'])
            evaluation_sets = processes.first_then_others(
                'tokenising the evaluation sets', lambda: self.data.open_evaluation(vocabulary, length, batch_size=rows)
            )
            self._check_best_metric(evaluation_sets)
            evaluations = {
                name: Evaluation(
                    stack.enter_context(Loader(each.examples, self.step.batch_size, trainer.batch_sharding)),
                    each.num_batches(self.step.batch_size),
                    each.num_bytes,
                )
                for name, each in evaluation_sets.items()
            }
            flops = flops_per_token(self.model, trainer.specs, self._row())
            if first:
                self._record_facts(directory, trainer, vocabulary, examples, evaluation_sets, rejected, flops)
            baselines = stack.enter_context(Baselines(self.data if self.xz_baselines and first else None, directory))
            sample = None
            if self.samples is not None:
                path = directory / 'samples.jsonl'
                sample = stack.enter_context(
                    contextlib.closing(sample_to_file(self.samples, trainer, vocabulary, path, start))
                )
            loop = TrainingLoop(
                trainer=trainer,
                config=self.loop,
                batches=batches,
                evaluations=evaluations,
                checkpointer=checkpointer,
                writer=stack.enter_context(MetricsWriter(directory, start, enabled=first)),
                run_directory=directory,
                metadata=data,
                sample=sample,
                flops_per_token=flops.training(causal=False),
                causal_flops_per_token=flops.training(causal=True),
                peak_flops=peak_flops(list(trainer.mesh.devices.flat)),
                # FLOPs are per token of text, and objectives have losses of other ones.
                tokens_per_step=length * rows if any(self.data.objectives()) else None,
            )
            # Under on_full_disk = 'continue' the last checkpoint may be missing: then the next start tries again.
            ran = loop.run(state)
            saved = processes.from_first('the last checkpoint', lambda: str(checkpointer.latest_step()))
            complete = ran and saved == str(loop.last_step)
            code = 0 if complete else TRY_AGAIN
            if not first:
                return code
            if complete:
                baselines.finish()
                if sample is not None and sample.last:
                    print(format_samples(sample.last))
                mark_complete(directory, loop.last_step)
            report = write_report(directory)
            print(result_lines(directory), end='')
        print(f'{directory}: {"complete" if complete else "stopped, run the same command to go on"}; see {report}')
        return code

    def _row(self) -> RowTokens:
        """The tokens of a row; components of one mixture have rows of the same shapes."""
        return row_tokens(self.model, self.step.sequence_length, self.data.objectives()[0])

    def _check_kinds(self) -> None:
        """Whether model, objective and what else is asked for go together."""
        kind = self.data.kind()
        if kind != self.model.batch_kind:
            article = {'decoder': 'a'}
            raise UserError(
                f'the data is for {article.get(kind, "an")} {kind.replace("_", "-")} and the model is '
                f'{article.get(self.model.batch_kind, "an")} {type(self.model).__name__}',
                where='DataConfig.objective',
                fix='Use another objective, or another model.',
            )
        if self.samples is not None and not isinstance(self.model, DecoderConfig):
            raise UserError(
                f'an {type(self.model).__name__} cannot continue a prompt', where='Pretrain.samples', fix='Use None.'
            )
        if isinstance(self.model, DecoderConfig) and self.model.multi_token and any(self.data.objectives()):
            raise UserError(
                'multi-token prediction goes with causal language modelling alone',
                where='DecoderConfig.multi_token',
                fix='Use None, or no objective.',
            )
        pairs = any(isinstance(each, SentencePairs) for each in self.data.objectives())
        if pairs and not (isinstance(self.model, EncoderConfig) and self.model.next_sentence):
            raise UserError(
                'the objective is pairs of texts, and the model does not classify them',
                where='EncoderConfig.next_sentence',
                fix='Set it and pooler to True, and token_types to 2; or use another objective.',
            )
        remembers = isinstance(self.model, DecoderConfig) and self.model.memory_length > 0
        if remembers != (self.data.order == 'contiguous'):
            raise UserError(
                f'order is {self.data.order!r} and the model has {"a" if remembers else "no"} memory of the row before',
                where='DataConfig.order',
                fix="Use 'contiguous' for models of RecurrentAttentionConfig, and 'shuffled' for others.",
            )

    def _open_vocabulary(self, directory: Path) -> Vocabulary:
        """The run's own copy, or the one given, or a new one; kept with the run before anything uses it."""
        kept = directory / VOCABULARY
        vocabulary = load_vocabulary(kept) if kept.exists() else self._new_vocabulary()
        check_size(vocabulary, self.model, self.data.extra_ids(vocabulary))
        keep_vocabulary(directory, vocabulary)
        return vocabulary

    def _new_vocabulary(self) -> Vocabulary:
        """The one given, or one trained on equal bytes of the training text of every component."""
        # What can be seen to be wrong before anything is kept leaves the directory free for another config.
        for component in self.data.training_components():
            component.source.shards('train')
        for component in self.data.evaluation_components():
            component.source.shards('validation')
        if isinstance(self.vocabulary, str):
            return load_vocabulary(Path(self.vocabulary))
        groups = [[component.source] for component in self.data.training_components()]
        return train_on_groups(self.vocabulary, groups, self.model.vocab_size, self.data.extra_ids)

    def _state(self, trainer: Trainer, checkpointer: Checkpointer, data: dict[str, str]) -> tuple[State, list[str]]:
        """The train state to go on from, and what was wrong with newer checkpoints."""
        restored = restored_state(
            trainer,
            checkpointer,
            data,
            'Bring back the files as they were, or start another run directory; its parameters can be a start: '
            'Pretrain.initial_parameters.',
        )
        if restored is not None:
            return restored
        state = trainer.fresh_state()
        if self.initial_parameters is not None:
            found = restore_parameters(self.initial_parameters, trainer.abstract_state['parameters'])
            if found.metadata.get('vocabulary', data['vocabulary']) != data['vocabulary']:
                raise UserError(
                    'the vocabulary is not the one that these parameters were trained with',
                    where=str(found.path),
                    fix='Use that one: Pretrain.vocabulary can be the directory of that run.',
                )
            say(f'starting from the parameters of {found.path}')
            state['parameters'] = found.state
        return state, []

    def _check_best_metric(self, evaluation_sets: dict[str, EvaluationSet]) -> None:
        wanted = self.checkpoint.best_metric
        known = [f'{name}/{value}' for name in evaluation_sets for value in ('loss', 'perplexity', 'bits_per_byte')]
        if self.checkpoint.keep_best and wanted not in known:
            raise UserError(
                f'nothing is called {wanted!r}', where='CheckpointConfig.best_metric', fix=f'Use one of {known}.'
            )

    def _record_facts(
        self,
        directory: Path,
        trainer: Trainer,
        vocabulary: Vocabulary,
        examples: MixedExamples,
        evaluation_sets: dict[str, EvaluationSet],
        rejected: list[str],
        flops: TokenFlops,
    ) -> None:
        """Write what is known before the first step: environment.json and summary.json."""
        here = environment(dict(trainer.mesh.shape))
        write_atomically(directory / 'environment.json', json.dumps(here, indent=1, sort_keys=True) + '\n')
        records = [source.records for source in examples.sources]
        sets = [each.examples for each in evaluation_sets.values()]
        records += [each.records if isinstance(each, FixedExamples | StreamedExamples) else each for each in sets]
        caches = [rows.cache for rows in records if isinstance(rows, PackedRows)]
        update_summary(
            directory,
            {
                'total_steps': self.loop.total_steps,
                'facts': {
                    'parameters': count(self.model, trainer.specs).total,
                    'vocabulary size': vocabulary.size,
                    'tokens per step': self.step.batch_size * self.step.sequence_length,
                    'FLOPs per token': flops.training(causal=False),
                    **facts(examples),
                    **{
                        f'{component.name}: SHA-256': component.source.corpus_digest()
                        for component in self.data.training_components()
                        if isinstance(component.source, StandardLibrary)
                    },
                },
                'warnings': rejected,
                **bad_records(caches),
            },
        )
