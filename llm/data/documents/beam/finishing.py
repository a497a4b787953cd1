"""The last pipeline: representatives, evaluation sets, repeats, and the files that stay."""

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np

from llm.data.documents.beam import earlier
from llm.data.documents.beam.deduplicating import Lost, prepared, read_pairs
from llm.data.documents.beam.files import here, join, publish, write_record
from llm.data.documents.beam.groups import GROUPS, Join, Told, watched
from llm.data.documents.beam.nodes import identity_of, is_earlier, position_of
from llm.data.documents.beam.repeating import Group, Repeated, ranges_for
from llm.data.documents.beam.scanning import file_name, rows
from llm.data.documents.deduplication.config import EXACT, NEAR, Deduplication
from llm.data.documents.deduplication.corpus import Index
from llm.data.documents.deduplication.decontamination import CommonNgrams, Decontamination
from llm.data.documents.deduplication.repeats import Repeats
from llm.data.documents.deduplication.shards import decide_shard, evaluation_items
from llm.data.documents.deduplication.verdicts import FinalCounts, ShardDecisions, write_shard
from llm.data.documents.deduplication.words import words_of


@dataclasses.dataclass(frozen=True)
class Finish:
    """What the last pipeline does.

    Attributes:
        output, work: folders. turn: of the edges that are stars.
        digest: of the evaluation sets' content; workers keep them in memory by it. characters: of all documents.
        indexes: of earlier runs. state: of their documents, as `earlier.write_state` writes it.
    """

    output: str
    work: str
    turn: int
    config: Deduplication
    against: Decontamination | None
    digest: str
    salts: int
    characters: int
    indexes: tuple[Index, ...] = ()
    state: str = ''

    def build(self, pipeline: beam.Pipeline) -> None:
        """Adds all steps to a pipeline; last it writes OUTPUT/final-counts.json."""
        files = prepared(pipeline, self.output) | 'names' >> beam.Map(_named)
        lost = [
            read_pairs(pipeline, join(self.work, f'lost/{rule}/*'), f'lost by {rule}')
            for rule in self.config.rules
            if rule in EXACT
        ]
        if self.config.near is not None:
            lost.append(read_pairs(pipeline, join(self.work, f'edges/{self.turn}/*'), 'stars'))
        if self.indexes:
            rules = [rule for rule in self.config.rules if rule in (*EXACT, NEAR)]
            lost.append(earlier.lost(pipeline, self.indexes, rules))
        every = lost | 'all lost' >> beam.Flatten(pipeline=pipeline)
        resolved = self._resolved(every)
        removed = resolved | 'rows' >> beam.FlatMap(_row, len(self.config.prefer) + 1)
        if self.indexes:
            for_earlier = (
                resolved
                | 'for earlier' >> beam.FlatMap(_by_block)
                | 'blocks' >> beam.GroupByKey()
                | 'earlier ids' >> beam.FlatMap(_with_earlier, self.indexes)
            )
            removed = (removed, for_earlier) | 'all rows' >> beam.Flatten()
        decisions = {'path': files, 'removed': removed}
        if self.against is not None:
            decisions['contamination'] = self._contamination(decisions, self.against)
        if self.config.repeats:
            alive = decisions | 'alive' >> beam.CoGroupByKey() | 'stay' >> beam.Map(_staying)
            ranges = ranges_for(self.characters, self.salts)
            found = []
            for some in self.config.repeats:
                every = alive
                if self.indexes:
                    before = earlier.runs(pipeline, self.indexes, some.unit, self.state, f'earlier {some.unit}')
                    every = (alive, before) | f'with earlier {some.unit}' >> beam.Flatten()
                found.append(every | some.unit >> Repeated(some, self.config, self.salts, ranges))
            decisions['repeats'] = found | 'all repeats' >> beam.Flatten()
        _ = (
            decisions
            | 'decisions' >> beam.CoGroupByKey()
            | 'write' >> beam.Map(_write, self.config.repeats, self.output)
            | 'counts' >> beam.CombineGlobally(_total)
            | 'report' >> beam.Map(_report, self.output)
        )

    def _resolved(self, lost: Any) -> Any:
        """Each document that was removed with the one that stays for it at last; the rule is the one it had."""
        # A document is removed once by each of four rules at most in each run, so this often doubling a step leads to
        # the last one.
        for number in range(2 + len(self.indexes).bit_length()):
            values = lost | f'targets {number}' >> beam.Map(_target)
            by_target = lost | f'by target {number}' >> beam.Map(_by_target)
            lost = (
                (by_target, values) | f'follow {number}' >> Join(self.salts) | f'step {number}' >> beam.Map(_followed)
            )
        return lost

    def _contamination(self, decisions: dict[str, Any], against: Decontamination) -> Any:
        most = next((rule.most_documents for rule in against.rules if isinstance(rule, CommonNgrams)), 0)
        found = (
            decisions
            | 'alive for evaluation' >> beam.CoGroupByKey()
            | 'find' >> beam.FlatMap(_find, against, self.digest).with_outputs('ngrams', main='suspects')
        )
        # As many as evaluation sets have n-grams at most, however large the corpus is.
        ignored = (
            found.ngrams
            | 'documents of n-grams' >> beam.CombinePerKey(sum)
            | 'frequent' >> beam.Filter(_above, most)
            | 'hashes' >> beam.Keys()
        )
        return found.suspects | 'judge' >> beam.Map(
            _decide, beam.pvalue.AsList(ignored), against, self.digest, self.output
        )


