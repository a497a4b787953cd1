"""The stage that applies sets of rules to documents, with other thresholds and chances for some of them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.document import Document, Verdict
from llm.data.documents.hashed_shares import hashed_share
from llm.data.documents.quality.batch import Batch
from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a set of rules says of a batch of D documents.

    Attributes:
        values: for each rule, [D]; NaN where there is none.
        keep: for each rule, [D] booleans.
        batch: the texts for the sets that follow: the same, or with lines removed.
    """

    values: tuple[np.ndarray, ...]
    keep: tuple[np.ndarray, ...]
    batch: Batch


@runtime_checkable  # so that a config's field can be annotated with it
class RuleSet(Protocol):
    """Rules of one origin: a frozen dataclass with their thresholds; None switches a rule off, its value is still told.

    One that reads files also has `identities()`, as a stage does.

    Attributes:
        name: of the set; the part before the slash of its rules' names.
        rules: their names, in order. bounds: for each of them, what it judges by.
    """

    @property
    def name(self) -> str: ...

    @property
    def rules(self) -> tuple[str, ...]: ...

    @property
    def bounds(self) -> tuple[Bounds, ...]: ...

    def judge(self, batch: Batch) -> Judgement:
        """What becomes of a document does not depend on the others."""
        ...


@dataclasses.dataclass(frozen=True)
class Exempt:
    """A set in place of the one of the same name, for some documents: those that match all of what is given.

    Args:
        rules: the set with other thresholds.
        sources, languages: names and codes, of which a document's is one.
        domains: of which the document's domain is one or below one ('example.org' has 'en.example.org').
    """

    rules: RuleSet
    sources: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()

    @property
    def of(self) -> str:
        """Which documents it is for, in words."""
        return '; '.join(', '.join(names) for names in (self.sources, self.domains, self.languages) if names)

    def matches(self, document: Document) -> bool:
        """Whether it is for this document."""
        domain = f'.{document.domain or ""}'
        return (
            (not self.sources or document.source in self.sources)
            and (not self.languages or document.language in self.languages)
            and (not self.domains or any(domain.endswith(f'.{other}') for other in self.domains))
        )


@dataclasses.dataclass(frozen=True)
class Chance:
    """Of the documents that a rule would remove, a part stays: the same ones however documents are cut into shards.

    Args:
        rule: its name.
        probabilities: (value, probability to stay) with rising values; linear in between, constant beyond the ends.
            One pair is a fixed rate.
        seed: another one lets others stay.
    """

    rule: str
    probabilities: tuple[tuple[float, float], ...]
    seed: int = 0

    def __post_init__(self) -> None:
        values = [value for value, _ in self.probabilities]
        if not values or values != sorted(set(values)) or any(not 0 <= p <= 1 for _, p in self.probabilities):
            raise UserError(
                f'{self.probabilities} are not pairs of rising values and probabilities from 0 to 1',
                where=f'Chance.probabilities of rule {self.rule!r}',
            )

    def stays(self, document: Document, value: float) -> bool:
        """Whether a document that the rule would remove stays: decided by its id and the seed."""
        values, probabilities = zip(*self.probabilities, strict=True)
        probability = probabilities[0] if math.isnan(value) else float(np.interp(value, values, probabilities))
        return _drawn(self, document, probability)


@dataclasses.dataclass(frozen=True)
class Pareto:
    """A chance that falls with the distance of a score from 1: stays where pareto(alpha) > 1 - score.

    As GPT-3 chose documents of Common Crawl by a classifier's score (Brown et al. 2020, appendix A, alpha = 9). With
    NumPy's pareto, Lomax's distribution, that has a probability of (2 - score) ** -alpha; all are judged so if the
    rule's least score is 1.

    Args:
        rule: its name; its figure is a probability of what is wanted.
        seed: another one lets others stay.
    """

    rule: str
    alpha: float = 9.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise UserError(f'alpha = {self.alpha} is not positive', where=f'Pareto of rule {self.rule!r}')

    def stays(self, document: Document, value: float) -> bool:
        """Whether a document that the rule would remove stays: decided by its id and the seed."""
        return _drawn(self, document, 0.0 if math.isnan(value) else (2 - value) ** -self.alpha)


def _drawn(chance: Chance | Pareto, document: Document, probability: float) -> bool:
    return hashed_share(str(chance.seed), chance.rule, document.id) < probability


