"""Counts of what became of documents: those of several shards add up, and JSON holds them."""

import dataclasses
from collections import Counter
from typing import Any, Self


@dataclasses.dataclass
class Counts:
    """Base of dataclasses whose fields are numbers and Counters."""

    def add(self, other: Self) -> None:
        """Count another shard's, too."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def as_json(self) -> dict[str, Any]:
        """The counts as JSON takes them; `from_json` is the inverse."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in fields.items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """From `as_json`."""
        return cls(**{name: Counter(value) if isinstance(value, dict) else value for name, value in fields.items()})
