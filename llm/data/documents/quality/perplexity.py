"""Documents by what a language model makes of them: far from good text, or so well predicted that they repeat (CCNet).

A scorer gives every document a perplexity; what becomes of it is decided here, for all scorers.
"""

import abc
import collections
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document
from llm.data.documents.ngram_models.model import LEAST_DOCUMENTS, check_content, load_ngram_model, percentiles_of
from llm.data.documents.quality.batch import Batch
from llm.data.documents.quality.rules import Chance, Exempt, Judgement, Rules
from llm.data.sources.files import file_identity, file_states, find_files
from llm.errors import UserError

BUCKETS = ('head', 'middle', 'tail')
# Of more, percentiles are of an even part: each process has them in memory.
_MOST_FIGURES = 1 << 21


@dataclasses.dataclass(frozen=True)
class PerplexityLimits:
    """Which perplexities stay: a set of rules, over what a stage has written into the documents' metadata.

    Documents without a perplexity, as short ones, or without a bucket stay.

    Args:
        least: a lower one is of text that repeats itself, or is known by heart.
        most: a higher one is of text unlike what the model has learnt from.
        buckets: those that stay, of head, middle and tail.
        measure: name of the figure; the stage sets its own.
    """

    least: float | None = None
    most: float | None = None
    buckets: tuple[str, ...] = BUCKETS
    measure: str = 'perplexity'

    def __post_init__(self) -> None:
        if self.least is not None and self.most is not None and self.least > self.most:
            raise UserError(f'least = {self.least} is above most = {self.most}', where='PerplexityLimits')
        if unknown := sorted(set(self.buckets) - set(BUCKETS)):
            raise UserError(
                f'{unknown[0]!r} is no bucket', where='PerplexityLimits.buckets', fix=f'There are {", ".join(BUCKETS)}.'
            )

    @property
    def name(self) -> str:
        return self.measure

    @property
    def rules(self) -> tuple[str, str]:
        """The value of the first is the perplexity, of the second 0 for head, 1 for middle, 2 for tail."""
        return f'{self.measure}/range', f'{self.measure}/bucket'

    @property
    def bounds(self) -> tuple[Bounds, Bounds]:
        """Of the buckets where those that stay lie together; head and tail without middle have no two bounds."""
        within, bucket = self.rules
        stay = [i for i, name in enumerate(BUCKETS) if name in self.buckets]
        if not stay or len(stay) == len(BUCKETS) or stay[-1] - stay[0] >= len(stay):
            return Bounds(within, self.least, self.most), Bounds(bucket)
        return Bounds(within, self.least, self.most), Bounds(bucket, stay[0], stay[-1])

    def judge(self, batch: Batch) -> Judgement:
        known = [document.metadata for document in batch.documents]
        values = np.array([some.get(self.measure, np.nan) for some in known], np.float64)
        names = [some.get(bucket_field(self.measure)) for some in known]
        buckets = np.array([np.nan if name is None else BUCKETS.index(name) for name in names], np.float64)
        keep = np.array([name is None or name in self.buckets for name in names], np.bool_)
        return Judgement((values, buckets), (self.bounds[0].keep(values), keep), batch)


