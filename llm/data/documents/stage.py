"""What a stage is, and stages in a row."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document, Quarantined, not_installed
from llm.errors import UserError


@runtime_checkable  # so that a config's field can be annotated with it
class Stage(Protocol):
    """A pure function of documents: a frozen dataclass that gin configures and that pickles.

    One that reads files, as lists or models, also has `identities()`: texts that change where their content does. One
    whose rules judge by figures may have `bounds`, a `Bounds` for each of these rules, which reports draw.

    Attributes:
        name: for the ledger and for messages.
        rules: the rules of which it gives every document a verdict, in order; none where it only rewrites.
    """

    @property
    def name(self) -> str: ...

    @property
    def rules(self) -> tuple[str, ...]: ...

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        """One document for each, in order; what becomes of one does not depend on the others."""
        ...


@dataclasses.dataclass(frozen=True)
class Chain:
    """Stages one after the other. All see every document, also those that an earlier rule removed.

    So the ledger can say what a rule alone does, without another run.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        rules = self.rules
        for rule in rules:
            if rules.count(rule) > 1:
                raise UserError(f'two stages have a rule {rule!r}', fix='Give one of them another name.')

    @property
    def rules(self) -> tuple[str, ...]:
        """Of all stages, in order."""
        return tuple(rule for stage in self.stages for rule in stage.rules)

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """Of all stages that tell them."""
        return tuple(limit for stage in self.stages for limit in getattr(stage, 'bounds', ()))

    def identities(self) -> list[str]:
        """Change where the content of the files does that stages read."""
        return [text for stage in self.stages for text in getattr(stage, 'identities', list)()]

    def __call__(self, documents: Sequence[Document], wheres: Sequence[str]) -> list[Document | Quarantined]:
        """What becomes of each document; one on which a stage fails is quarantined, and the others are not.

        Args:
            wheres: for each document, the file and record that it is from.
        """
        results: list[Document | Quarantined] = list(documents)
        for stage in self.stages:
            alive = [i for i, result in enumerate(results) if isinstance(result, Document)]
            inputs = [result for result in results if isinstance(result, Document)]
            try:
                outputs: list[Document | Quarantined] = list(stage(inputs))
            except UserError:
                raise
            except ImportError as error:
                raise not_installed(error) from error
            except Exception:
                outputs = [_alone(stage, document, wheres[i]) for i, document in zip(alive, inputs, strict=True)]
            for i, output in zip(alive, outputs, strict=True):
                results[i] = output
        return results


def _alone(stage: Stage, document: Document, where: str) -> Document | Quarantined:
    """What a stage makes of one document, its failure included: whatever a stage raises is that document's fault."""
    try:
        (result,) = stage([document])
    except UserError:
        raise
    except Exception as error:
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        return Quarantined(where, reason[:500], document.id, stage.name)
    return result
