"""Counts of documents, characters and tokens by outcome, rule and group, added up batch by batch in bounded memory."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm.data.documents.reporting.ledger import Ledger, Rows

# What is counted of each set of documents.
MEASURES = ('documents', 'characters', 'tokens')
# Names of one kind (domains, URLs) that are counted at once; then the rarer half is forgotten.
_NAMES = 20_000
_BINS = 40
# Figures that are whole numbers within so many get a bar each.
_WHOLE = 50
_SAMPLED_VALUES = 200_000
UNKNOWN = 'unknown'


class Groups:
    """Counts by name, of an array of `shape` each; of too many names those of the frequent ones, as `pruned` says.

    The last axis is of measures, the first of which counts documents: it says which names are frequent.
    """

    def __init__(self, *shape: int):
        self.counts = np.zeros((0, *shape))
        self._numbers: dict[str | None, int] = {}
        self._shape = shape
        self.pruned = False

    def numbers(self, names: Any) -> np.ndarray:
        """int64 [D]: where the name of each row is counted."""
        if len(self._numbers) > _NAMES:
            self._prune()
        encoded = names.dictionary_encode()
        table = [self._numbers.setdefault(name, len(self._numbers)) for name in encoded.dictionary.to_pylist()]
        if encoded.null_count:
            table.append(self._numbers.setdefault(None, len(self._numbers)))
        if (missing := len(self._numbers) - len(self.counts)) > 0:
            self.counts = np.concatenate([self.counts, np.zeros((max(missing, len(self.counts)), *self._shape))])
        return np.array(table, np.int64)[encoded.indices.fill_null(len(table) - 1).to_numpy(zero_copy_only=False)]

    def add(self, numbers: np.ndarray, *index: Any, weights: np.ndarray) -> None:
        """counts[number, *index] += weights of all rows; index holds numbers or arrays [D]."""
        np.add.at(self.counts, (numbers, *index), weights)

    def _prune(self) -> None:
        self.pruned = True
        documents = self.counts[..., 0].reshape(len(self.counts), -1).sum(1)[: len(self._numbers)]
        keep = np.sort(np.argsort(-documents, kind='stable')[: _NAMES // 2])
        names = list(self._numbers)
        self._numbers = {names[i]: new for new, i in enumerate(keep.tolist())}
        self.counts = self.counts[keep]

    def items(self, most: int | None = None) -> list[tuple[str, np.ndarray]]:
        """(name, counts), those of the most documents first, then by name."""
        found = [(UNKNOWN if name is None else name, self.counts[i]) for name, i in self._numbers.items()]
        return sorted(found, key=lambda item: (-item[1][..., 0].sum(), -item[1].sum(), item[0]))[:most]

    def __len__(self) -> int:
        return len(self._numbers)


class Histogram:
    """Figures of one rule in bars whose borders are those of the rule: no bar is on both sides of a bound.

    Args:
        sample: of the figures, that the borders are chosen by. bounds: of the rule.
    """

    def __init__(self, sample: np.ndarray, least: Sequence[float], most: Sequence[float]):
        sample = sample[np.isfinite(sample)].astype(np.float64)
        self.least, self.most = list(least), list(most)
        low, high = map(float, np.quantile(sample, [0.005, 0.995]) if len(sample) else (0.0, 1.0))
        low, high = min([low, *least, *most]), max([high, *least, *most])
        if len(sample):  # with room for what is beyond a bound, as far as there is any
            low = min([low, *(max(sample.min(), limit - 0.3 * (high - limit)) for limit in least)])
            high = max([high, *(min(sample.max(), limit + 0.3 * (limit - low)) for limit in most)])
        whole = bool(len(sample)) and bool((sample == np.round(sample)).all())
        shift, self.scale = 0.0, 'linear'
        if whole and high - low <= _WHOLE:
            edges, shift = np.arange(math.floor(low), max(math.ceil(high), math.floor(low) + 4) + 2) - 0.5, 0.5
        elif low >= 0 and high > 50 * max(1.0, float(np.median(sample))):
            self.scale = 'log'
            edges = np.geomspace(max(low, 0.5 if whole else high / 1e5), high * 1.05, _BINS + 1)
        else:
            margin = 0.02 * (high - low) or 0.5
            edges = np.linspace(low if 0 <= low < margin else low - margin, high + margin, _BINS + 1)
        limits = np.array([*(limit - shift for limit in least), *(limit + shift for limit in most)])
        self.edges = _with(edges, limits, self.scale)
        # Bars are [from, to), and a figure that equals its upper bound stays.
        at = self.edges.astype(np.float32)
        upper = np.isin(self.edges, np.array(list(most), np.float64))
        self._at = np.where(upper, np.nextafter(at, np.float32(np.inf)), at)
        self.counts = np.zeros((2, len(self.edges) + 1), np.int64)
        self.without = np.zeros(2, np.int64)

    def add(self, values: np.ndarray, keep: np.ndarray) -> None:
        """values float32 [D], keep bool [D]."""
        for i, some in enumerate((values[keep], values[~keep])):
            has = some[~np.isnan(some)]
            self.without[i] += len(some) - len(has)
            self.counts[i] += np.bincount(np.searchsorted(self._at, has, side='right'), minlength=len(self.edges) + 1)

    def as_json(self) -> dict[str, Any]:
        """Bars: kept and removed by this rule, the first below and the last above all edges."""
        return {
            'edges': [float(f'{edge:.6g}') for edge in self.edges],
            'kept': self.counts[0].tolist(),
            'removed': self.counts[1].tolist(),
            'without_figure': self.without.tolist(),
            'scale': self.scale,
            'least': self.least,
            'most': self.most,
        }


class Counting:
    """Everything that is counted in one pass over the ledger."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        outcomes = len(ledger.all_rules) + 1
        kinds = ('source', 'language', 'domain', 'licence', 'year', 'url')
        # By name: [outcome, measure].
        self.groups = {kind: Groups(outcomes, len(MEASURES)) for kind in kinds}
        # By source and language: [rule, at all or only, measure].
        self.rules = {kind: Groups(len(ledger.rules), 2, len(MEASURES)) for kind in ('source', 'language')}
        self.kept_characters = Groups(1)
        self.histograms = _histograms(ledger)

    def add(self, rows: Rows) -> None:
        """Count a batch."""
        import pyarrow.compute

        measures = rows.measures
        names = {kind: rows.names[kind] for kind in ('source', 'language', 'domain', 'licence', 'url')}
        names['year'] = pyarrow.compute.utf8_slice_codeunits(rows.names['date'], 0, 4)
        for kind, column in names.items():
            groups, numbers = self.groups[kind], self.groups[kind].numbers(column)
            for i in range(len(MEASURES)):
                groups.add(numbers, rows.outcomes, i, weights=measures[i])
        numbers = self.kept_characters.numbers(rows.names['source'])
        self.kept_characters.add(numbers, 0, weights=rows.kept_characters)
        removed = ~rows.keep
        alone = removed & (removed.sum(0) == 1)
        for kind, groups in self.rules.items():
            numbers = groups.numbers(rows.names[kind])
            for rule in np.flatnonzero(removed.any(1)).tolist():
                for which, some in enumerate((removed[rule], alone[rule])):
                    here = np.flatnonzero(some)
                    for i in range(len(MEASURES)):
                        groups.add(numbers[here], rule, which, i, weights=measures[i][here])
        for rule, histogram in enumerate(self.histograms):
            if histogram is not None:
                histogram.add(rows.values[rule], rows.keep[rule])


