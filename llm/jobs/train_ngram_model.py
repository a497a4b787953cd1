"""The train_ngram_model job: an n-gram model of documents, for the perplexity stage of prepare_data."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.configuration import Invocation
from llm.data.documents.ngram_models.building import build_ngram_model
from llm.data.documents.ngram_models.estimating import KneserNey
from llm.data.documents.ngram_models.model import DESCRIPTION, LEAST_DOCUMENTS, load_ngram_model
from llm.data.documents.ngram_models.tokens import TokenConfig
from llm.data.sources import ReadCounts, check_names, read_documents
from llm.data.vocabularies import load_vocabulary
from llm.errors import UserError
from llm.jobs.train_tokenizer import NamedSource
from llm.parallel.processes import require_one
from llm.training.run_directory import claim
from llm.training.run_lock import RunLock


@dataclasses.dataclass(frozen=True)
class TrainNgramModel:
    """Estimate an n-gram model of the sources' train splits, and the percentiles of its perplexity on the others.

    Args:
        output_directory: gets ngram_model.json, the tables as arrays, and the words or the vocabulary. Run again with
            the same config, the job says that it is complete; a directory of another config is refused.
        sources: where the text comes from.
        model: its order and pruning.
        tokens: how texts become tokens.
        vocabulary: for tokens of that kind: a vocabulary as `load_vocabulary` reads it.
        held_out: whether to tell the percentiles of perplexity of the sources' validation splits, which are where
            head, middle and tail begin.
        min_tokens: shorter held-out documents do not count.
        memory_bytes: for sorting counts on disk, in output_directory.
    """

    output_directory: str
    sources: tuple[NamedSource, ...]
    model: KneserNey = KneserNey()
    tokens: TokenConfig = TokenConfig()
    vocabulary: str | None = None
    held_out: bool = True
    min_tokens: int = 20
    memory_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        names = [named.name for named in self.sources]
        if not names:
            raise UserError('there are no sources to learn from', fix='Set TrainNgramModel.sources.')
        check_names(names)
        if (self.vocabulary is not None) != (self.tokens.kind == 'vocabulary'):
            raise UserError(
                f'vocabulary = {self.vocabulary!r} does not go with tokens of kind {self.tokens.kind!r}',
                where='TrainNgramModel',
                fix="Give a vocabulary, and TokenConfig.kind = 'vocabulary', or neither.",
            )
        if self.min_tokens < 1 or self.memory_bytes < 1_000_000:
            raise UserError('min_tokens must be positive, and memory_bytes at least a million', where='TrainNgramModel')

    def __call__(self, invocation: Invocation) -> None:
        """Estimate, measure and write; or say what would be done."""
        if invocation.dry_run:
            print(self._plan())
            return
        require_one('train_ngram_model')
        directory = Path(self.output_directory)
        with RunLock(directory):
            claim(directory, self, invocation.operative_config, changeable=('output_directory', 'memory_bytes'))
            if (directory / DESCRIPTION).exists():
                print(f'{directory}: complete\n{_table(load_ngram_model(str(directory)).facts, self.held_out)}')
                return
            start = time.perf_counter()
            vocabulary = None if self.vocabulary is None else load_vocabulary(self.vocabulary)
            # That none is held out is to be said now, and not when the model is there.
            for named in self.sources if self.held_out else ():
                next(read_documents(named.source, 'validation'))
            counts = ReadCounts()
            facts = build_ngram_model(
                self._texts(counts),
                self._held_out(),
                directory,
                config=self.model,
                tokens=self.tokens,
                vocabulary=vocabulary,
                memory_bytes=self.memory_bytes,
                min_tokens=self.min_tokens,
            )
        print(_table(facts, self.held_out))
        seconds = time.perf_counter() - start
        print(f'{directory}: done in {seconds:.1f} s, {counts.bytes / 1e6 / seconds:.2f} MB/s')

    def _texts(self, counts: ReadCounts) -> Iterator[str]:
        for named in self.sources:
            before = counts.documents, counts.bytes
            yield from read_documents(named.source, 'train', counts)
            print(
                f'read {named.name}: {counts.documents - before[0]:,} documents, {counts.bytes - before[1]:,} bytes',
                flush=True,
            )

    def _held_out(self) -> Iterator[str]:
        for named in self.sources if self.held_out else ():
            yield from read_documents(named.source, 'validation')

    def _plan(self) -> str:
        model, tokens = self.model, self.tokens
        lines = [
            f'would estimate a {model.order}-gram model of {tokens.kind} into {self.output_directory}, pruning '
            f'{model.prune}, from'
        ]
        for named in self.sources:
            shards = len(named.source.shards('train'))
            lines.append(f'  {named.name}: {shards} shards')
        return '\n'.join(lines)


def _table(facts: dict[str, Any], held_out: bool) -> str:
    """What the model is, for the terminal; `held_out`: whether percentiles were to be told."""
    lines = [
        f'{n}-grams: {count:>12,}, discounts {", ".join(f"{value:.3f}" for value in discounts)}'
        + (' (the usual ones: too few n-grams to tell)' if n in facts['fallback_discounts'] else '')
        for n, (count, discounts) in enumerate(zip(facts['ngrams'], facts['discounts'], strict=True), start=1)
    ]
    if at := facts['percentiles']:
        figures = ', '.join(f'{at[percent]:,.1f} at {percent} %' for percent in (5, 30, 50, 60, 95))
        lines.append(f'perplexity of {facts["held_out_documents"]:,} held-out documents: {figures}')
    if held_out and (count := facts['held_out_documents']) < LEAST_DOCUMENTS:
        lines.append(
            f'warning: only {count} held-out documents are long enough: percentiles of fewer than {LEAST_DOCUMENTS} '
            'say little. Give a larger HELD_OUT_FRACTION, or more text'
        )
    return '\n'.join(lines)