def bucket_field(measure: str) -> str:
    """The field of metadata that has the bucket."""
    return f'{measure}_bucket'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerplexityFilter(abc.ABC):
    """A stage that scores documents, puts them into buckets, and keeps those within limits.

    The perplexity goes into the metadata as `name`, its bucket as `name`_bucket, and both into the ledger. Head is up
    to the first boundary, middle up to the second. The boundaries of a document are those of its language, from the
    first of these that has them: `boundaries`, `reference`, the scorer's own percentiles.

    Args:
        name: of the stage, of the figure and of its rules.
        limits: what stays.
        exempt: other limits for some documents; of several that match, the first counts.
        chances: rules ('NAME/range', 'NAME/bucket') that let a part of what they would remove stay.
        min_tokens: shorter texts get no perplexity and stay.
        percentiles: where head and middle end, in per cent of the reference's documents.
        boundaries: (language, end of head, end of middle); '' is for documents of which no language is known.
        reference: glob of ledger files of an earlier run with a stage of this name: the percentiles of its figures,
            by language, of those of which it has at least 20 (of more than two million, of an even part).
    """

    name: str
    limits: PerplexityLimits = PerplexityLimits()
    exempt: tuple[Exempt, ...] = ()
    chances: tuple[Chance, ...] = ()
    min_tokens: int = 20
    percentiles: tuple[float, float] = (30, 60)
    boundaries: tuple[tuple[str, float, float], ...] = ()
    reference: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise UserError(f'min_tokens = {self.min_tokens} is not positive', where=self.name)
        if not 0 <= self.percentiles[0] <= self.percentiles[1] <= 100:
            raise UserError(f'percentiles = {self.percentiles} do not rise from 0 to 100', where=self.name)
        for language, head, middle in self.boundaries:
            if head > middle:
                raise UserError(f'boundaries of {language!r}: {head} is above {middle}', where=self.name)
        for other in self.exempt:
            if not isinstance(other.rules, PerplexityLimits):
                raise UserError(f'exempt has {type(other.rules).__name__}, not PerplexityLimits', where=self.name)
        self._judge  # noqa: B018 - refuses chances of rules that there are not

    @property
    def rules(self) -> tuple[str, ...]:
        """'NAME/range' and 'NAME/bucket'."""
        return self._judge.rules

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """Of `limits`, and those of `exempt`."""
        return self._judge.bounds

    @abc.abstractmethod
    def perplexities(self, documents: Sequence[Document]) -> np.ndarray:
        """float64 [D]; NaN for documents that are short or that there is no model for."""

    @abc.abstractmethod
    def identities(self) -> list[str]:
        """Change where the content of what is read does."""

    def own_percentiles(self, language: str | None) -> Sequence[float]:
        """Perplexities at 0, 1, ..., 100 per cent of what the scorer was measured on; empty where it was not."""
        del language
        return ()

    def reference_identities(self) -> list[str]:
        """Of the reference."""
        return [] if self.reference is None else [file_identity(path) for path in _ledgers(self.reference)]

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        values = self.perplexities(documents)
        ends: dict[str | None, tuple[float, float] | None] = {}
        measured = []
        for document, value in zip(documents, values.tolist(), strict=True):
            fields = {
                key: field
                for key, field in document.metadata.items()
                if key not in (self.name, bucket_field(self.name))
            }
            if value == value:  # noqa: PLR0124 - is no NaN
                fields[self.name] = value
                if document.language not in ends:
                    ends[document.language] = self._ends(document.language)
                if end := ends[document.language]:
                    fields[bucket_field(self.name)] = BUCKETS[(value > end[0]) + (value > end[1])]
            measured.append(dataclasses.replace(document, metadata=fields))
        return self._judge(measured)

    @property
    def _judge(self) -> Rules:
        limits = dataclasses.replace(self.limits, measure=self.name)
        exempt = tuple(
            dataclasses.replace(other, rules=dataclasses.replace(other.rules, measure=self.name))  # type: ignore[type-var]
            for other in self.exempt
        )
        return Rules((limits,), exempt, self.chances)

    def _ends(self, language: str | None) -> tuple[float, float] | None:
        """Where head and middle end."""
        given = {name: (head, middle) for name, head, middle in self.boundaries}
        if (language or '') in given:
            return given[language or '']
        at: Sequence[float] = ()
        if self.reference is not None:
            at = _reference_percentiles(self.reference, f'{self.name}/range').get(language, ())
        at = at or self.own_percentiles(language)
        if not at:
            return None
        head, middle = np.interp(self.percentiles, np.arange(101), at)
        return float(head), float(middle)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(PerplexityFilter):
    """Perplexity per token of an n-gram model, </s> of every sentence counted (Wenzek et al. 2020).

    Args:
        model: directory of the model for documents of languages that `models` lacks; None gives these no perplexity.
        models: (language, directory) pairs.
    """

    name: str = 'perplexity'
    model: str | None = None
    models: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None and not self.models:
            raise UserError('there is no model', where='Perplexity', fix='Set Perplexity.model or Perplexity.models.')

    def identities(self) -> list[str]:
        """Of all models, every file of them checked, and of the reference."""
        directories = [directory for _, directory in self.models] + ([self.model] if self.model else [])
        for directory in directories:
            load_ngram_model(directory)
        return [check_content(directory) for directory in directories] + self.reference_identities()

    def perplexities(self, documents: Sequence[Document]) -> np.ndarray:
        values = np.full(len(documents), np.nan)
        directories = [self._directory(document.language) for document in documents]
        for directory in {name: None for name in directories if name is not None}:
            some = [i for i, name in enumerate(directories) if name == directory]
            texts = [documents[i].text for i in some]
            values[some] = load_ngram_model(directory).perplexities(texts, self.min_tokens)
        return values

    def own_percentiles(self, language: str | None) -> Sequence[float]:
        directory = self._directory(language)
        return () if directory is None else load_ngram_model(directory).percentiles

    def _directory(self, language: str | None) -> str | None:
        return dict(self.models).get(language or '', self.model)