def _with(edges: np.ndarray, limits: np.ndarray, scale: str) -> np.ndarray:
    """Edges in order with the limits among them, and none next to a limit."""
    if not len(limits):
        return edges
    places, at = (np.log(np.maximum(some, edges[0] / 2)) if scale == 'log' else some for some in (edges, limits))
    near = np.abs(places[:, None] - at).min(1) < 0.3 * np.diff(places).min()
    return np.unique([*edges[~near], *limits])


def _histograms(ledger: Ledger) -> list[Histogram | None]:
    """For each rule that has figures; borders are chosen by the beginnings of files all over the ledger."""
    count = len(ledger.chosen)
    which = [ledger.chosen[i] for i in sorted({round(i) for i in np.linspace(0, count - 1, min(count, 64))})]
    samples: list[np.ndarray] = []
    for shard in which:
        rows = next(iter(ledger.batches(('source',), shards=[shard])), None)
        if rows is not None:
            samples.append(rows.values[:, : max(1, _SAMPLED_VALUES // len(which))])
    values = np.concatenate(samples, 1) if samples else np.zeros((len(ledger.rules), 0), np.float32)
    result: list[Histogram | None] = []
    for i, rule in enumerate(ledger.rules):
        bounds = ledger.bounds_of(rule)
        least = sorted({b.least for b in bounds if b.least is not None})
        most = sorted({b.most for b in bounds if b.most is not None})
        has = bool(np.isfinite(values[i]).any())
        result.append(Histogram(values[i], least, most) if has else None)
    return result


def measured(counts: np.ndarray, *, tokens: bool) -> dict[str, int]:
    """[measure] as JSON takes it."""
    return {name: int(value) for name, value in zip(MEASURES if tokens else MEASURES[:2], counts, strict=False)}
