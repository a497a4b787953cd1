"""A mixture directory as the components of a training run."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.data.curricula import Curriculum
from llm.data.datasets import Component
from llm.data.mixtures import reading
from llm.data.sources import ReadCounts, Split
from llm.data.tasks import import_seqio
from llm.errors import UserError

VERSION = 1  # of mixture.json
# Part of every fingerprint: raise it when a change makes other documents of the same files.
_READER_VERSION = 1


@dataclasses.dataclass(frozen=True)
class RecordedSource:
    """The documents of one component.

    Args:
        directory: of the mixture. component: its record as JSON. validation_fraction: of the mixture's record.
    """

    directory: str
    component: str
    validation_fraction: float

    def shards(self, split: Split) -> list['RecordedShard']:
        """One shard a file. Raises UserError where a file is missing or not the one of the record."""
        component, shards = json.loads(self.component), []
        settings = json.dumps({'filters': component['filters'], 'sample': component['sample']})
        for file in component['files']:
            check(self.directory, file)
            if file['split'] in (None, split):
                shards.append(
                    RecordedShard(
                        file['path'], self.directory, split, json.dumps(file), settings, self.validation_fraction
                    )
                )
        return shards


@dataclasses.dataclass(frozen=True)
class RecordedShard:
    """One file of a component, read for one split; `file` and `settings` of the component are JSON."""

    name: str
    directory: str
    split: Split
    file: str
    settings: str
    validation_fraction: float

    def fingerprint(self) -> str:
        """SHA-256 of the file's content and of all that decides which of its documents are read."""
        file, settings = json.loads(self.file), json.loads(self.settings)
        content = [
            *(_READER_VERSION, file['sha256'], file['ledger'] and file['ledger']['sha256'], settings['filters']),
            *(settings['sample'] if self.split == 'train' else 1.0, self.split),
            self.validation_fraction if file['split'] is None else file['split'],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def documents(self, counts: ReadCounts) -> Iterator[str]:
        """The documents in the file's order. Raises UserError for a file that cannot be read."""
        import pyarrow

        directory, file, settings = Path(self.directory), json.loads(self.file), json.loads(self.settings)

        def left_out() -> None:
            counts.other_split += 1

        try:
            found = reading.documents(directory, settings, file, self.split, self.validation_fraction, left_out)
            for _, text in found:
                if not text or text.isspace():
                    counts.empty += 1
                    continue
                counts.add_document(len(text.encode()))
                yield text
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f'cannot be read ({error})',
                where=os.path.normpath(directory / file['path']),
                fix='Prepare the documents again.',
            ) from error


@dataclasses.dataclass(frozen=True)
class PreparedMixture:
    """The components that the make_mixture job has written into a directory, with their rates.

    Args:
        directory: of the mixture.
    """

    directory: str

    def components(self) -> tuple[Component, ...]:
        """All, for training. Raises UserError where the directory is none, or files are not those of the record."""
        record = read_record(self.directory)
        return tuple(
            Component(
                each['name'],
                RecordedSource(self.directory, json.dumps(each), record['validation_fraction']),
                each['share'],
                each['max_epochs'],
            )
            for each in record['components']
        )

    def evaluation(self) -> tuple[Component, ...]:
        """Those with documents of the validation split."""
        held_out = {
            each['name'] for each in read_record(self.directory)['components'] if each['validation']['documents']
        }
        return tuple(component for component in self.components() if component.name in held_out)

    def curriculum(self) -> Curriculum | None:
        """How rates change over training; None where they do not."""
        found = read_record(self.directory)['curriculum']
        if found is None:
            return None
        rates = {name: tuple(column) for name, column in found['rates'].items()}
        return Curriculum(tuple(found['at']), rates, found['shape'], found['steps'])


def read_record(directory: str) -> dict[str, Any]:
    """What mixture.json holds. Raises UserError where there is none that can be read."""
    path = Path(directory) / reading.RECORD
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
        version = record['version']
        missing = [name for name in ('name', 'validation_fraction', 'curriculum', 'components') if name not in record]
        if missing:
            raise ValueError(f'it has no {missing[0]}')
    except OSError as error:
        raise UserError(
            f'is not a finished mixture: {reading.RECORD} cannot be read ({error.strerror})',
            where=directory,
            fix='Make it with gin_configs/runs/make_mixture.gin, to the end.',
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'is not the record of a mixture ({error})', where=str(path), fix='Make it again elsewhere.'
        ) from error
    if version != VERSION:
        raise UserError(f'is of version {version}, not {VERSION}', where=str(path), fix='Make the mixture again.')
    return record


def check(directory: str, file: dict[str, Any]) -> None:
    """Raises UserError where a file of the record, or its ledger, is missing or has another content."""
    for some in (file, file['ledger']):
        if some is not None and (reason := reading.changed(Path(directory), some)):
            raise UserError(
                reason,
                where=os.path.normpath(Path(directory) / some['path']),
                fix='Bring back what was there, or make the mixture again in another directory.',
            )


def register_mixture(directory: str, **settings: Any) -> tuple[str, list[str]]:
    """The tasks and the mixture of a directory in SeqIO's registry; see `llm.data.mixtures.reading.register`.

    Raises:
        UserError: it is not the directory of a mixture, or another has its name.
    """
    seqio = import_seqio()
    name = read_record(directory)['name']
    if name in seqio.MixtureRegistry.names():
        raise UserError(f'SeqIO has a mixture of the name {name} already', where=directory, fix='Give it another.')
    return reading.register(directory, **settings)
