"""What evaluation sets hold must not be trained on: common n-grams, shares of them, matched words, fuzzy matches."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from llm.data.documents.deduplication.matched_words import MatchedWords, matched
from llm.data.documents.deduplication.minhash import Bands, jaccard
from llm.data.documents.deduplication.repeats import Span, pieces, united
from llm.data.documents.deduplication.words import Hashes, as_sets, ngrams, word_spans, words_of
from llm.data.documents.streams import bounded_lines
from llm.data.sources.files import file_identity, find_files, stream_bytes
from llm.errors import UserError

_SUFFIXES = tuple(
    f'{kind}{packing}' for kind in ('.jsonl', '.json', '.ndjson') for packing in ('', '.gz', '.zst', '.bz2')
)
_LONGEST_LINE = 1 << 26


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Items of JSON lines.

    Args:
        files: glob or globs. name: of the set; None takes each file's own.
        fields: whose strings, also within lists and objects, make an item's text; empty takes all.
    """

    files: str | tuple[str, ...]
    name: str | None = None
    fields: tuple[str, ...] = ()

    def items(self) -> Iterator[tuple[str, str]]:
        """(name:line, text) of each item.

        Raises:
            UserError: a file cannot be read, a line is no JSON object with one of the fields, or there is no item.
        """
        empty = True
        for path in find_files(self.files, _SUFFIXES):
            name = self.name or PurePath(path).name.partition('.')[0]
            for number, line in enumerate(bounded_lines(stream_bytes(path), _LONGEST_LINE), start=1):
                if isinstance(line, bytes) and not line.strip():
                    continue
                try:
                    record = json.loads(line) if isinstance(line, bytes) else None
                except (ValueError, RecursionError):
                    record = None
                fields = record if isinstance(record, dict) else {}
                strings = list(_strings({name: fields[name] for name in self.fields or fields if name in fields}))
                if not strings:
                    what = f'field {" or ".join(self.fields)}' if self.fields else 'string'
                    raise UserError(f'is no JSON object with a {what}', where=f'{path}:{number}', fix='Set fields.')
                empty = False
                yield f'{name}:{number}', '\n'.join(strings)
        if empty:
            raise UserError(
                'an evaluation set has no items',
                where=self.files if isinstance(self.files, str) else ', '.join(self.files),
                fix='Name files with a JSON object a line, or leave the set out.',
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


@dataclasses.dataclass(frozen=True)
class CommonNgrams:
    """An n-gram of words that is in an item, as for GPT-3 (Brown et al. 2020, appendix C).

    Args:
        words: of an n-gram. An item of fewer, but `least_words` or more, is looked for as a whole.
        most_documents: an n-gram that more documents have is a phrase of the language or of the law, and ignored.
        whole_documents: a document with a hit goes; False takes out the n-gram and `window` characters on both sides.
        least_piece: characters; a shorter rest between what is taken out goes, too.
        most_pieces: a document of which more would be left goes.
    """

    words: int = 13
    least_words: int = 8
    most_documents: int = 10
    whole_documents: bool = False
    window: int = 200
    least_piece: int = 200
    most_pieces: int = 10

    name = 'common_ngrams'

    def __post_init__(self) -> None:
        if not 1 <= self.least_words <= self.words or min(self.window, self.least_piece, self.most_documents) < 0:
            raise UserError('least_words must be from 1 to words, and nothing negative', where='CommonNgrams')


@dataclasses.dataclass(frozen=True)
class NgramShare:
    """A document that has at least `share` of an item's n-grams goes (as PaLM judges items; Chowdhery et al. 2022).

    Args:
        words: of an n-gram; items of fewer are not looked for.
    """

    words: int = 8
    share: float = 0.7

    name = 'ngram_share'

    def __post_init__(self) -> None:
        if self.words < 1 or not 0 < self.share <= 1:
            raise UserError('words must be positive, and share above 0 and at most 1', where='NgramShare')


@dataclasses.dataclass(frozen=True)
class FuzzyMatch:
    """A document of which the whole or a paragraph is a near duplicate of an item goes.

    Args:
        threshold: least Jaccard similarity of the sets of n-grams, of `shingle` words.
        least_words: of an item, lest short ones match by chance.
    """

    threshold: float = 0.7
    shingle: int = 3
    hashes: int = 128
    least_words: int = 8

    name = 'fuzzy_match'

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or min(self.shingle, self.hashes, self.least_words) < 1:
            raise UserError('threshold must be above 0 and at most 1, the rest positive', where='FuzzyMatch')


@dataclasses.dataclass(frozen=True)
class Decontamination:
    """Takes out of documents, or takes out documents, what evaluation sets hold; lists every hit.

    Args:
        sets: what is evaluated on. rules: how documents are compared with it.
    """

    sets: tuple[EvaluationSet, ...]
    rules: tuple[CommonNgrams | NgramShare | MatchedWords | FuzzyMatch, ...] = (CommonNgrams(),)

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        if not self.sets or not names or len(set(names)) < len(names):
            raise UserError('needs evaluation sets, and rules of different kinds', where='Decontamination')

    def count(self) -> int:
        """Items of all sets, which are read. Raises UserError as `EvaluationSet.items`."""
        return sum(1 for some in self.sets for _ in some.items())

    def identities(self) -> list[str]:
        """Change where the content of the sets does."""
        return [file_identity(path) for some in self.sets for path in find_files(some.files, _SUFFIXES)]


@dataclasses.dataclass(frozen=True)
class Hit:
    """An item that a document has something of.

    Attributes:
        text: the n-gram as the document has it; of a fuzzy match the beginning of the passage.
        value: share or similarity; 1 of a common n-gram. start: where in the document, in characters.
    """

    rule: str
    item: str
    text: str
    value: float
    start: int


@dataclasses.dataclass(frozen=True)
class Contamination:
    """What is to be done with a document: whether it goes, for which item, and what is cut out of it."""

    hits: tuple[Hit, ...]
    removed_for: str | None
    cuts: tuple[Span, ...]


class Items:
    """All items of all sets, ready to be found in documents."""

    def __init__(self, config: Decontamination):
        items: list[tuple[str, str]] = []
        for some in config.sets:
            items += some.items()
        self.names = [name for name, _ in items]
        self._words = words_of([text for _, text in items])
        self._rules = config.rules
        self._grams: dict[tuple[str, int], _Grams] = {}
        counts = self._words.counts
        for rule in config.rules:
            if isinstance(rule, CommonNgrams):
                for length in range(min(rule.least_words, rule.words), rule.words + 1):
                    fits = np.flatnonzero(counts >= length if length == rule.words else counts == length)
                    self._add(rule.name, length, fits)
            elif isinstance(rule, NgramShare):
                self._add(rule.name, rule.words, np.flatnonzero(counts >= rule.words))
            elif isinstance(rule, MatchedWords):
                self._add(rule.name, rule.anchor, np.flatnonzero(counts >= rule.words))
            else:
                self._fuzzy = _Fuzzy(rule, self._words)

    def _add(self, rule: str, length: int, fits: np.ndarray) -> None:
        if len(fits):
            self._grams[rule, length] = _Grams(_selected(self._words, fits), fits, length)

    def common(self, words: Hashes) -> tuple[np.ndarray, np.ndarray]:
        """(hash, document) of the n-grams of a batch that CommonNgrams finds, each once a document."""
        found = [
            (hashes[places], np.repeat(np.arange(len(words)), counts)[places])
            for (rule, _), grams in self._grams.items()
            if rule == CommonNgrams.name
            for hashes, counts, places in [grams.places(words)]
        ]
        if not found:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        both = np.unique(np.rec.fromarrays([np.concatenate(column) for column in zip(*found, strict=True)]))
        return both['f0'], both['f1']

    def suspects(self, texts: Sequence[str], words: Hashes) -> np.ndarray:
        """Documents of a batch that `judge` is to look at: those with any n-gram of an item, or a fuzzy match."""
        found = [
            np.repeat(np.arange(len(words)), counts)[places]
            for grams in self._grams.values()
            for _, counts, places in [grams.places(words)]
        ]
        if any(isinstance(rule, FuzzyMatch) for rule in self._rules):
            found.append(np.flatnonzero([len(some) > 0 for some in self._fuzzy.matches(texts)]))
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def judge(self, text: str, ignored: np.ndarray) -> Contamination:
        """What is to be done with one document.

        Args:
            ignored: sorted hashes of n-grams that too many documents have.
        """
        words = words_of([text])
        spans: list[Span] | None = None
        hits: list[Hit] = []
        removed_for = None
        cuts: list[Span] = []
        for rule in self._rules:
            before = len(hits)
            if isinstance(rule, FuzzyMatch):
                for start, excerpt, item, similarity in self._fuzzy.matches([text])[0]:
                    hits.append(Hit(rule.name, self.names[item], excerpt, similarity, start))
                goes = len(hits) > before
            else:
                spans = spans if spans is not None else word_spans([text])[0]
                windows: list[Span] = []
                for (name, length), grams in self._grams.items():
                    if name != rule.name:
                        continue
                    found = (
                        self._matched(words, grams, rule)
                        if isinstance(rule, MatchedWords)
                        else ((place, length, item, value) for place, item, value in grams.found(words, rule, ignored))
                    )
                    for place, size, item, value in found:
                        start, end = spans[place][0], spans[place + size - 1][1]
                        hits.append(Hit(rule.name, self.names[item], text[start:end], value, start))
                        windows.append((start, end))
                goes = bool(windows)
                if isinstance(rule, CommonNgrams) and not rule.whole_documents:
                    some, goes = cut_windows(text, windows, rule)
                    cuts += some
            if goes and removed_for is None:
                removed_for = hits[before].item
        return Contamination(tuple(hits), removed_for, tuple(united(cuts)))

    def _matched(self, words: Hashes, grams: '_Grams', rule: MatchedWords) -> Iterator[tuple[int, int, int, float]]:
        """(place among the words, length, item, value) of every run of items that are matched enough."""
        for item in grams.owners(words):
            runs, found = matched(words.values, self._words[item], rule)
            if (value := float(found.mean())) >= rule.share:
                yield from ((place, length, item, value) for place, length in sorted(runs.items()))


def cut_windows(text: str, hits: Sequence[Span], rule: CommonNgrams) -> tuple[list[Span], bool]:
    """(what is cut out around hits, whether the document goes)."""
    if not hits:
        return [], False
    cuts = united([(max(0, start - rule.window), min(len(text), end + rule.window)) for start, end in hits])
    edges = [0, *(edge for cut in cuts for edge in cut), len(text)]
    rests = [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if end > start]
    short = [rest for rest in rests if rest[1] - rest[0] < rule.least_piece]
    return united([*cuts, *short]), len(rests) > rule.most_pieces or len(short) == len(rests)


def _selected(words: Hashes, documents: np.ndarray) -> Hashes:
    parts = [words[i] for i in documents]
    return Hashes(np.concatenate(parts), np.cumsum([0, *map(len, parts)]))


class _Grams:
    """The n-grams of items: hashes, sorted, and for each the items that have it."""

    def __init__(self, words: Hashes, items: np.ndarray, length: int):
        sets = as_sets(ngrams(words, length, whole=False))
        self._length = length
        self._sizes = dict(zip(items.tolist(), sets.counts.tolist(), strict=True))
        owners = np.repeat(items, sets.counts)
        order = np.argsort(sets.values, kind='stable')
        self._owners = owners[order]
        self._hashes, starts = np.unique(sets.values[order], return_index=True)
        self._starts = np.append(starts, len(order))
        self._coarse = np.zeros(1 << 22, bool)  # a quick no for nearly all
        self._coarse[self._hashes >> np.uint64(42)] = True

    def places(self, words: Hashes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(all n-grams of a batch, their number in each document, which of them items have)."""
        grams = ngrams(words, self._length, whole=False)
        maybe = np.flatnonzero(self._coarse[grams.values >> np.uint64(42)])
        where = np.minimum(np.searchsorted(self._hashes, grams.values[maybe]), len(self._hashes) - 1)
        return grams.values, grams.counts, maybe[self._hashes[where] == grams.values[maybe]]

    def owners(self, words: Hashes) -> list[int]:
        """Items that have an n-gram of a document."""
        hashes, _, places = self.places(words)
        grams = np.unique(np.searchsorted(self._hashes, hashes[places]))
        return sorted(
            {int(owner) for gram in grams for owner in self._owners[self._starts[gram] : self._starts[gram + 1]]}
        )

    def found(
        self, words: Hashes, rule: CommonNgrams | NgramShare, ignored: np.ndarray
    ) -> Iterator[tuple[int, int, float]]:
        """(place among the words, item, value) of every hit in one document."""
        hashes, _, places = self.places(words)
        if isinstance(rule, CommonNgrams):
            places = places[~np.isin(hashes[places], ignored)]
        shared: dict[int, set[int]] = {}
        hits = []
        for place in places.tolist():
            gram = int(np.searchsorted(self._hashes, hashes[place]))
            for item in self._owners[self._starts[gram] : self._starts[gram + 1]].tolist():
                shared.setdefault(item, set()).add(gram)
                hits.append((place, item))
        for place, item in hits:
            value = len(shared[item]) / self._sizes[item]
            if isinstance(rule, CommonNgrams):
                yield place, item, 1.0
            elif value >= rule.share:
                yield place, item, value


class _Fuzzy:
    """Items by the bands of their signatures."""

    def __init__(self, rule: FuzzyMatch, words: Hashes):
        self._rule, self._bands = rule, Bands.solved(min(rule.threshold, 0.999), rule.hashes)
        items = np.flatnonzero(words.counts >= rule.least_words)
        self._sets: dict[int, np.ndarray] = {}
        self._buckets: dict[int, list[int]] = {}
        if len(items):
            shingles = as_sets(ngrams(_selected(words, items), rule.shingle))
            keys = self._bands.keys(self._bands.signatures(shingles))
            for i, item in enumerate(items.tolist()):
                self._sets[item] = shingles[i]
                for key in keys[i].tolist():
                    self._buckets.setdefault(key, []).append(item)

    def matches(self, texts: Sequence[str]) -> list[list[tuple[int, str, int, float]]]:
        """(start, beginning, item, similarity) in each document or paragraph; each item where it fits best."""
        units = [list(dict.fromkeys([(0, len(text)), *pieces('paragraphs', text)])) for text in texts]
        flat = [text[start:end] for text, some in zip(texts, units, strict=True) for start, end in some]
        shingles = as_sets(ngrams(words_of(flat), self._rule.shingle))
        keys = self._bands.keys(self._bands.signatures(shingles))
        number = 0
        found = []
        for text, some in zip(texts, units, strict=True):
            best: dict[int, tuple[int, str, int, float]] = {}
            for start, end in some:
                candidates = {item for key in keys[number].tolist() for item in self._buckets.get(key, ())}
                for item in sorted(candidates if len(shingles[number]) else ()):
                    value = jaccard(shingles[number], self._sets[item])
                    if value >= self._rule.threshold and value > best.get(item, (0, '', 0, 0.0))[3]:
                        best[item] = start, text[start : min(end, start + 200)], item, value
                number += 1
            found.append([best[item] for item in sorted(best)])
        return found
