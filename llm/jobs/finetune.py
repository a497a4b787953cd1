"""The finetune job: a trained model learns from labelled examples to classify, tag, say a number, or answer."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from llm.configuration import Invocation, render
from llm.data.examples import ShuffledExamples
from llm.data.labelled import LabelledFiles, LabelledRows, Task, label_names, read_labelled
from llm.data.loader import Loader
from llm.data.vocabularies import Vocabulary, load_vocabulary
from llm.errors import TRY_AGAIN, UserError
from llm.evaluation.reports import update_summary, write_report
from llm.jobs.compilation_cache import enable_compilation_cache
from llm.jobs.describe import describe
from llm.jobs.scoring_labels import AnswersConfig, Scorer
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
from llm.models.decoder import DecoderConfig
from llm.models.low_rank import LowRankConfig, attach
from llm.parallel import processes
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.sharding import AxisRules
from llm.scaling.accounting import count, flops_per_token, peak_flops
from llm.training.checkpoints import CheckpointConfig, Checkpointer
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


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Train the model of another run further, on labelled examples.

    Its run directory is one that `generate` and `finetune` read like a pretrain run's, with predictions.jsonl beside.

    Attributes:
        run_directory: where everything about the run is kept; run again, it resumes.
        base: the directory of the run whose model it is.
        task: what is learnt; see llm.data.labelled.
        training, evaluation: the files; evaluation is the set 'validation'.
        model: as it is trained; None for the base's, with an output for the task and `low_rank`.
        low_rank: adapters that are trained instead of the whole model; read when `model` is None.
        answers: of generation, how answers are made and scored.
    """

    run_directory: str
    base: str
    task: Task
    training: LabelledFiles
    evaluation: LabelledFiles
    optimizer: OptimizerConfig
    step: StepConfig
    loop: LoopConfig
    model: DecoderConfig | None = None
    low_rank: LowRankConfig | None = None
    answers: AnswersConfig = AnswersConfig()
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()
    pipeline: PipelineConfig = PipelineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __call__(self, invocation: Invocation) -> int:
        """Run it: a fresh run starts, a stopped one resumes, a finished one says so; TRY_AGAIN if it stops early."""
        directory = Path(self.run_directory)
        examples = read_labelled(self.training, self.task)
        held_out = read_labelled(self.evaluation, self.task)
        labels = label_names(examples, self.task)
        base = None if (directory / VOCABULARY).exists() and self.model is not None else open_trained_model(self.base)
        model = self.model or self._adapted(base, labels)
        if invocation.dry_run:
            total_steps = self.loop.total_steps
            print(describe(model, self.optimizer, self.step, total_steps, self.mesh, self.rules, self.pipeline))
            return 0
        trainer = Trainer(
            model, self.optimizer, self.step, self.loop.total_steps, self.mesh, self.rules, pipeline=self.pipeline
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
            length = self.step.sequence_length
            rows = LabelledRows(examples, vocabulary, self.task, length, labels)
            evaluation_rows = LabelledRows(held_out, vocabulary, self.task, length, labels)
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
            scorer = Scorer(trainer, evaluation_rows, evaluation_batches, vocabulary, self.answers)
            flops = flops_per_token(model, trainer.specs, length)
            if first:
                write_atomically(directory / _LABELS, json.dumps(labels) + '\n')
                self._record_facts(directory, trainer, rows, evaluation_rows, rejected)
            loop = TrainingLoop(
                trainer=trainer,
                config=self.loop,
                batches=batches,
                evaluations={
                    'validation': Evaluation(evaluation_batches, scorer.num_batches, score=scorer),
                },
                checkpointer=checkpointer,
                writer=stack.enter_context(MetricsWriter(directory, start, enabled=first)),
                run_directory=directory,
                metadata=data,
                flops_per_token=flops.training(causal=False),
                causal_flops_per_token=flops.training(causal=True),
                peak_flops=peak_flops(list(trainer.mesh.devices.flat)),
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

    def _adapted(self, base: TrainedModel | None, labels: tuple[str, ...]) -> DecoderConfig:
        """The base's model with an output for the task, and adapters."""
        assert base is not None
        outputs = {'generation': None, 'regression': 1}.get(self.task, len(labels))
        if base.config.low_rank is not None and self.low_rank is not None:
            raise UserError(
                'the base has adapters already',
                where='Finetune.low_rank',
                fix='Leave low_rank out to train those on.',
            )
        low_rank = self.low_rank or base.config.low_rank
        # Multi-token prediction is of text, and not used by what comes after.
        return dataclasses.replace(base.config, num_outputs=outputs, low_rank=low_rank, multi_token=None)

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
        assert isinstance(trainer.model_config, DecoderConfig)
        state['parameters'] = _started_from(found, state['parameters'], trainer.model_config, base.config)
        return state, []

    def _record_facts(
        self, directory: Path, trainer: Trainer, rows: LabelledRows, evaluation: LabelledRows, rejected: list[str]
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
                    **({'classes': len(rows.labels)} if rows.labels else {}),
                },
                'warnings': rejected,
            },
        )


def _started_from(found: Any, fresh: Any, model: DecoderConfig, base: DecoderConfig) -> Any:
    """The base's parameters in a model that has adapters or another output: those begin afresh."""
    heads = model.num_outputs is not None and model.num_outputs != base.num_outputs
    parameters = {}
    for name, part in fresh.items():
        if name == 'head' and heads:
            parameters[name] = part
        elif base.low_rank is None and model.low_rank is not None:
            parameters[name] = attach(found[name], part)
        else:
            parameters[name] = found[name]
    return parameters
