"""The train_tokenizer job: a vocabulary learnt from an even sample of several sources, and a report on it."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.configuration import Invocation
from llm.data.datasets import Component, Mixture
from llm.data.sources import ReadCounts, Source, check_names, read_documents
from llm.data.vocabularies import Vocabulary, VocabularyConfig, write_vocabulary
from llm.data.vocabularies.measuring import measure_fit
from llm.data.vocabularies.training import sample_documents, train_on_sample
from llm.errors import UserError
from llm.jobs.tokenizer_report import render
from llm.parallel.processes import require_one
from llm.training.run_directory import claim, write_atomically
from llm.training.run_lock import RunLock

VOCABULARY, EXPORT, REPORT, PAGE = 'vocabulary', 'hugging_face', 'report.json', 'report.html'
_LISTED = 200  # tokens in each of the report's lists


@dataclasses.dataclass(frozen=True)
class NamedSource:
    """A source of documents under the name that the report calls it by."""

    name: str
    source: Source


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Train a vocabulary on equal bytes of each source, and report how it fits text of each that it has not seen.

    The sample depends on the documents' content and the seed: not on their order, not on how they lie in files.

    Args:
        output_directory: gets vocabulary/ (for `load_vocabulary`), hugging_face/ (a tokenizer.json and settings, for
            other programs; the .model file, too, of SentencePiece), report.json and report.html. Run again with the
            same config, the job says that it is complete; a directory of another config is refused.
        vocabulary: what to train; its `sample_bytes` are shared equally among the sources.
        sources: where the text comes from, also a `PreparedMixture` for all its components alike; the train split is
            learnt from, the validation split is measured on. Components of a mixture without one are not measured.
        held_out_bytes: bytes of each source's validation split, chosen like the sample, that are measured on.
    """

    output_directory: str
    vocabulary: VocabularyConfig
    sources: tuple[NamedSource, ...] | Mixture
    held_out_bytes: int = 1_000_000

    def __post_init__(self) -> None:
        if isinstance(self.sources, tuple):
            if not self.sources:
                raise UserError('there are no sources to learn from', fix='Set TrainTokenizer.sources')
            check_names([named.name for named in self.sources])
        if self.vocabulary.kind != 'bytes':
            self.vocabulary.required_size()
        if self.held_out_bytes <= 0:
            raise UserError(f'held_out_bytes = {self.held_out_bytes} is not positive')
        if isinstance(self.sources, tuple):
            self._share(self.sources)

    def _share(self, sources: Sequence[NamedSource | Component]) -> int:
        """Bytes of each source."""
        if self.vocabulary.sample_bytes < len(sources):
            raise UserError(f'{self.vocabulary.sample_bytes} sample bytes cannot be shared by {len(sources)} sources')
        return self.vocabulary.sample_bytes // len(sources)

    def __call__(self, invocation: Invocation) -> None:
        """Train, measure and write; or say what would be done."""
        sources = self.sources if isinstance(self.sources, tuple) else self.sources.components()
        share = self._share(sources)
        evaluated = self.sources if isinstance(self.sources, tuple) else self.sources.evaluation()
        measured = {named.name for named in evaluated}
        if invocation.dry_run:
            print(self._plan(sources, share))
            return
        require_one('train_tokenizer')
        directory = Path(self.output_directory)
        with RunLock(directory):
            claim(directory, self, invocation.operative_config, changeable=('output_directory',))
            if (directory / REPORT).exists():
                print(f'{directory}: complete; see {directory / PAGE}')
                return
            start = time.perf_counter()
            readings = [
                _Reading.of(named, share, self.held_out_bytes if named.name in measured else None, self.vocabulary.seed)
                for named in sources
            ]
            sample = [text for reading in readings for text in reading.sample]
            print(f'learning from {sum(len(text.encode()) for text in sample):,} bytes', flush=True)
            vocabulary = train_on_sample(self.vocabulary, sample)
            vocabulary.save(directory / VOCABULARY)
            write_vocabulary(vocabulary, directory / EXPORT)
            report = _report(self.vocabulary, vocabulary, readings, share)
            write_atomically(directory / PAGE, render(report))
            # Last, because it says that the job is complete.
            write_atomically(directory / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + '\n')
        print(f'{_summary(report)}\n{directory}: done in {time.perf_counter() - start:.1f} s; see {directory / PAGE}')

    def _plan(self, sources: Sequence[NamedSource | Component], share: int) -> str:
        size = '' if self.vocabulary.size is None else f' of {self.vocabulary.size:,} tokens'
        lines = [f'would train a {self.vocabulary.kind} vocabulary{size} into {self.output_directory}, from']
        for named in sources:
            counted = {split: len(named.source.shards(split)) for split in ('train', 'validation')}
            shards = f'{counted["train"]} shards to learn from, {counted["validation"]} to measure on'
            lines.append(f'  {named.name}: up to {share:,} bytes; {shards}')
        return '\n'.join(lines)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """What was read of a source: samples of both splits (None held out: not measured), and what reading them met."""

    name: str
    sample: list[str]
    held_out: list[str] | None
    train_counts: ReadCounts
    validation_counts: ReadCounts

    @classmethod
    def of(cls, named: NamedSource | Component, share: int, held_out_bytes: int | None, seed: int) -> '_Reading':
        train, validation = ReadCounts(), ReadCounts()
        sample = sample_documents(read_documents(named.source, 'train', train), share, seed)
        held_out = None
        if held_out_bytes is not None:
            held_out = sample_documents(read_documents(named.source, 'validation', validation), held_out_bytes, seed)
        print(f'read {named.name}: {train.documents:,} documents, {train.bytes:,} bytes to learn from', flush=True)
        return cls(named.name, sample, held_out, train, validation)


