"""Labelled documents as files of features, from which training draws batches: memory holds 40 bytes an example.

Examples are put in the order of their texts' hashes, so neither files nor shards nor their order change anything that
is computed from them; and a hash of the document's text decides whether it is trained on or held out.
"""

import contextlib
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.classification.features import NgramFeatures, Sparse
from llm.data.documents.document import Document, Quarantined
from llm.data.documents.hashed_shares import hashed_share
from llm.data.documents.shard_processing import BATCH_CHARACTERS, BATCH_DOCUMENTS
from llm.data.documents.sources import Source
from llm.data.documents.stage import Chain
from llm.errors import UserError

TRAINING, VALIDATION, HELD_OUT = range(3)
EXCERPT = 1000  # characters of an example that are kept for people
_COLUMNS = (('indices', np.int32), ('values', np.float32), ('excerpts', np.uint8))


@dataclasses.dataclass(frozen=True)
class Examples:
    """Documents of one source and their labels: the same for all, or of a field of each record.

    Args:
        source: any source of documents; what `prepare_data` has written is read by `Parquet`.
        labels: of all its documents; () with independent labels means that none of them holds.
        label_field: field of the record that has a label, or a list of labels, in place of `labels`.
        label_columns: every label is a field of its own, true or false (0 or 1), in place of `labels`.
        group_field: field of the record that others share, as the number of a pair or a thread: they are all trained
            on, or all held out. None groups by nothing but equal texts.
        passage_characters: cut documents into passages of about so many characters, at ends of lines or words, each an
            example; 0 takes whole documents. All passages of a document are trained on, or all are held out.
    """

    source: Source
    labels: tuple[str, ...] | None = None
    label_field: str | None = None
    label_columns: bool = False
    group_field: str | None = None
    passage_characters: int = 0

    def __post_init__(self) -> None:
        if sum((self.labels is not None, self.label_field is not None, self.label_columns)) != 1:
            raise UserError(
                'give one of labels, label_field and label_columns', where=f'Examples of source {self.source.name!r}'
            )
        if self.passage_characters < 0:
            raise UserError(f'passage_characters = {self.passage_characters} is negative', where='Examples')

    def labels_of(self, document: Document, labels: Sequence[str], where: str) -> list[str]:
        """What the record says, not yet checked against `labels`."""
        if self.labels is not None:
            return list(self.labels)
        if self.label_columns:
            return [label for label in labels if _as_bool(_field(document, label, where), label, where)]
        found = _field(document, str(self.label_field), where)
        return [str(label) for label in found] if isinstance(found, list) else [str(found)]


def _field(document: Document, name: str, where: str) -> Any:
    value = document.metadata.get(name)
    if value is None:
        has = ', '.join(map(repr, list(document.metadata)[:8])) or 'none'
        raise UserError(f'has no field {name!r}; it has {has}', where=where, fix='Add it, or leave the record out.')
    return value


def _as_bool(value: Any, label: str, where: str) -> bool:
    if value in (0, 1, '0', '1', '0.0', '1.0', 'true', 'false', 'True', 'False'):
        return str(value).lower() in ('1', '1.0', 'true')
    raise UserError(f'{value!r} in field {label!r} is neither true nor false', where=where, fix='Write 0 or 1.')