def _ledgers(reference: str | tuple[str, ...]) -> tuple[str, ...]:
    return find_files(reference, ('.parquet',))


def _reference_percentiles(reference: str | tuple[str, ...], rule: str) -> dict[str | None, list[float]]:
    """By language, the figures of a rule in ledger files at 0, 1, ..., 100 per cent."""
    paths = _ledgers(reference)
    return _percentiles_in(paths, file_states(paths), rule)


class _Figures:
    """Figures that come up one after the other, for their percentiles; of very many every second one, fourth, ..."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []
        self._step, self._seen = 1, 0

    def add(self, some: np.ndarray) -> None:
        self._parts.append(some[-self._seen % self._step :: self._step])
        self._seen += len(some)
        while sum(map(len, self._parts)) > _MOST_FIGURES:
            self._parts = [np.concatenate(self._parts)[::2]]
            self._step *= 2

    def percentiles(self) -> list[float]:
        """At 0, 1, ..., 100 per cent; empty for too few."""
        return percentiles_of(np.concatenate(self._parts)) if self._seen >= LEAST_DOCUMENTS else []


@functools.lru_cache(maxsize=8)
def _percentiles_in(
    paths: tuple[str, ...], states: tuple[tuple[int, int, int] | None, ...], rule: str
) -> dict[str | None, list[float]]:
    import pyarrow
    import pyarrow.parquet

    figures: dict[str | None, _Figures] = collections.defaultdict(_Figures)
    for path in paths:
        fix = 'Give ledger/*.parquet of a run with a stage of this name.'
        try:
            columns = pyarrow.parquet.read_schema(path).names
            if not {'language', f'{rule}.value'} <= set(columns):
                raise UserError(f'is no ledger with figures of {rule!r}', where=path, fix=fix)
            table = pyarrow.parquet.read_table(path, columns=['language', f'{rule}.value'])
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f'cannot be read as Parquet ({error})', where=path, fix=fix) from error
        values = table[f'{rule}.value'].to_numpy()
        languages = table['language'].combine_chunks().dictionary_encode()
        numbers = languages.indices.fill_null(len(languages.dictionary)).to_numpy()
        known = np.isfinite(values)
        order = np.flatnonzero(known)[np.argsort(numbers[known], kind='stable')]
        ends = np.cumsum(np.bincount(numbers[known], minlength=len(languages.dictionary) + 1))
        names = [*languages.dictionary.to_pylist(), None]
        for name, some in zip(names, np.split(values[order], ends[:-1]), strict=True):
            if len(some):
                figures[name].add(some)
    return {language: found for language, some in figures.items() if (found := some.percentiles())}
