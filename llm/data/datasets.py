"""What gin configures of the data: which sources, mixed how, packed how, evaluated on what."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from llm.data import tasks
from llm.data.curricula import Curriculum, CurriculumSchedule
from llm.data.examples import FixedExamples, MixedExamples, ShuffledExamples, StreamedExamples
from llm.data.index_maps import MixtureSchedule, temperature_rates
from llm.data.objectives import BatchKind, IndexArray, Objective
from llm.data.packing import PackedRows, PackingMode, evaluation_plan, training_plan
from llm.data.sources import Source, Split
from llm.data.token_cache import TokenCache, Tokenizer
from llm.data.token_cache_building import open_token_cache
from llm.errors import UserError


def default_cache_directory() -> Path:
    """$LLM_CACHE, or ~/.cache/llm-jax/tokens."""
    return Path(os.environ.get('LLM_CACHE') or '~/.cache/llm-jax/tokens').expanduser()


@dataclasses.dataclass(frozen=True)
class Component:
    """One source of a mixture.

    Args:
        name: for metrics and reports. It also keys the order of rows: sources of one mixture are shuffled apart.
        source: where the documents come from.
        rate: relative number of rows taken from it; None takes the number that it has (see `DataConfig.temperature`).
        max_epochs: the source is left out once each of its rows was read so many times; None repeats without end.
        objective: what is made of its rows; None takes that of DataConfig. So one source can be in a mixture under
            several objectives.
    """

    name: str
    source: Source
    rate: float | None = None
    max_epochs: float | None = None
    objective: Objective | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and not (self.rate > 0 and math.isfinite(self.rate)):
            raise UserError(f'rate = {self.rate} is not positive', where=self.name, fix='Leave the component out.')
        if self.max_epochs is not None and not self.max_epochs > 0:
            raise UserError(f'max_epochs = {self.max_epochs} is not positive', where=self.name)


@dataclasses.dataclass(frozen=True)
class SeqioMixture:
    """The tasks of a registered SeqIO mixture as components, with its rates; see `llm.data.tasks.SeqioTask`."""

    mixture: str
    modules: tuple[str, ...] = ()
    data_directory: str | None = None
    feature: str = 'targets'

    def components(self) -> tuple[Component, ...]:
        """One component a task. Imports SeqIO."""
        return tuple(
            Component(name, tasks.SeqioTask(name, self.data_directory, None, self.modules, self.feature), rate)
            for name, rate in tasks.mixture_rates(self.mixture, self.modules)
        )

    def evaluation(self) -> tuple[Component, ...]:
        """Every task."""
        return self.components()

    def curriculum(self) -> None:
        """SeqIO's rates do not change."""