@dataclasses.dataclass(frozen=True)
class ExampleFiles:
    """Examples on disk, in the order of their hashes.

    Attributes:
        directory: of the files.
        starts, ends: int64 [n], of each example's features in the files; text_starts, text_ends: of its excerpt.
        keys: uint64 [n], hashes of the texts.
        targets: bool [n, labels]. split: int8 [n], TRAINING, VALIDATION or HELD_OUT.
        counts: what was met while reading, by words for it. bytes: of the texts, in UTF-8.
    """

    directory: Path
    starts: np.ndarray
    ends: np.ndarray
    text_starts: np.ndarray
    text_ends: np.ndarray
    keys: np.ndarray
    targets: np.ndarray
    split: np.ndarray
    counts: dict[str, int]
    bytes: int

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, which: np.ndarray) -> Sparse:
        """The features of some examples, in their order."""
        sizes = (self.ends - self.starts)[which]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        positions = np.arange(bounds[-1]) + np.repeat(self.starts[which] - bounds[:-1], sizes)
        return Sparse(self._column('indices')[positions], self._column('values')[positions], bounds)

    def excerpt(self, index: int) -> str:
        """The beginning of an example's text."""
        data = self._column('excerpts')[self.text_starts[index] : self.text_ends[index]]
        return bytes(data).decode()

    def _column(self, name: str) -> np.ndarray:
        path = self.directory / name
        if not path.stat().st_size:
            return np.zeros(0, dict(_COLUMNS)[name])
        return np.memmap(path, dict(_COLUMNS)[name], 'r')


@dataclasses.dataclass(frozen=True)
class _Example:
    text: str
    targets: list[bool]
    split: int


def read_examples(
    examples: Sequence[Examples],
    chain: Chain,
    features: NgramFeatures,
    labels: Sequence[str],
    directory: Path,
    *,
    exclusive: bool,
    held_out: float,
    validation: float,
    seed: int,
) -> ExampleFiles:
    """Read everything once, and write features to `directory`.

    Args:
        chain: stages that all documents go through; those that a rule removes are no examples.
        held_out, validation: shares of the documents.

    Raises:
        UserError: a record has no label or one that is not in `labels`, or the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ('sizes', 'lengths', 'keys', 'targets', 'split')}
    counts: Counter[str] = Counter()
    total = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context((directory / name).open('wb')) for name, _ in _COLUMNS}
        for batch in _batches(examples, chain, labels, counts, exclusive, held_out, validation, seed):
            texts = [example.text for example in batch]
            sparse = features(texts)
            total += sum(len(text.encode()) for text in texts)
            excerpts = [text[:EXCERPT].encode() for text in texts]
            files['indices'].write(sparse.indices.data)
            files['values'].write(sparse.values.data)
            files['excerpts'].write(b''.join(excerpts))
            columns['sizes'].append(np.diff(sparse.offsets))
            columns['lengths'].append(np.array([len(excerpt) for excerpt in excerpts], np.int64))
            columns['keys'].append(np.array([_key(text) for text in texts], np.uint64))
            columns['targets'].append(np.array([example.targets for example in batch], np.bool_))
            columns['split'].append(np.array([example.split for example in batch], np.int8))
    if not columns['sizes']:
        raise UserError(
            'no example was read', fix='Check the sources: what they gave ' + (_told(counts) or 'was empty')
        )
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    ends, text_ends = np.cumsum(joined['sizes']), np.cumsum(joined['lengths'])
    # Of equal texts, those of equal labels and split are equal in all that matters.
    order = np.lexsort((joined['split'], *joined['targets'].T, joined['keys']))
    usable = joined['sizes'] > 0
    counts['without words'] += int((~usable).sum())
    # A passage that other documents share, as of a menu, would be measured on after it was learnt.
    trained_on = np.isin(joined['keys'], joined['keys'][joined['split'] == TRAINING])
    known = usable & trained_on & (joined['split'] != TRAINING)
    counts['held out, but trained on elsewhere'] += int(known.sum())
    order = order[(usable & ~known)[order]]
    result = ExampleFiles(
        directory,
        (ends - joined['sizes'])[order],
        ends[order],
        (text_ends - joined['lengths'])[order],
        text_ends[order],
        joined['keys'][order],
        joined['targets'][order],
        joined['split'][order],
        {},
        total,
    )
    return dataclasses.replace(result, counts=dict(counts + _repeated(result)))


def _repeated(examples: ExampleFiles) -> Counter[str]:
    """Texts that are there more than once, and those of them that contradict each other."""
    same = examples.keys[1:] == examples.keys[:-1]
    other = same & (examples.targets[1:] != examples.targets[:-1]).any(axis=1)
    return Counter({'repeated texts': int(same.sum()), 'repeated with other labels': int(other.sum())})


def _told(counts: Counter[str]) -> str:
    return ', '.join(f'{count:,} {name}' for name, count in sorted(counts.items()) if count)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(f'\0{text}'.encode(), digest_size=8).digest())


def split_of(group: str, held_out: float, validation: float, seed: int) -> int:
    """TRAINING, VALIDATION or HELD_OUT, by a hash of a document's text, or of what it has in common with others."""
    drawn = hashed_share(f'split {seed}', group)
    return HELD_OUT if drawn < held_out else VALIDATION if drawn < held_out + validation else TRAINING


