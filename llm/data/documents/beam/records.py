"""Some records of a shard on their way through the first pipeline."""

import dataclasses
from typing import Any

from llm.data.documents.document import Document, Quarantined
from llm.data.documents.shard_processing import ShardCounts, Task, rows_of
from llm.data.documents.sources.files import Item


@dataclasses.dataclass(frozen=True)
class Records:
    """Some records of a shard, in order, and what they become once they are judged.

    Attributes:
        name: of the piece. first: number of the first record.
        ledger, documents: rows, as many of each; a document that is removed has None. quarantine: of the others.
    """

    task: Task
    name: str
    first: int
    items: list[Item]
    counts: ShardCounts = dataclasses.field(default_factory=ShardCounts)
    ledger: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    documents: list[dict[str, Any] | None] = dataclasses.field(default_factory=list)
    quarantined: list[Quarantined] = dataclasses.field(default_factory=list)

    def document(self, document: Document) -> None:
        """Rows of one that was judged."""
        row, own = rows_of(document)
        self.ledger.append(row)
        self.documents.append(own)

    def quarantine(self, item: Quarantined) -> None:
        """One that could not be."""
        self.quarantined.append(item)

    def part(self, first: int, items: list[Item]) -> 'Records':
        """Some of them, not judged."""
        return Records(self.task, self.name, first, items)

    def without_items(self) -> 'Records':
        """What they became alone."""
        return dataclasses.replace(self, items=[])

    def add(self, some: 'Records') -> None:
        """What the next ones became."""
        self.counts.add(some.counts)
        self.ledger.extend(some.ledger)
        self.documents.extend(some.documents)
        self.quarantined.extend(some.quarantined)
