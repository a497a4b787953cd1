"""Documents made by a generator: a task in text with its answer, as many as wanted, the same for the same seed."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from llm.data.documents.document import Document
from llm.data.documents.sources.files import Item
from llm.errors import UserError

Kind = Literal['arithmetic', 'sorting', 'recall']
_NAMES = ('Ada', 'Ben', 'Chen', 'Dina', 'Eli', 'Fatima', 'Goran', 'Hana', 'Ivan', 'June', 'Kofi', 'Lena')
_THINGS = ('apples', 'books', 'coins', 'keys', 'letters', 'pens', 'shells', 'stamps', 'stones', 'tickets')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic:
    """`count` documents of one kind.

    Args:
        name: of the source. count: documents.
        kind: 'arithmetic' (sums and products in words and figures), 'sorting' (lists put in order), 'recall' (who has
            how many of what, and a question on one of them).
        seed: another gives other documents.
        shard_documents: how many make one shard.
    """

    name: str
    count: int
    kind: Kind = 'arithmetic'
    seed: int = 0
    shard_documents: int = 100_000

    def __post_init__(self) -> None:
        if self.count <= 0 or self.shard_documents <= 0:
            raise UserError('count and shard_documents must be positive', where=f'Synthetic {self.name!r}')

    def shards(self) -> Sequence['SyntheticShard']:
        starts = range(0, self.count, self.shard_documents)
        return [SyntheticShard(self, start, min(start + self.shard_documents, self.count)) for start in starts]

    def text(self, index: int) -> str:
        """Document `index`: a function of it, the kind and the seed alone."""
        draw = random.Random(f'{self.kind} {self.seed} {index}')
        return {'arithmetic': _arithmetic, 'sorting': _sorting, 'recall': _recall}[self.kind](draw)


@dataclasses.dataclass(frozen=True)
class SyntheticShard:
    """Documents [start, stop) of a generator."""

    source: Synthetic
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f'{self.source.name}:{self.start}-{self.stop}'

    def fingerprint(self) -> str:
        """Of the settings."""
        return hashlib.sha256(json.dumps([dataclasses.asdict(self.source), self.start, self.stop]).encode()).hexdigest()

    def read(self) -> Iterator[Item]:
        """The documents, in order."""
        for index in range(self.start, self.stop):
            text, metadata = self.source.text(index), {'kind': self.source.kind}
            yield Document(f'{self.source.name}:{index}', text, self.source.name, licence='CC0-1.0', metadata=metadata)


def _arithmetic(draw: random.Random) -> str:
    lines = []
    for _ in range(draw.randint(3, 8)):
        a, b = draw.randint(0, 10 ** draw.randint(1, 4)), draw.randint(0, 10 ** draw.randint(1, 4))
        sign, result = draw.choice((('+', a + b), ('-', a - b), ('*', a * b)))
        lines.append(f'{a} {sign} {b} = {result}')
    return '\n'.join(lines)


def _sorting(draw: random.Random) -> str:
    numbers = [draw.randint(0, 999) for _ in range(draw.randint(3, 12))]
    unsorted, ordered = (', '.join(map(str, some)) for some in (numbers, sorted(numbers)))
    return f'Numbers: {unsorted}\nIn order: {ordered}'


def _recall(draw: random.Random) -> str:
    names, things = draw.sample(_NAMES, 5), draw.sample(_THINGS, 5)
    counts = [draw.randint(2, 99) for _ in names]
    facts = [f'{name} has {count} {thing}.' for name, count, thing in zip(names, counts, things, strict=True)]
    asked = draw.randrange(5)
    question = f'How many {things[asked]} does {names[asked]} have? {counts[asked]}.'
    return f'{" ".join(facts)}\n{question}'