def _report(config: VocabularyConfig, vocabulary: Vocabulary, readings: list[_Reading], share: int) -> dict[str, Any]:
    """What report.json holds."""
    sources, warnings = {}, []
    uses = np.zeros(vocabulary.size, np.int64)
    for reading in readings:
        learnt, held_out = measure_fit(vocabulary, reading.sample), measure_fit(vocabulary, reading.held_out or ())
        uses += learnt.uses + held_out.uses
        sources[reading.name] = {
            'sampled_bytes': learnt.bytes,
            'sampled_bytes_per_token': learnt.bytes_per_token,
            'held_out_bytes': held_out.bytes,
            'held_out_bytes_per_token': None if reading.held_out is None else held_out.bytes_per_token,
            'held_out_tokens_per_word': None if reading.held_out is None else held_out.fertility,
            'train': reading.train_counts.as_dict(),
            'validation': reading.validation_counts.as_dict(),
        }
        if learnt.bytes < share - 3 and config.kind != 'bytes':  # a sample may end before a character that does not fit
            warnings.append(f'{reading.name} has only {learnt.bytes:,} bytes of its share of {share:,}: uneven sample')
        if reading.held_out is None:
            warnings.append(f'{reading.name} has no documents of the validation split, and is not measured')
        for split, counts in (('train', reading.train_counts), ('validation', reading.validation_counts)):
            if counts.invalid_utf8 or counts.skipped:
                bad = f'{counts.invalid_utf8} documents with invalid UTF-8, {counts.skipped} bad records left out'
                warnings.append(f'{reading.name}, {split}: {bad}')
    table = vocabulary.token_bytes()
    ordinary = [token for token in range(vocabulary.size) if table[token]]
    unused = [token for token in ordinary if uses[token] == 0]
    longest = sorted(ordinary, key=lambda token: (-len(table[token]), token))
    return {
        'kind': config.kind,
        'size': vocabulary.size,
        'digest': vocabulary.digest,
        'special_tokens': vocabulary.special_ids,
        'warnings': warnings,
        'sources': sources,
        'num_unused_tokens': len(unused),
        'unused_tokens': [_shown(token, table, uses) for token in unused[:_LISTED]],
        'longest_tokens': [_shown(token, table, uses) for token in longest[:_LISTED]],
    }


def _shown(token: int, table: list[bytes], uses: np.ndarray) -> dict[str, Any]:
    text = table[token].decode(errors='backslashreplace')
    return {'id': token, 'text': text, 'bytes': len(table[token]), 'uses': int(uses[token])}


def _summary(report: dict[str, Any]) -> str:
    """The figures of the report as a table for the terminal."""
    lines = [f'{"source":24}{"bytes per token":>18}{"tokens per word":>18}   (held-out text)']
    for name, source in report['sources'].items():
        if source['held_out_bytes_per_token'] is None:
            continue
        figures = f'{source["held_out_bytes_per_token"]:>18.3f}{source["held_out_tokens_per_word"]:>18.3f}'
        lines.append(f'{name:24}{figures}')
    lines += [f'warning: {warning}' for warning in report['warnings']]
    lines.append(f'{report["num_unused_tokens"]:,} of {report["size"]:,} tokens came up nowhere')
    return '\n'.join(lines)
