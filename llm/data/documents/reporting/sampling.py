"""Documents to look at: chosen by a hash of their ids, or because a rule's figure is next to its bound."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm.data.documents.reporting.config import DataReport
from llm.data.documents.reporting.ledger import Ledger, Rows

# How documents are chosen for a rule: removed by it, at random; removed, and kept, with the figures next to its bound,
# those first that no other rule removes.
KINDS = ('removed', 'just_removed', 'just_kept')

_BEHIND = 1e9  # farther from a bound than figures are


def hashes(ids: Sequence[str], seed: int) -> np.ndarray:
    """uint64 [D]: the smallest of these are a sample, the same however documents are cut into shards."""
    key = str(seed).encode()
    digests = (hashlib.blake2b(name.encode(errors='replace'), digest_size=8, key=key).digest() for name in ids)
    return np.frombuffer(b''.join(digests), np.uint64)


@dataclasses.dataclass
class _Smallest:
    """The rows of the smallest keys so far: (key, tie, document as JSON takes it)."""

    most: int
    rows: list[tuple[float, int, dict[str, Any]]] = dataclasses.field(default_factory=list)

    def offer(self, keys: np.ndarray, ties: np.ndarray, where: np.ndarray, described: 'Described') -> None:
        """Candidates at `where` [n] of a batch, with keys [n] and ties [n]."""
        if not self.most:
            return
        if len(self.rows) == self.most:
            near = keys <= self.rows[-1][0]
            keys, ties, where = keys[near], ties[near], where[near]
        if not len(keys):
            return
        best = np.lexsort((ties, keys))[: self.most]
        new = zip(keys[best].tolist(), ties[best].tolist(), where[best].tolist(), strict=True)
        self.rows += [(key, tie, described(row)) for key, tie, row in new]
        self.rows = sorted(self.rows, key=lambda row: row[:2])[: self.most]

    def documents(self) -> list[dict[str, Any]]:
        return [document for _, _, document in self.rows]


class Described:
    """Rows of a batch as JSON takes them."""

    def __init__(self, ledger: Ledger, rows: Rows, rule: int | None = None):
        self._rows, self._rule = rows, rule
        self._outcomes = (*ledger.all_rules, None)
        self._has_tokens = rows.tokens is not None

    def __call__(self, row: int) -> dict[str, Any]:
        rows = self._rows
        document = {
            name: rows.names[name][row].as_py() for name in ('id', 'source', 'url', 'domain', 'language', 'excerpt')
        }
        document |= {'characters': int(rows.characters[row]), 'removed_by': self._outcomes[rows.outcomes[row]]}
        if rows.tokens is not None and not math.isnan(rows.tokens[row]):
            document['tokens'] = int(rows.tokens[row])
        if self._rule is not None and not math.isnan(value := float(rows.values[self._rule, row])):
            document['value'] = float(f'{value:.6g}')
        return document


class Sampling:
    """Samples of each rule, of each source, and of all documents for the search of clusters."""

    def __init__(self, ledger: Ledger, config: DataReport):
        self._ledger, self._config = ledger, config
        self._rules = [{kind: _Smallest(config.samples) for kind in KINDS} for _ in ledger.rules]
        self._final = [_Smallest(config.samples) for _ in ledger.final_rules]
        self._sources: dict[str, dict[str, _Smallest]] = {}
        self._all = _Smallest(config.cluster_documents if config.clusters else 0)

    def add(self, rows: Rows) -> None:
        """Look at a batch."""
        ledger = self._ledger
        ties = hashes(rows.names['id'].to_pylist(), self._config.seed)
        plain = Described(ledger, rows)
        self._all.offer(ties, ties, np.arange(len(ties)), plain)
        stays = rows.outcomes == len(ledger.all_rules)
        self._by(self._sources, rows.names['source'], ties, stays, plain)
        for number, smallest in enumerate(self._final, start=len(ledger.rules)):
            here = np.flatnonzero(rows.outcomes == number)
            smallest.offer(ties[here], ties[here], here, plain)
        for number, rule in enumerate(ledger.rules):
            described, keep, values = Described(ledger, rows, number), rows.keep[number], rows.values[number]
            here = np.flatnonzero(~keep)
            self._rules[number]['removed'].offer(ties[here], ties[here], here, described)
            bounds = ledger.bounds_of(rule)[:1]
            limits = [limit for b in bounds for limit in (b.least, b.most) if limit is not None]
            if not limits:
                continue
            away = np.abs(values[:, None].astype(np.float64) - np.array(limits)).min(1)
            # Those that no other rule removes come first: of these the bound alone decides.
            away[~np.delete(rows.keep, number, axis=0).all(0)] += _BEHIND
            for kind, which in (('just_removed', ~keep), ('just_kept', keep)):
                some = np.flatnonzero(which & ~np.isnan(values))
                self._rules[number][kind].offer(away[some], ties[some], some, described)

    def _by(
        self,
        groups: dict[str, dict[str, _Smallest]],
        names: Any,
        ties: np.ndarray,
        stays: np.ndarray,
        described: Described,
    ) -> None:
        encoded = names.dictionary_encode()
        numbers = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        for number, name in enumerate(encoded.dictionary.to_pylist()):
            if name not in groups:
                if len(groups) >= self._config.names:
                    continue
                groups[name] = {kind: _Smallest(self._config.samples) for kind in ('kept', 'removed')}
            for kind, which in (('kept', stays), ('removed', ~stays)):
                here = np.flatnonzero((numbers == number) & which)
                groups[name][kind].offer(ties[here], ties[here], here, described)

    def domains(self, names: Sequence[str]) -> dict[str, Any]:
        """Samples of these domains, for which the ledger is read once more."""
        import pyarrow
        import pyarrow.compute

        groups = {name: {kind: _Smallest(self._config.samples) for kind in ('kept', 'removed')} for name in names}
        wanted = pyarrow.array(names, pyarrow.string())
        columns = ('id', 'source', 'url', 'domain', 'language', 'excerpt')
        for rows in self._ledger.batches(columns, verdicts=False) if names else ():
            here = pyarrow.compute.is_in(rows.names['domain'], wanted).to_numpy(zero_copy_only=False)
            if here.any():
                where = np.flatnonzero(here)
                some = {name: column.take(pyarrow.array(where)) for name, column in rows.names.items()}
                fewer = dataclasses.replace(
                    rows,
                    names=some,
                    outcomes=rows.outcomes[where],
                    characters=rows.characters[where],
                    tokens=None if rows.tokens is None else rows.tokens[where],
                )
                ties = hashes(some['id'].to_pylist(), self._config.seed)
                stays = fewer.outcomes == len(self._ledger.all_rules)
                self._by(groups, some['domain'], ties, stays, Described(self._ledger, fewer))
        return _as_json(groups)

    @property
    def everything(self) -> list[dict[str, Any]]:
        """A sample of all documents."""
        return self._all.documents()

    def as_json(self) -> dict[str, Any]:
        """By rule and kind, and by source and whether they stay."""
        rules = {
            rule: {kind: smallest.documents() for kind, smallest in kinds.items()}
            for rule, kinds in zip(self._ledger.rules, self._rules, strict=True)
        }
        for rule, smallest in zip(self._ledger.final_rules, self._final, strict=True):
            rules[rule] = {'removed': smallest.documents()}
        return {'rules': rules, 'sources': _as_json(self._sources)}


def _as_json(groups: dict[str, dict[str, _Smallest]]) -> dict[str, Any]:
    return {name: {kind: found.documents() for kind, found in kinds.items()} for name, kinds in groups.items()}
