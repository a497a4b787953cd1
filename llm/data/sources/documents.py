"""What a source of documents is: a `Source` gives `Shard`s; a shard reads documents and counts what it met."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, Self, runtime_checkable

from llm.errors import UserError

Split = Literal['train', 'validation']

MAX_SAMPLES = 20
_NAMED = 3  # shards in an error


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """One record that could not be used as it is, kept as an example for the reader of a report.

    Args:
        file: the file it is in.
        record: its number in the file, from 1: the line of a text or JSON lines file, the row of a parquet file.
        reason: what is wrong with it.
    """

    file: str
    record: int
    reason: str


@dataclasses.dataclass
class ReadCounts:
    """What reading met. Counts of shards that were read in parallel are merged; the limit then holds for their sum.

    Args:
        documents: documents given out.
        bytes: their length in UTF-8.
        empty: documents of white space only, left out.
        invalid_utf8: documents with invalid UTF-8 or lone surrogates, whether replaced or skipped.
        skipped: records left out because they are bad, by `invalid_utf8='skip'` or for another reason in `samples`.
        other_split: documents left out because they belong to the other split.
        max_bad_records: a record skipped beyond this many raises UserError; None is no limit. The shard sets it.
        samples: the first bad records, at most `MAX_SAMPLES`.
    """

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    invalid_utf8: int = 0
    skipped: int = 0
    other_split: int = 0
    max_bad_records: int | None = None
    samples: list[BadRecord] = dataclasses.field(default_factory=list)

    def add_document(self, num_bytes: int) -> None:
        """Count one document given out."""
        self.documents += 1
        self.bytes += num_bytes

    def add_invalid_utf8(self, file: str, record: int, *, skipped: bool) -> None:
        """Count a document with invalid UTF-8. Raises UserError when it is skipped and the limit is passed."""
        self.invalid_utf8 += 1
        reason = 'invalid UTF-8'
        if skipped:
            self.add_skipped(file, record, reason)
        else:
            self._sample(BadRecord(file, record, f'{reason}, replaced by U+FFFD'))

    def add_skipped(self, file: str, record: int, reason: str) -> None:
        """Count a record left out as bad. Raises UserError when the limit is passed."""
        self.skipped += 1
        self._sample(BadRecord(file, record, reason))
        self._check_limit(f'{file}:{record}', f'{reason}; ')

    def merge(self, other: Self) -> None:
        """Add the counts of another shard. Raises UserError when the sum passes the limit of either."""
        for name in ('documents', 'bytes', 'empty', 'invalid_utf8', 'skipped', 'other_split'):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.samples = (self.samples + other.samples)[:MAX_SAMPLES]
        limits = [limit for limit in (self.max_bad_records, other.max_bad_records) if limit is not None]
        self.max_bad_records = min(limits, default=None)
        self._check_limit()

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON takes them; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The counts that `as_dict` wrote."""
        return cls(**{**fields, 'samples': [BadRecord(**sample) for sample in fields['samples']]})

    def _sample(self, record: BadRecord) -> None:
        if len(self.samples) < MAX_SAMPLES:
            self.samples.append(record)

    def _check_limit(self, where: str = '', reason: str = '') -> None:
        if self.max_bad_records is not None and self.skipped > self.max_bad_records:
            raise UserError(
                f'{reason}{self.skipped} bad records, more than max_bad_records = {self.max_bad_records}',
                where=where
                or (f'{self.samples[0].file}:{self.samples[0].record}, among others' if self.samples else ''),
                fix='Mend the data, or allow more with max_bad_records',
            )


class Shard(Protocol):
    """One unit of parallel work, usually a file. Picklable: it holds where and how to read, never the content."""

    @property
    def name(self) -> str:
        """For logs and progress; unique within its source and split."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 in hex. Changes when the documents that the shard gives could change: the content or the settings."""
        ...

    def documents(self, counts: ReadCounts) -> Iterator[str]:
        """The documents in a fixed order, none empty, all encodable as UTF-8; `counts` is kept up to date meanwhile.

        Raises UserError for a file that cannot be read and for too many bad records.
        """
        ...


@runtime_checkable  # so that a config's field can be annotated with it
class Source(Protocol):
    """Where documents come from: a frozen dataclass that gin configures."""

    def shards(self, split: Split) -> Sequence[Shard]:
        """The shards of a split in a fixed order. Raises UserError where there is nothing to read."""
        ...


def read_documents(source: Source, split: Split, counts: ReadCounts | None = None) -> Iterator[str]:
    """All documents of a split, shard after shard. Raises UserError when there is none."""
    counts = ReadCounts() if counts is None else counts
    before = counts.documents
    shards = source.shards(split)
    for shard in shards:
        yield from shard.documents(counts)
    if counts.documents == before:
        raise empty_split_error(split, counts, shards)


def check_names(names: Sequence[str]) -> None:
    """Raises UserError for names of sources that are given twice, or are not of letters, digits and _.-"""
    for name in names:
        if not re.fullmatch(r'[\w.-]+', name) or names.count(name) > 1:
            raise UserError(f'source name {name!r} is given twice, or is not of letters, digits and _.-')


def empty_split_error(split: Split, counts: ReadCounts, shards: Sequence[Shard]) -> UserError:
    """The error for a split in which no document was found, from the counts of having read all of its shards."""
    where = ', '.join(shard.name for shard in shards[:_NAMED])
    if len(shards) > _NAMED:
        where += f' and {len(shards) - _NAMED:,} more'
    seen = f'{counts.other_split} belong to the other split, {counts.empty} are empty, {counts.skipped} are bad'
    what = f'the {split} split has no documents ({seen})'
    if not (counts.other_split or counts.empty or counts.skipped):
        what = f'there are no documents at all, to read for the {split} split'
    fixes = {
        'train': 'Give more data, or a smaller validation_fraction',
        'validation': 'Give a larger validation_fraction, or validation_files',
    }
    # Where the other split has none either, another fraction would not help.
    return UserError(what, where=where, fix=fixes[split] if counts.other_split else 'Give files with text')
