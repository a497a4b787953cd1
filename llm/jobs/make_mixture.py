"""The make_mixture job: prepared documents to a training mixture that is read by the name of its directory."""

import dataclasses
import inspect
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any, Literal

from llm.configuration import Invocation
from llm.data.curricula import Curriculum
from llm.data.datasets import default_cache_directory
from llm.data.mixtures import reading
from llm.data.mixtures.parts import Part, text_digest
from llm.data.mixtures.prepared import VERSION, RecordedSource, check, read_record
from llm.data.mixtures.shares import outcome, table
from llm.data.sources import ReadCounts, Split
from llm.data.token_cache_building import open_token_cache
from llm.data.vocabularies import Vocabulary, load_vocabulary
from llm.errors import UserError
from llm.parallel.processes import require_one
from llm.training.run_directory import claim, write_atomically
from llm.training.run_lock import RunLock

TASKS = 'tasks.py'


@dataclasses.dataclass(frozen=True)
class MakeMixture:
    """Put components together, count them, and write which documents at which rates a run shall read.

    Args:
        output_directory: gets mixture.json (components, files with digests, rates, counts, epochs), tasks.py (the same
            as SeqIO tasks, for other programs) and plain/ (copies of plain sources). Run again with the same config,
            the job checks that files are still what they were.
        parts: the components.
        name: of the SeqIO mixture; its tasks are NAME:COMPONENT.
        temperature: of components without weights: rates are size ** (1 / temperature).
        curriculum: rates that change over training, in place of weights.
        budget: how much a run reads, for epochs and warnings; None is every component once, or `epochs` times.
        budget_unit: of what.
        vocabulary: directory or file of the vocabulary that counts tokens, and whose token cache is made on the way;
            with None sizes are bytes.
        validation_fraction: the part of the documents of prepared directories that is held out, by a hash of their
            ids: the same ones in every mixture. With a larger fraction it is those and more.
        cache_directory: of token caches; None takes $LLM_CACHE, or ~/.cache/llm-jax/tokens.
        workers: processes that tokenise; 0 takes one a processor.
    """

    output_directory: str
    parts: tuple[Part, ...]
    name: str = 'mixture'
    temperature: float = 1.0
    curriculum: Curriculum | None = None
    budget: int | None = None
    budget_unit: Literal['tokens', 'bytes', 'documents'] = 'tokens'
    vocabulary: str | None = None
    validation_fraction: float = 0.01
    cache_directory: str | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if not names:
            raise UserError('there are no components', where='MakeMixture.parts', fix='Name at least one.')
        for name in names:
            if names.count(name) > 1:
                raise UserError(f'two components are called {name!r}', where='MakeMixture.parts')
        if not re.fullmatch(r'[A-Za-z0-9_.]+', self.name):
            raise UserError(f'name {self.name!r} is not of letters, digits, _ and .', where='MakeMixture.name')
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f'validation_fraction = {self.validation_fraction} is not in [0, 1)')
        if not self.temperature > 0:
            raise UserError(f'temperature = {self.temperature} is not positive')
        self._check_rates(names)
        if self.budget is not None and self.budget < 1:
            raise UserError(f'budget = {self.budget} is less than 1')
        counted = 'bytes' if self.vocabulary is None else 'tokens'
        if self.budget is not None and self.budget_unit not in (counted, 'documents'):
            raise UserError(
                f'budget is in {self.budget_unit}, and what is counted is {counted}',
                where='MakeMixture.budget_unit',
                fix='Set vocabulary to count tokens, or leave it out to count bytes.',
            )

    def _check_rates(self, names: list[str]) -> None:
        weighted = [part.name for part in self.parts if part.weight is not None]
        if self.curriculum is not None:
            if weighted or self.temperature != 1 or any(part.epochs > 1 for part in self.parts):
                raise UserError(
                    'a curriculum says the rates, and there are weights, a temperature or epochs above 1',
                    where='MakeMixture.curriculum',
                    fix='Leave these out.',
                )
            self.curriculum.integrals(names, 1)  # raises where they are of others
        elif weighted and len(weighted) < len(names):
            raise UserError(
                f'components have weights, but not {", ".join(name for name in names if name not in weighted)}',
                where='MakeMixture.parts',
                fix='Give a weight to all of them, or to none.',
            )
        elif weighted and self.temperature != 1:
            raise UserError('temperature is for components without weights', where='MakeMixture.temperature')

    def __call__(self, invocation: Invocation) -> None:
        """Make it, or confirm that it is there; or say what would be done."""
        if invocation.dry_run:
            lines = [f'would write a mixture into {self.output_directory}, of']
            lines += [f'  {part.name}: {part.directory or type(part.source).__name__}' for part in self.parts]
            print('\n'.join(lines))
            return
        require_one('make_mixture')
        directory, started = Path(self.output_directory), time.perf_counter()
        with RunLock(directory):
            claim(
                directory,
                self,
                invocation.operative_config,
                changeable=('output_directory', 'cache_directory', 'workers'),
            )
            if (directory / reading.RECORD).exists():
                record = read_record(str(directory))
                for component in record['components']:
                    for file in component['files']:
                        check(str(directory), file)
                print(f'{table(record)}\n{directory}: complete')
                return
            try:
                record = self._record(directory)
            except UserError:  # with nothing in it the directory takes the config that is set right
                shutil.rmtree(directory / 'plain', ignore_errors=True)
                raise
            lines = [
                f'"""SeqIO tasks {self.name}:COMPONENT and the mixture {self.name}, made by importing this file."""',
                '# ' + (inspect.getdoc(reading) or '').splitlines()[0],
                inspect.getsource(reading).partition('"""\n\n')[2],
                '\nregister(Path(__file__).parent)\n',
            ]
            write_atomically(directory / TASKS, '\n'.join(lines))
            # Last, because it says that the job is complete.
            write_atomically(directory / reading.RECORD, json.dumps(record, indent=1, ensure_ascii=False) + '\n')
        print(f'{table(record)}\n{directory}: done in {time.perf_counter() - started:.1f} s')

    def _record(self, directory: Path) -> dict[str, Any]:
        """What mixture.json holds."""
        vocabulary = None if self.vocabulary is None else load_vocabulary(self.vocabulary)
        components = [part.record(directory) for part in self.parts]
        held_out: set[bytes] = set()  # digests of the texts, of all components
        for component in components:
            component['validation'] = self._counts(directory, component, 'validation', vocabulary, held_out)
        warnings = []
        for part, component in zip(self.parts, components, strict=True):
            component['train'] = self._counts(directory, component, 'train', vocabulary, held_out)
            if leaked := component['train']['held_out']:
                warnings.append(f'{part.name} trains on {leaked:,} documents whose text is held out under another id')
            if not component['train']['documents']:
                held_out = component['validation']['documents']
                raise UserError(
                    f'has no training documents ({held_out:,} are of the validation split)',
                    where=part.name,
                    fix='Check its filters and epochs, or what was prepared.',
                )
            print(f'{part.name}: {component["train"]["documents"]:,} documents', flush=True)
        unit: Literal['tokens', 'bytes'] = 'bytes' if vocabulary is None else 'tokens'
        found = outcome(
            components,
            unit,
            temperature=self.temperature,
            curriculum=self.curriculum,
            budget=self.budget,
            budget_unit=self.budget_unit,
        )
        for component, share, size, epochs in zip(components, found.shares, found.sizes, found.epochs, strict=True):
            component |= {'share': share, 'read': size, 'epochs': epochs}
        return {
            'version': VERSION,
            'name': self.name,
            'size_unit': unit,
            'vocabulary': None if vocabulary is None else vocabulary.digest,
            'validation_fraction': self.validation_fraction,
            'total': found.total,
            'curriculum': None if self.curriculum is None else dataclasses.asdict(self.curriculum),
            'components': components,
            'warnings': [*warnings, *found.warnings],
        }

    def _counts(
        self,
        directory: Path,
        component: dict[str, Any],
        split: Split,
        vocabulary: Vocabulary | None,
        held_out: set[bytes],
    ) -> dict[str, int | None]:
        """Documents, bytes and tokens (with the end of each document) of one split.

        Args:
            held_out: gets digests of the texts of 'validation'; for 'train', how many texts are among them is counted.
        """
        source, counts = RecordedSource(str(directory), json.dumps(component), self.validation_fraction), ReadCounts()
        leaked = 0
        for shard in source.shards(split):
            for text in shard.documents(counts):
                key = text_digest(text)
                if split == 'validation':
                    held_out.add(key)
                else:
                    leaked += key in held_out
        tokens = None
        if vocabulary is not None:
            tokens = 0
            if counts.documents:
                caches = self.cache_directory or default_cache_directory()
                tokens = open_token_cache(source, split, vocabulary, caches, workers=self.workers).num_tokens
        found = {'documents': counts.documents, 'bytes': counts.bytes, 'tokens': tokens}
        return found | ({'held_out': leaked} if split == 'train' else {})