@dataclasses.dataclass(frozen=True)
class Rules:
    """Judges documents by sets of rules, one after the other; each text is split into lines and words once for all.

    A set that removes lines rewrites the text, and the sets after it see what is left.

    Args:
        sets: in order.
        exempt: other versions of sets for some documents; of several that match, the first counts.
        chances: rules that let a part of what they would remove stay.
    """

    sets: tuple[RuleSet, ...]
    exempt: tuple[Exempt, ...] = ()
    chances: tuple[Chance | Pareto, ...] = ()

    name = 'rules'

    def __post_init__(self) -> None:
        by_name = {rules.name: rules.rules for rules in self.sets}
        if len(by_name) < len(self.sets):
            raise UserError(f'a set of rules is given twice: {[rules.name for rules in self.sets]}', where='Rules.sets')
        for other in self.exempt:
            if by_name.get(other.rules.name) != other.rules.rules:
                raise UserError(
                    f'{other.rules.name!r} with rules {", ".join(other.rules.rules)} replaces none of the sets',
                    where='Rules.exempt',
                    fix='Give a set of Rules.sets with other thresholds, and the same rules.',
                )
        for chance in self.chances:
            if chance.rule not in self.rules:
                raise UserError(
                    f'no set has a rule {chance.rule!r}', where='Rules.chances', fix=f'There are {self.rules}.'
                )

    @property
    def rules(self) -> tuple[str, ...]:
        """Of all sets."""
        return tuple(rule for rules in self.sets for rule in rules.rules)

    def identities(self) -> list[str]:
        """Change where the content of the models does that sets read."""
        sets = (*self.sets, *(other.rules for other in self.exempt))
        return [text for rules in sets for text in getattr(rules, 'identities', list)()]

    @property
    def bounds(self) -> tuple[Bounds, ...]:
        """Of all sets, and of their other versions."""
        usual = [limit for rules in self.sets for limit in rules.bounds]
        others = [
            dataclasses.replace(limit, of=other.of)
            for other in self.exempt
            for limit in other.rules.bounds
            if limit not in usual
        ]
        return (*usual, *others)

    def __call__(self, documents: Sequence[Document]) -> list[Document]:
        batch = Batch(documents)
        values: list[np.ndarray] = []
        keep: list[np.ndarray] = []
        for rules in self.sets:
            judgement = self._judge(rules, batch)
            values += judgement.values
            keep += judgement.keep
            batch = judgement.batch
        for chance in self.chances:
            i = self.rules.index(chance.rule)
            stays = [k or chance.stays(d, v) for d, k, v in zip(documents, keep[i], values[i].tolist(), strict=True)]
            keep[i] = np.array(stays, np.bool_)
        columns = [
            [Verdict(rule, k, v if v == v else None) for k, v in zip(k.tolist(), v.tolist(), strict=True)]  # noqa: PLR0124
            for rule, k, v in zip(self.rules, keep, values, strict=True)
        ]
        rows = zip(*columns, strict=True) if columns else ((),) * len(documents)
        return [
            document.judged(*verdicts, text=text)
            for document, verdicts, text in zip(documents, rows, batch.texts, strict=True)
        ]

    def _judge(self, rules: RuleSet, batch: Batch) -> Judgement:
        """By the set, or for each document by the version of it that is for the document."""
        others = [other for other in self.exempt if other.rules.name == rules.name]
        if not others:
            return rules.judge(batch)
        which = np.array(
            [next((i for i, o in enumerate(others) if o.matches(d)), len(others)) for d in batch.documents], np.int64
        )
        groups = [np.flatnonzero(which == i) for i in range(len(others) + 1)]
        judgements = [
            version.judge(batch.take(group))
            for version, group in zip([*(other.rules for other in others), rules], groups, strict=True)
        ]
        back = np.argsort(np.concatenate(groups))
        texts = [text for judgement in judgements for text in judgement.batch.texts]
        return Judgement(
            tuple(np.concatenate(parts)[back] for parts in zip(*(j.values for j in judgements), strict=True)),
            tuple(np.concatenate(parts)[back] for parts in zip(*(j.keep for j in judgements), strict=True)),
            Batch(batch.documents, [texts[i] for i in back]),
        )


def judged(values: Sequence[np.ndarray], limits: Sequence[Bounds], batch: Batch) -> Judgement:
    """By figures that are within the bounds of their rules."""
    keep = tuple(limit.keep(value) for value, limit in zip(values, limits, strict=True))
    return Judgement(tuple(values), keep, batch)


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where there is no whole."""
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
