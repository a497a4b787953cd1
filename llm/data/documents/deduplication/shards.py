"""What phases do with one shard beyond the scan: hits in evaluation sets, and the last decisions on each document."""

import bisect
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.deduplication.corpus import Index, parquet_rows
from llm.data.documents.deduplication.decontamination import Decontamination, Items
from llm.data.documents.deduplication.repeats import Repeats
from llm.data.documents.deduplication.scan import text_batches
from llm.data.documents.deduplication.sorted_runs import BANDED, PLACED, RunWriter, read_range, records, runs_in
from llm.data.documents.deduplication.verdicts import FinalCounts, ShardDecisions, write_hits, write_shard
from llm.data.documents.deduplication.words import words_of
from llm.data.token_cache_building import write_json

# What stands in the state of a document for the rule that removed it; 0 is none.
RULE_CODES = {'id': 1, 'url': 2, 'document': 3, 'near_duplicate': 4, 'contamination': 5}
_NAMES = {code: rule for rule, code in RULE_CODES.items()}


def staying(some: np.ndarray, state: Path) -> np.ndarray:
    """Records whose documents no rule has removed.

    Args:
        state: uint8 by number, as RULE_CODES.
    """
    return some[np.load(state, mmap_mode='r')[some['node']] == 0]


@functools.lru_cache(maxsize=1)
def evaluation_items(against: Decontamination, digest: str) -> Items:
    """Read once in a process and run."""
    return Items(against)


def find_shard(
    path: Path, shard: int, index: Index, state: Path, against: Decontamination, digest: str, target: Path
) -> list[int]:
    """Rows of documents that may hold something of an item; writes which n-grams they hold."""
    numbers = index.numbers(shard)
    stays = np.load(state, mmap_mode='r')[numbers] == 0
    items = evaluation_items(against, digest)
    writer = RunWriter(target, f'{shard:06d}', BANDED)
    suspects: list[int] = []
    first = 0
    for batch in parquet_rows(path, ('text',)):
        texts = batch['text']
        for start, end in text_batches(texts):
            rows = np.flatnonzero(stays[first + start : first + end]) + start
            some = [texts[row] for row in rows]
            words = words_of(some)
            hashes, documents = items.common(words)
            writer.add(records(BANDED, key=hashes, node=numbers[first + rows[documents]]))
            suspects += (first + rows[items.suspects(some, words)]).tolist()
        first += len(texts)
    writer.close()
    return suspects


def decide_shard(
    path: Path,
    suspects: Sequence[int],
    against: Decontamination,
    digest: str,
    ignored: np.ndarray,
    target: Path,
    hits: Path,
) -> list[int]:
    """Judges suspects; writes the hits, what is cut out of which row and for which item a row goes; returns those."""
    items = evaluation_items(against, digest)
    wanted = set(suspects)
    found: list[dict[str, Any]] = []
    cuts: dict[int, Any] = {}
    removed: dict[int, str] = {}
    first = 0
    for batch in parquet_rows(path, ('id', 'text')):
        for row, (identity, text) in enumerate(zip(batch['id'], batch['text'], strict=True), start=first):
            if row not in wanted:
                continue
            judged = items.judge(text, ignored)
            found += [{'id': identity, **dataclasses.asdict(hit)} for hit in judged.hits]
            if judged.removed_for is not None:
                removed[row] = judged.removed_for
            elif judged.cuts:
                cuts[row] = judged.cuts
        first += len(batch['id'])
    write_hits(hits, found)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, {'cuts': cuts, 'removed': removed})
    return sorted(removed)


def finish_shard(
    path: Path,
    shard: int,
    state: Path,
    others: Path,
    indexes: Sequence[Index],
    settings: Sequence[Repeats],
    output: Path,
) -> FinalCounts:
    """Writes the final documents and the verdicts of a shard.

    Args:
        others: int64 by number: the document that each was removed for.
        indexes: of earlier runs, and of this one.
    """
    index = indexes[-1]
    numbers = index.numbers(shard)
    codes = np.load(state, mmap_mode='r')
    chosen = _last(numbers, codes, np.load(others, mmap_mode='r'))
    representatives = dict(_ids(chosen, indexes))
    removed_for = {row: representatives[number] for row, number in enumerate(chosen.tolist()) if number >= 0}
    decided = index.directory / f'contamination/{shard:06d}.json'
    cuts: dict[int, Any] = {}
    if decided.exists():
        content = json.loads(decided.read_text())
        removed_for |= {int(row): item for row, item in content['removed'].items()}
        cuts = {int(row): [tuple(span) for span in spans] for row, spans in content['cuts'].items()}
    rows = index.first_rows[shard], index.first_rows[shard + 1]
    repeats: dict[str, dict[int, list[int]]] = {}
    for some in settings:
        units = read_range(runs_in(index.directory / 'cuts' / some.unit), rows, PLACED)
        by_row = repeats.setdefault(some.unit, {})
        for position, number in zip(units['key'].tolist(), units['index'].tolist(), strict=True):
            by_row.setdefault(position - rows[0], []).append(number)
    decisions = ShardDecisions([_NAMES.get(int(code)) for code in codes[numbers]], removed_for, cuts, repeats)
    return write_shard(path, output / 'final' / path.name, output / 'verdicts' / path.name, decisions, settings)


def _last(numbers: np.ndarray, codes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each document the one that stays for it: where that one was removed by a later rule, the one for that one."""
    result = np.array(others[numbers])
    while True:
        there = np.flatnonzero(result >= 0)
        next_one = others[result[there]]
        further = (codes[result[there]] > 0) & (next_one >= 0)
        if not further.any():
            return result
        result[there[further]] = next_one[further]


def _ids(numbers: np.ndarray, indexes: Sequence[Index]) -> list[tuple[int, str]]:
    """(number, id) of each of these numbers, once."""
    wanted = np.unique(numbers[numbers >= 0])
    bases = [index.base for index in indexes]
    result: list[tuple[int, str]] = []
    owners = np.array([bisect.bisect_right(bases, number) - 1 for number in wanted.tolist()], np.int64)
    for i, index in enumerate(indexes):
        some = wanted[owners == i]
        result += zip(some.tolist(), index.ids(some), strict=True) if len(some) else []
    return result