def _batches(
    examples: Sequence[Examples],
    chain: Chain,
    labels: Sequence[str],
    counts: Counter[str],
    exclusive: bool,
    held_out: float,
    validation: float,
    seed: int,
) -> Iterator[list[_Example]]:
    """Examples in the order in which they are read, as many at once as memory should hold."""
    pending: list[_Example] = []
    characters = 0
    for some in examples:
        for document, where in _documents(some, chain, counts):
            found = some.labels_of(document, labels, where)
            _check_labels(found, labels, where, exclusive=exclusive)
            group = None if some.group_field is None else str(_field(document, some.group_field, where))
            split = split_of(document.text if group is None else group, held_out, validation, seed)
            targets = [label in found for label in labels]
            for text in passages(document.text, some.passage_characters):
                pending.append(_Example(text, targets, split))
                characters += len(text)
                if characters >= BATCH_CHARACTERS or len(pending) >= 8 * BATCH_DOCUMENTS:
                    yield pending
                    pending, characters = [], 0
    if pending:
        yield pending


def _check_labels(found: Sequence[str], labels: Sequence[str], where: str, *, exclusive: bool) -> None:
    for label in found:
        if label not in labels:
            raise UserError(
                f'the label {label!r} is not one of {", ".join(labels)}', where=where, fix='Name it in LABELS.'
            )
    if exclusive and len(set(found)) != 1:
        raise UserError(
            f'has {len(set(found))} labels ({", ".join(found)}), where labels are exclusive',
            where=where,
            fix='Give it one label, or set EXCLUSIVE = False.',
        )


def _documents(examples: Examples, chain: Chain, counts: Counter[str]) -> Iterator[tuple[Document, str]]:
    """(document, where it is from) of all shards, after the stages."""
    for shard in examples.source.shards():
        batch: list[tuple[Document, str]] = []
        characters = 0
        for number, item in enumerate(shard.read(), start=1):
            if isinstance(item, Document):
                batch.append((item, f'{shard.name}:{number}'))
                characters += len(item.text) + len(item.markup or '')
            elif isinstance(item, Quarantined):
                counts['bad records'] += 1
            if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield from _judged(batch, chain, counts)
                batch, characters = [], 0
        yield from _judged(batch, chain, counts)


def _judged(
    batch: Sequence[tuple[Document, str]], chain: Chain, counts: Counter[str]
) -> Iterator[tuple[Document, str]]:
    wheres = [where for _, where in batch]
    for result, where in zip(chain([document for document, _ in batch], wheres), wheres, strict=True):
        if isinstance(result, Quarantined):
            counts['bad records'] += 1
        elif result.removed_by is not None:
            counts['removed by stages'] += 1
        else:
            yield result, where


def passages(text: str, characters: int) -> Iterator[str]:
    """Pieces of between `characters` and twice as many (the last may be shorter), which joined are the text.

    A piece ends after a line where one is in reach, else after a space, else anywhere. 0 leaves the text whole.
    """
    start = 0
    while characters and len(text) - start > 2 * characters:
        low, high = start + characters, start + 2 * characters
        end = next((found + 1 for mark in '\n ' if (found := text.find(mark, low - 1, high)) >= 0), high)
        yield text[start:end]
        start = end
    yield text[start:]