def _named(path: str) -> tuple[str, str]:
    return file_name(path), path


def _target(lost: Lost) -> tuple[bytes, bytes]:
    return lost[0], lost[1][1]


def _by_target(lost: Lost) -> tuple[bytes, tuple[bytes, str]]:
    some, (rule, other) = lost
    return other, (some, rule)


def _followed(told: Told) -> Lost:
    target, (some, rule), further, _ = told
    return some, (rule, target if further is None else further)


def _row(lost: Lost, places: int) -> Iterator[tuple[str, tuple[int, str, str]]]:
    some, (rule, other) = lost
    if not is_earlier(some) and not is_earlier(other):
        where = position_of(some)
        yield where.name, (where.row, rule, identity_of(other, places))


def _by_block(lost: Lost) -> Iterator[tuple[int, tuple[bytes, tuple[bytes, str]]]]:
    some, (rule, other) = lost
    if not is_earlier(some) and is_earlier(other):
        yield earlier.block_of(other), (other, (some, rule))


def _with_earlier(element: tuple[int, Iterable[Any]], indexes: Sequence[Index]) -> Iterator[Any]:
    for (some, rule), identity in earlier.identities(watched(element[1]), indexes):
        where = position_of(some)
        yield where.name, (where.row, rule, identity)


def _gone(group: dict[str, list[Any]]) -> set[int]:
    """Rows that a rule before this one removed."""
    gone = {row for row, _, _ in group['removed']}
    for judged in group.get('contamination', ()):
        gone.update(judged['removed'])
    return gone


def _staying(element: Group) -> tuple[str, tuple[str, set[int]]]:
    """Path of a file, and its rows that are gone."""
    (path,) = element[1]['path']
    return element[0], (path, _gone(element[1]))


def _find(element: Group, against: Decontamination, digest: str) -> Iterator[Any]:
    """A file with its rows that may hold something of an item; and the n-grams of items in each document."""
    name, group = element
    gone, items = _gone(group), evaluation_items(against, digest)
    suspects: list[int] = []
    for first, batch in rows(group['path'][0], ('text',)):
        stays = np.array([i for i in range(len(batch['text'])) if first + i not in gone], np.int64)
        texts = [batch['text'][i] for i in stays]
        words = words_of(texts)
        hashes, _ = items.common(words)
        for value in hashes:
            yield beam.pvalue.TaggedOutput('ngrams', (value.tobytes(), 1))
        suspects += (first + stays[items.suspects(texts, words)]).tolist()
    yield name, (group['path'][0], suspects)


def _above(element: tuple[bytes, int], most: int) -> bool:
    return element[1] > most


def _decide(
    element: tuple[str, tuple[str, list[int]]], ignored: list[bytes], against: Decontamination, digest: str, output: str
) -> tuple[str, dict[str, Any]]:
    """What is done with the suspects of one file; writes its hits."""
    name, (path, suspects) = element
    with tempfile.TemporaryDirectory() as folder, here(path) as copy:
        decided, hits = Path(folder) / 'decided.json', Path(folder) / 'hits.parquet'
        decide_shard(
            copy, suspects, against, digest, np.sort(np.frombuffer(b''.join(ignored), np.uint64)), decided, hits
        )
        publish(hits, join(output, f'contamination/{name}.parquet'))
        content = json.loads(decided.read_text())
    return name, {
        'cuts': {int(row): [tuple(span) for span in spans] for row, spans in content['cuts'].items()},
        'removed': {int(row): item for row, item in content['removed'].items()},
    }


def _write(element: Group, settings: Sequence[Repeats], output: str) -> FinalCounts:
    """The final documents and the verdicts of one file."""
    import pyarrow.parquet

    name, group = element
    GROUPS.update(len(group['removed']))
    judged = group.get('contamination') or [{'cuts': {}, 'removed': {}}]
    removed_for = {row: other for row, _, other in group['removed']} | judged[0]['removed']
    by_row = {row: rule for row, rule, _ in group['removed']} | dict.fromkeys(judged[0]['removed'], 'contamination')
    repeats: dict[str, dict[int, list[int]]] = {some.unit: {} for some in settings}
    for unit, row, index in group.get('repeats', ()):
        repeats[unit].setdefault(row, []).append(index)
    with tempfile.TemporaryDirectory() as folder, here(group['path'][0]) as copy:
        count = pyarrow.parquet.read_metadata(copy).num_rows
        rules = [by_row.get(row) for row in range(count)]
        decisions = ShardDecisions(rules, removed_for, judged[0]['cuts'], repeats)
        final, verdicts = Path(folder) / 'final.parquet', Path(folder) / 'verdicts.parquet'
        counts = write_shard(copy, final, verdicts, decisions, settings)
        found = [pyarrow.parquet.read_metadata(path).num_rows for path in (final, verdicts)]
        if found != [counts.kept, count] or counts.documents != counts.kept + counts.removed.total():
            raise RuntimeError(f'documents were lost in {name}: {counts.as_json()}, in files {found}')
        publish(final, join(output, f'final/{name}.parquet'))
        publish(verdicts, join(output, f'verdicts/{name}.parquet'))
    return counts


def _total(some: Iterable[FinalCounts]) -> FinalCounts:
    total = FinalCounts()
    for counts in some:
        total.add(counts)
    return total


def _report(counts: FinalCounts, output: str) -> None:
    write_record(join(output, 'final-counts.json'), counts.as_json())