@runtime_checkable  # so that a config's field can be annotated with it
class Mixture(Protocol):
    """Components that are listed elsewhere, with their rates: a frozen dataclass that gin configures."""

    def components(self) -> tuple[Component, ...]:
        """For training."""
        ...

    def evaluation(self) -> tuple[Component, ...]:
        """Those that have a validation split."""
        ...

    def curriculum(self) -> Curriculum | None:
        """How rates change over training; None where they do not."""
        ...


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """A named evaluation set, every token of it scored once.

    Attributes:
        examples: its rows, for `llm.data.loader.Loader`; rows from `num_rows` on are padding.
        num_rows: how many rows hold it.
        num_tokens: of its text, one end of document for each document among them: targets that carry loss, unless an
            objective says which do.
        num_bytes: UTF-8 bytes of its text: bits per byte is the summed loss / ln 2 / num_bytes. 0 under an objective,
            where the loss is not of all the text.
    """

    examples: PackedRows | FixedExamples | StreamedExamples
    num_rows: int
    num_tokens: int
    num_bytes: int

    def num_batches(self, batch_size: int) -> int:
        """How many batches hold all rows; the last is filled up with padding."""
        return -(-self.num_rows // batch_size)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Args:
        components: the sources of the training mixture; or a `SeqioMixture`, or a `PreparedMixture` of make_mixture.
        temperature: where components have no rates, they get min(rows, maximum_rows) ** (1 / temperature), as
            `seqio.mixing_rate_num_examples` has it with examples for rows. 1 is in proportion to size.
        maximum_rows: see temperature.
        packing: 'best_fit' cuts only documents longer than a row; 'concatenate' cuts the stream anywhere.
        attend_across_documents: let attention and positions run through the documents of a row.
        order: 'shuffled' rows, each epoch anew; 'contiguous' rows of one source, each of a batch going on from that of
            the batch before, for models with a memory, in evaluation too. For 'concatenate' across documents alone.
        objective: what is made of rows of tokens, anew in every epoch; None is causal language modelling. With one, a
            row's length is the encoder's, and noise in evaluation is always the same.
        seed: of all orders. Another seed is another order of the same rows, and other rows.
        evaluation: sources whose validation split is evaluated; None takes those of `components`.
        evaluation_stride: by how much the window moves over documents longer than a row, None by a whole row without
            context from before. Fewer give more context and more work.
        evaluation_documents: evaluate only so many documents of each set, chosen at random once and for all.
        cache_directory: of token caches; None takes $LLM_CACHE, or ~/.cache/llm-jax/tokens.
        workers: processes that tokenise; 0 takes one a processor.
    """

    components: tuple[Component, ...] | Mixture
    temperature: float = 1.0
    maximum_rows: int | None = None
    packing: PackingMode = 'best_fit'
    attend_across_documents: bool = False
    order: Literal['shuffled', 'contiguous'] = 'shuffled'
    objective: Objective | None = None
    seed: int = 0
    evaluation: tuple[Component, ...] | None = None
    evaluation_stride: int | None = None
    evaluation_documents: int | None = None
    cache_directory: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        for field in ('components', 'evaluation'):
            value = getattr(self, field)
            if isinstance(value, tuple):
                names = [component.name for component in value]
                if field == 'components' and not names:
                    raise UserError('components is empty', fix='Name at least one.')
                if len(set(names)) < len(names):
                    raise UserError(f'{field} has two of one name: {", ".join(sorted(names))}')
        if self.temperature <= 0:
            raise UserError(f'temperature = {self.temperature} is not positive')
        for field in ('maximum_rows', 'evaluation_stride', 'evaluation_documents'):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise UserError(f'{field} = {getattr(self, field)} is less than 1')
        if self.workers < 0:
            raise UserError(f'workers = {self.workers} is negative')
        self._check_rates()
        self._check_order()

    def open_training(
        self,
        vocabulary: Tokenizer,
        sequence_length: int,
        *,
        batch_size: int | None = None,
        total_steps: int | None = None,
        progress: bool = True,
    ) -> MixedExamples:
        """The training examples; caches and plans are made first.

        They are endless unless every component has max_epochs, or the mixture a curriculum.

        Args:
            sequence_length: S, tokens in a row.
            batch_size: rows of a batch, for order 'contiguous' and for a curriculum.
            total_steps: of the run, for a curriculum; with batch_size, for a look at whether the data suffice.
            progress: show bars while tokenising.

        Raises:
            UserError: as `open_token_cache`; or a component has so few rows beside the others that its share is lost;
                or every one has had its max_epochs before the run ends.
        """
        components = self.training_components()
        examples: list[ShuffledExamples | StreamedExamples] = []
        for component in components:
            cache = self._cache(component, 'train', vocabulary, progress)
            objective = self._objective(component)
            length, width, room = _row(objective, sequence_length, self.attend_across_documents)
            plan = training_plan(cache, length, self.packing, self.seed, room)
            rows = PackedRows(cache, plan, width, attend_across_documents=self.attend_across_documents)
            if self.order == 'contiguous':
                examples.append(StreamedExamples(rows, _given(batch_size), self.seed, component.name))
                continue
            functions = [] if objective is None else [objective.bind(vocabulary, sequence_length)]
            examples.append(ShuffledExamples(rows, self.seed, component.name, functions))
        _check_same(examples, [component.name for component in components])
        sizes = [example.records.num_rows for example in examples]
        limits = [
            None if component.max_epochs is None else max(1, math.floor(component.max_epochs * size))
            for component, size in zip(components, sizes, strict=True)
        ]
        names = [component.name for component in components]
        curriculum = None if isinstance(self.components, tuple) else self.components.curriculum()
        schedule = (
            MixtureSchedule(self._rates(components, sizes), limits, names)
            if curriculum is None
            else CurriculumSchedule(curriculum, names, limits, _given(total_steps), _given(batch_size))
        )
        _check_long_enough(schedule.length, batch_size, total_steps)
        return MixedExamples(examples, schedule, names)

    def open_evaluation(
        self, vocabulary: Tokenizer, sequence_length: int, *, batch_size: int | None = None, progress: bool = True
    ) -> dict[str, EvaluationSet]:
        """The evaluation sets by name. Documents are apart in them, whatever training does, but in order 'contiguous'.

        Raises:
            UserError: as `open_token_cache`; or the stride is longer than a row.
        """
        sets = {}
        for component in self.evaluation_components():
            cache = self._cache(component, 'validation', vocabulary, progress)
            if self.order == 'contiguous':
                plan = training_plan(cache, sequence_length, self.packing, 0)
                packed = PackedRows(cache, plan, sequence_length, attend_across_documents=True)
                num_bytes = int(cache.document_bytes().sum())
                streams = StreamedExamples(packed, _given(batch_size), None)
                num_tokens = int(plan.spans['length'].sum(dtype=int))
                sets[component.name] = EvaluationSet(streams, plan.num_rows, num_tokens, num_bytes)
                continue
            objective = self._objective(component)
            length, width, room = _row(objective, sequence_length, False)
            stride, documents = self.evaluation_stride, self.evaluation_documents
            plan, num_bytes = evaluation_plan(cache, length, stride, documents, room)
            spans = plan.spans
            num_tokens = int(spans['length'].sum(dtype=int) - spans['context'].sum(dtype=int))
            packed = PackedRows(cache, plan, width)
            rows: PackedRows | FixedExamples = packed
            if objective is not None:
                rows, num_bytes = FixedExamples(packed, [objective.bind(vocabulary, sequence_length)]), 0
            sets[component.name] = EvaluationSet(rows, plan.num_rows, num_tokens, num_bytes)
        return sets

    def objectives(self) -> list[Objective | None]:
        """Those of all components; None is causal language modelling."""
        components = self.components if isinstance(self.components, tuple) else ()
        found = [self._objective(each) for each in (*components, *(self.evaluation or ()))]
        return found or [self.objective]

    def kind(self) -> BatchKind:
        """What the batches are for: a decoder unless an objective says otherwise.

        Raises:
            UserError: components are for different models, or what is set besides does not go with the objectives.
        """
        objectives = self.objectives()
        kinds: set[BatchKind] = {'decoder' if each is None else each.batch_kind() for each in objectives}
        if len(kinds) > 1:
            raise UserError(
                f'objectives are for different models: {", ".join(sorted(kinds))}', where='DataConfig.components'
            )
        if any(objectives) and self.evaluation_stride is not None:
            raise UserError(
                'a stride gives context to causal language modelling alone',
                where='DataConfig.evaluation_stride',
                fix='Leave it out.',
            )
        kind = kinds.pop()
        if kind == 'encoder_decoder' and self.packing == 'concatenate' and not self.attend_across_documents:
            raise UserError(
                "packing is 'concatenate', which knows nothing of the room that two sides of a document take",
                where='DataConfig.packing',
                fix="Use 'best_fit', or attend_across_documents = True.",
            )
        return kind

    def extra_ids(self, vocabulary: Tokenizer) -> int:
        """How many ids after the vocabulary's the objectives use."""
        return max(0 if each is None else each.extra_ids(vocabulary) for each in self.objectives())

    def _objective(self, component: Component) -> Objective | None:
        return self.objective if component.objective is None else component.objective

    def training_components(self) -> tuple[Component, ...]:
        """The sources of the training mixture. Imports SeqIO if it is one of SeqIO's."""
        return self.components if isinstance(self.components, tuple) else self.components.components()

    def evaluation_components(self) -> tuple[Component, ...]:
        """The sources whose validation split is evaluated."""
        if self.evaluation is not None:
            return self.evaluation
        return self.components if isinstance(self.components, tuple) else self.components.evaluation()

    def _cache(self, component: Component, split: Split, vocabulary: Tokenizer, progress: bool) -> TokenCache:
        directory = self.cache_directory or default_cache_directory()
        return open_token_cache(component.source, split, vocabulary, directory, workers=self.workers, progress=progress)

    def _rates(self, components: tuple[Component, ...], sizes: list[int]) -> list[float]:
        rates = [component.rate for component in components if component.rate is not None]
        return rates or list(temperature_rates(sizes, temperature=self.temperature, maximum=self.maximum_rows))

    def _check_order(self) -> None:
        if self.order not in ('shuffled', 'contiguous'):
            raise UserError(f'order is {self.order!r}', where='DataConfig', fix="Use 'shuffled' or 'contiguous'.")
        if self.order == 'shuffled':
            return
        if self.packing != 'concatenate' or not self.attend_across_documents or self.evaluation_stride is not None:
            raise UserError(
                'rows that go on from one another run through documents, without a stride',
                where='DataConfig.order',
                fix="Set packing = 'concatenate', attend_across_documents = True and evaluation_stride = None.",
            )
        if not isinstance(self.components, tuple) or len(self.components) > 1 or any(self.objectives()):
            raise UserError(
                'rows that go on from one another are of one source, and as they are',
                where='DataConfig.order',
                fix="Use one component and no objective, or order = 'shuffled'.",
            )
        if self.evaluation_documents is not None:
            raise UserError(
                "evaluation_documents are chosen at random, and order is 'contiguous'",
                where='DataConfig.evaluation_documents',
                fix='Leave it out.',
            )

    def _check_rates(self) -> None:
        if isinstance(self.components, tuple):
            missing = [component.name for component in self.components if component.rate is None]
            if len(missing) == len(self.components):
                return
            if missing:
                raise UserError(
                    f'components have rates, but not {", ".join(missing)}',
                    fix='Give a rate to all of them, or to none.',
                )
        if self.temperature != 1 or self.maximum_rows is not None:
            raise UserError(
                'temperature and maximum_rows are for components without rates', fix='Leave them out, or the rates.'
            )


def _check_long_enough(length: int | None, batch_size: int | None, total_steps: int | None) -> None:
    """Raises UserError where a mixture ends before the run, which would find out after hours."""
    if length is not None and batch_size is not None and total_steps is not None and length < total_steps * batch_size:
        raise UserError(
            f'every component has had its max_epochs after {length // batch_size:,} steps, and the run has '
            f'{total_steps:,}',
            fix='Train for fewer steps, raise max_epochs, or remove it from one component.',
        )


def _given(value: int | None) -> int:
    if value is None:
        raise ValueError("order 'contiguous' needs the batch_size, and a curriculum total_steps, too")
    return value


def _row(
    objective: Objective | None, sequence_length: int, attend_across_documents: bool
) -> tuple[int, int, IndexArray | None]:
    """How a row of the batch is planned: (what it has room for, tokens of text at most, what pieces take of the room).

    The last is None where every token takes one.
    """
    if objective is None:
        return sequence_length, sequence_length, None
    longest = objective.window(sequence_length)
    lengths = np.arange(1, longest + 1)
    room = objective.room(lengths, sequence_length)
    if attend_across_documents or np.array_equal(room, lengths):
        return longest, longest, None
    most = math.floor(sequence_length * float(np.max(lengths / room)))
    return sequence_length, most, np.concatenate([[0], room])


def _check_same(examples: Sequence[ShuffledExamples | StreamedExamples], names: list[str]) -> None:
    """Raises UserError where the rows of a mixture do not have the same arrays."""
    if all(not each.post_cache for each in examples):
        return
    shapes = [{name: row.shape for name, row in each[0].items()} for each in examples]
    for shape, name in zip(shapes, names, strict=True):
        if shape != shapes[0]:
            raise UserError(
                f'rows of {names[0]} have {shapes[0]} and those of {name} {shape}',
                where='DataConfig.components',
                fix='Give their objectives the same target_length, or the same rate.',
            )
