"""The ablate_data job: one small model a variant of the data and a seed, with equal tokens; which data is better?"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llm.configuration import Invocation, render
from llm.data.datasets import Component, DataConfig
from llm.data.documents.deduplication.overlap import overlaps
from llm.data.sources import Source, Split, check_names, read_documents
from llm.data.sources.files import file_identity, find_files
from llm.data.vocabularies import Vocabulary, VocabularyConfig, load_vocabulary
from llm.errors import UserError
from llm.evaluation import comparison
from llm.evaluation.multiple_choice import (
    SUFFIXES,
    ChoiceRow,
    ChoiceScorer,
    Item,
    MultipleChoiceSet,
    choice_rows,
)
from llm.jobs.ablation_results import CHOICES, Settings, write_results
from llm.jobs.pretrain import Pretrain
from llm.jobs.trained_model import open_trained_model
from llm.jobs.training_run import VOCABULARY, check_size, keep_vocabulary, say, train_on_groups
from llm.models.decoder import DecoderConfig
from llm.models.parameters import count_parameters, parameter_specs
from llm.parallel.mesh import MeshConfig, make_mesh
from llm.parallel.processes import require_one
from llm.parallel.sharding import AxisRules
from llm.scaling.accounting import flops_per_token, row_tokens
from llm.training.checkpoints import CheckpointConfig
from llm.training.loop import LoopConfig
from llm.training.optimizers import OptimizerConfig
from llm.training.run_directory import claim, write_atomically
from llm.training.run_lock import RunLock
from llm.training.step import StepConfig

_INPUTS, _OVERLAP = 'inputs.json', 'overlap.json'
_AT_ONCE = 1 << 16  # rows whose components are looked up


@dataclasses.dataclass(frozen=True)
class DataVariant:
    """What one model is trained on.

    Args:
        name: of the variant, and of its folder.
        data: its components and how they are mixed and packed. Seed and evaluation are the job's.
    """

    name: str
    data: DataConfig


@dataclasses.dataclass(frozen=True)
class AblateData:
    """Train the same model on each variant of the data, with equal tokens and several seeds, and compare.

    Runs of one seed begin with the same parameters. A variant that has less text repeats it. Given again after it was
    stopped, the job goes on with the run that was not finished, to the same bits.

    Args:
        output_directory: gets runs/VARIANT/seed_N (run directories, as `pretrain` makes them), vocabulary/,
            results.csv, verdict.json, report.html and curves.svg.
        variants: two or more; the others are compared with the first.
        held_out: sources whose validation split every model is evaluated on. None of them should be in a variant: the
            report says what is.
        multiple_choice: sets that every model answers at its end.
        vocabulary: what to train, on equal bytes of all variants; or the directory of a saved one.
        seeds: of initial parameters, dropout and the order of data; two or more, five to see small differences.
        max_length: tokens of context and choice; None takes the length of training rows. Contexts lose what is over
            at their beginning.
        confidence: of intervals. level: below which a corrected p-value counts.
        overlap_words: length of the runs of words by which held-out text is looked for in training text.
    """

    output_directory: str
    model: DecoderConfig
    variants: tuple[DataVariant, ...]
    held_out: tuple[Component, ...]
    vocabulary: VocabularyConfig | str
    optimizer: OptimizerConfig
    step: StepConfig
    loop: LoopConfig
    multiple_choice: tuple[MultipleChoiceSet, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    max_length: int | None = None
    confidence: float = 0.95
    level: float = 0.05
    overlap_words: int = 13
    mesh: MeshConfig = MeshConfig()
    rules: AxisRules = AxisRules()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self) -> None:
        def refuse(what: str, fix: str) -> None:
            raise UserError(what, where='AblateData', fix=fix)

        names = [variant.name for variant in self.variants]
        check_names(names)
        check_names([*(each.name for each in self.held_out), *(each.name for each in self.multiple_choice)])
        if len(names) < 2:
            refuse(f'there is {len(names)} variant, and nothing to compare', 'Give two or more.')
        if not self.held_out:
            refuse('there is no held-out set', 'Set held_out; it is the same for all variants.')
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            refuse(f'seeds are {self.seeds}', 'Give two or more different ones, or there are no intervals.')
        if not (0 < self.confidence < 1 and 0 < self.level < 1):
            refuse(
                f'confidence is {self.confidence} and level {self.level}, not between 0 and 1',
                'Use 0.95 and 0.05, for example.',
            )
        if self.overlap_words < 1:
            refuse(f'overlap_words is {self.overlap_words}', 'Use at least 1.')
        if self.max_length is not None and self.max_length < 2:
            refuse(f'max_length is {self.max_length}', 'Use at least 2, or None for the length of training rows.')
        if self.max_length and self.model.longest and self.max_length > self.model.longest:
            refuse(f'max_length is {self.max_length} and the model has {self.model.longest} positions', 'Use fewer.')
        if self.loop.patience:
            refuse('with patience, runs end after different numbers of tokens', 'Set LoopConfig.patience = 0.')
        if any(each.objective is not None for each in self.held_out):
            refuse('a held-out set has an objective', 'Leave it out: bits per byte are of all the text.')
        for variant in self.variants:
            if variant.data.evaluation is not None:
                refuse(f'{variant.name} has an evaluation of its own', 'Set held_out, which is the same for all.')
            if any(variant.data.objectives()):
                refuse(f'{variant.name} has an objective', 'Leave it out: bits per byte are of all the text.')
        first = self.variants[0].data
        for field in ('evaluation_stride', 'evaluation_documents', 'order'):
            if len({getattr(variant.data, field) for variant in self.variants}) > 1:
                refuse(f'variants differ in DataConfig.{field}, and would be measured differently', 'Make it equal.')
        if first.order != 'shuffled':
            refuse("order is 'contiguous'", 'Use models without a memory.')

    def __call__(self, invocation: Invocation) -> int:
        """Do the runs that are missing, score and compare; UserError for what is wrong with data, items or settings."""
        items = {each.name: each.items() for each in self.multiple_choice}
        inputs = self._inputs()
        if invocation.dry_run:
            print(self._plan(items))
            return 0
        require_one('ablate_data')
        comparison.check_installed()
        directory = Path(self.output_directory)
        with RunLock(directory):
            variable = ('data.cache_directory', 'data.workers')
            changeable = [f'variants.{i}.{name}' for i in range(len(self.variants)) for name in variable]
            changeable += ['mesh', 'rules', 'checkpoint', 'loop.profile_first_step', 'loop.profile_steps']
            claim(directory, self, invocation.operative_config, changeable=tuple(changeable))
            self._check_inputs(directory, inputs)
            overlap = self._overlap(directory, items)
            vocabulary = self._vocabulary(directory)
            rows = {name: self._rows(some, vocabulary) for name, some in items.items()}
            epochs = self._epochs(vocabulary)
            # All that can be wrong with the inputs was seen: until here another config may have the directory.
            write_atomically(directory / _INPUTS, json.dumps(inputs, indent=1, sort_keys=True) + '\n')
            write_atomically(directory / _OVERLAP, json.dumps(overlap, indent=1) + '\n')
            keep_vocabulary(directory, vocabulary)
            scorer = ChoiceScorer(self.model, make_mesh(self.mesh), self.rules)
            for seed in self.seeds:  # all variants of a seed, then the next: whenever it is stopped, pairs are whole
                for variant in self.variants:
                    job = self._run(directory, variant, seed)
                    code = job(dataclasses.replace(invocation, operative_config=render(job)))
                    if code:
                        return code
                    self._score(Path(job.run_directory), rows, scorer)
            runs = {
                variant.name: [_run_directory(directory, variant.name, seed) for seed in self.seeds]
                for variant in self.variants
            }
            print(write_results(directory, self._settings(), runs, items, overlap, epochs))
        return 0

    def _inputs(self) -> dict[str, str]:
        """What changes when the content of any input does, by what it is; fails for what cannot be read."""
        found = {}
        sides: tuple[tuple[str, Any, Any], ...] = tuple(
            (variant.name, variant.data.training_components(), 'train') for variant in self.variants
        )
        for name, components, split in (*sides, ('held out', self.held_out, 'validation')):
            for component in components:
                parts = [shard.fingerprint() for shard in component.source.shards(split)]
                found[f'{name}: {component.name}'] = hashlib.sha256(''.join(parts).encode()).hexdigest()
        for each in self.multiple_choice:
            parts = [file_identity(path) for path in find_files(each.files, SUFFIXES)]
            found[f'multiple choice: {each.name}'] = hashlib.sha256(''.join(parts).encode()).hexdigest()
        return found

    def _check_inputs(self, directory: Path, inputs: dict[str, str]) -> None:
        """Runs before and after a change of the data must not be compared."""
        path = directory / _INPUTS
        if path.exists():
            before = json.loads(path.read_text(encoding='utf-8'))
            changed = sorted(name for name in inputs.keys() | before.keys() if inputs.get(name) != before.get(name))
            if changed:
                raise UserError(
                    f'the content of {", ".join(changed)} is not what it was when this began',
                    where=str(directory),
                    fix='Bring it back, or use another output_directory.',
                )

    def _vocabulary(self, directory: Path) -> Vocabulary:
        """The one that all runs use: that of the directory, or the one given, or a new one."""
        kept = directory / VOCABULARY
        if kept.exists():
            return load_vocabulary(kept)
        if isinstance(self.vocabulary, str):
            vocabulary = load_vocabulary(Path(self.vocabulary))
        else:
            groups = [[each.source for each in variant.data.training_components()] for variant in self.variants]
            vocabulary = train_on_groups(self.vocabulary, groups, self.model.vocab_size, even=True)
        check_size(vocabulary, self.model)
        return vocabulary

    def _rows(self, items: list[Item], vocabulary: Vocabulary) -> list[list[ChoiceRow]]:
        return choice_rows(items, vocabulary, self.max_length or self.step.sequence_length)

    def _epochs(self, vocabulary: Vocabulary) -> dict[str, dict[str, float]]:
        """How often a run reads the text of each variant, by component; fills the token caches of all.

        Raises:
            UserError: one has no text, or max_epochs ends it before the steps do: not when runs of others are done.
        """
        batch, length, steps = self.step.batch_size, self.step.sequence_length, self.loop.total_steps
        found = {}
        for variant in self.variants:
            data = dataclasses.replace(variant.data, seed=self.seeds[0])
            try:
                examples = data.open_training(vocabulary, length, batch_size=batch, total_steps=steps)
                read = np.zeros(len(examples.names), np.int64)
                for begin in range(0, steps * batch, _AT_ONCE):
                    rows = np.arange(begin, min(begin + _AT_ONCE, steps * batch))
                    read += np.bincount(examples.schedule.locate(rows)[0], minlength=len(read))
            except UserError as error:
                raise UserError(error.what, where=error.where or variant.name, fix=error.fix) from error
            sizes = [source.records.num_rows for source in examples.sources]
            found[variant.name] = dict(zip(examples.names, (read / sizes).tolist(), strict=True))
        return found

    def _run(self, directory: Path, variant: DataVariant, seed: int) -> Pretrain:
        """The run of a variant with a seed."""
        return Pretrain(
            run_directory=str(_run_directory(directory, variant.name, seed)),
            model=self.model,
            data=dataclasses.replace(variant.data, seed=seed, evaluation=self.held_out),
            vocabulary=str(directory / VOCABULARY),
            optimizer=self.optimizer,
            step=dataclasses.replace(self.step, seed=seed),
            loop=self.loop,
            mesh=self.mesh,
            rules=self.rules,
            checkpoint=self.checkpoint,
        )

    def _score(self, run: Path, rows: dict[str, list[list[ChoiceRow]]], scorer: ChoiceScorer) -> None:
        """Answer the sets of multiple choice with a finished run, unless that was done."""
        path = run / CHOICES
        if path.exists() or not rows:
            return
        parameters = open_trained_model(run).restore(make_mesh(self.mesh), self.rules, self.loop.total_steps).state
        found = {name: [x.tolist() for x in scorer(parameters, some)] for name, some in rows.items()}
        write_atomically(path, json.dumps(found) + '\n')

    def _settings(self) -> Settings:
        return Settings(
            held_out=tuple(each.name for each in self.held_out),
            seeds=self.seeds,
            total_steps=self.loop.total_steps,
            batch_size=self.step.batch_size,
            sequence_length=self.step.sequence_length,
            confidence=self.confidence,
            level=self.level,
            overlap_words=self.overlap_words,
        )

    def _overlap(self, directory: Path, items: dict[str, list[Item]]) -> dict[str, dict[str, Any]]:
        """What of the held-out texts is in each variant's training text, found once."""
        path = directory / _OVERLAP
        if path.exists():
            read: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding='utf-8'))
            return read
        say('looking for held-out text in the training text')
        texts = {each.name: list(_documents(each.name, each.source, 'validation')) for each in self.held_out}
        texts |= {name: [each.context + each.choices[each.answer] for each in some] for name, some in items.items()}
        found = {}
        for variant in self.variants:
            training = itertools.chain.from_iterable(
                _documents(f'{variant.name}: {each.name}', each.source, 'train')
                for each in variant.data.training_components()
            )
            shared = overlaps(texts, training, self.overlap_words)
            found[variant.name] = {name: dataclasses.asdict(each) for name, each in shared.items()}
        return found

    def _plan(self, items: dict[str, list[Item]]) -> str:
        """What would be run."""
        specs = parameter_specs(self.model.build())
        tokens = self.loop.total_steps * self.step.batch_size * self.step.sequence_length
        row = row_tokens(self.model, self.step.sequence_length)
        flops = flops_per_token(self.model, specs, row).training(causal=False)
        runs = len(self.variants) * len(self.seeds)
        lines = [
            f'would train {runs} models of {count_parameters(specs):,} parameters into {self.output_directory}: '
            f'{len(self.variants)} variants, seeds {", ".join(map(str, self.seeds))}',
            f'each on {self.loop.total_steps:,} steps of {tokens // self.loop.total_steps:,} tokens = {tokens:,} '
            f'tokens, {flops * tokens:.4g} FLOPs; together {runs * tokens:,} tokens, {runs * flops * tokens:.4g} '
            'FLOPs, without evaluation',
        ]
        for variant in self.variants:
            shards = {each.name: len(each.source.shards('train')) for each in variant.data.training_components()}
            parts = ', '.join(f'{name} ({number:,} shards)' for name, number in shards.items())
            lines.append(f'  {variant.name}: {parts}')
        lines.append(f'evaluated on {", ".join(each.name for each in self.held_out)}')
        lines += [f'  {name}: {len(some):,} items of multiple choice' for name, some in items.items()]
        return '\n'.join(lines)


def _documents(name: str, source: Source, split: Split) -> Iterator[str]:
    """The documents; an error that does not say where it is gets the name."""
    try:
        yield from read_documents(source, split)
    except UserError as error:
        if error.where:
            raise
        raise UserError(error.what, where=name, fix=error.fix) from error


def _run_directory(directory: Path, variant: str, seed: int) -> Path:
    return directory / 'runs' / variant / f'seed_{seed}'
