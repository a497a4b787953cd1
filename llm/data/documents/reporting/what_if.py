"""What other bounds of rules would remove, from the figures in the ledger: nothing is judged again."""

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from llm.data.documents.bounds import Bounds
from llm.data.documents.reporting.counting import MEASURES
from llm.data.documents.reporting.ledger import Ledger
from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class WhatIf:
    """Counts [measure] of what stages let stay, by source.

    Attributes:
        sources: name -> [now, then, returning, going][measure].
        rules: rule -> [now, then][measure]: documents that it is the first to remove.
    """

    sources: dict[str, np.ndarray]
    rules: dict[str, np.ndarray]


def what_if(ledger: Ledger, changes: Sequence[Bounds]) -> WhatIf:
    """The outcome of the stages if rules had these bounds, all other verdicts being what they are.

    Figures are in the ledger with 24 bits, and one that equals a bound there is taken to be within it. A document
    without a figure keeps its verdict. Bounds are for all documents, and no `Chance` lets any stay.

    Raises:
        UserError: a rule is not in the ledger, or has no figures.
    """
    for change in changes:
        if change.rule not in ledger.rules:
            near = [rule for rule in ledger.rules if rule.endswith(f'/{change.rule}')]
            near = near or difflib.get_close_matches(change.rule, ledger.rules, n=1)
            fix = f'Did you mean {near[0]}?' if near else f'There are {", ".join(ledger.rules)}.'
            raise UserError(f'no stage has a rule {change.rule!r}', where=str(ledger.directory), fix=fix)
    numbers = [ledger.rules.index(change.rule) for change in changes]
    sources: dict[str, np.ndarray] = {}
    first = np.zeros((2, len(ledger.rules) + 1, len(MEASURES)))
    with_figures = np.zeros(len(changes), np.bool_)
    for rows in ledger.batches(('source',)):
        then = rows.keep.copy()
        for i, (number, change) in enumerate(zip(numbers, changes, strict=True)):
            values = rows.values[number]
            has = ~np.isnan(values)
            with_figures[i] |= has.any()
            then[number] = np.where(has, change.keep(values), then[number])
        measures = rows.measures
        outcomes = [_first(keep) for keep in (rows.keep, then)]
        for i, outcome in enumerate(outcomes):
            for measure in range(len(MEASURES)):
                first[i, :, measure] += np.bincount(outcome, measures[measure], len(ledger.rules) + 1)
        now, later = (outcome == len(ledger.rules) for outcome in outcomes)
        encoded = rows.names['source'].dictionary_encode()
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        for code, name in enumerate(encoded.dictionary.to_pylist()):
            own = codes == code
            counts = [measures[:, own & which].sum(1) for which in (now, later, later & ~now, now & ~later)]
            sources[name] = sources.get(name, 0.0) + np.array(counts)
    for change, has in zip(changes, with_figures, strict=True):
        if not has:
            raise UserError(f'rule {change.rule!r} has no figures in the ledger', where=str(ledger.directory))
    rules = {rule: first[:, i] for i, rule in enumerate(ledger.rules) if first[:, i].any()}
    return WhatIf(sources, rules)


def _first(keep: np.ndarray) -> np.ndarray:
    """[D]: the first rule that does not keep each document, R where all do; keep is [R, D]."""
    removed = ~keep
    return np.where(removed.any(0), removed.argmax(0), len(keep))
