"""What could not be judged, by reason, and what was found of evaluation sets."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from llm.data.documents.reporting.ledger import Ledger
from llm.errors import UserError

_REASONS = 200
_SHOWN = 400
# What differs between records with one reason: numbers, and what is quoted.
_OWN = re.compile(r"\d[\d,.]*|'[^']*'|\"[^\"]*\"")


def quarantined(ledger: Ledger, samples: int) -> list[dict[str, Any]]:
    """By stage and reason, the most frequent first: how many, and some of them."""
    counts: Counter[tuple[str, str]] = Counter()
    shown: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in _lines(ledger):
        reason = str(record.get('reason'))
        key = record.get('stage') or 'reading', _OWN.sub('…', reason)[:_SHOWN]
        if key not in counts and len(counts) >= _REASONS:
            key = key[0], 'other reasons'
        counts[key] += 1
        some = shown.setdefault(key, [])
        if len(some) < samples:
            some.append({name: str(record.get(name) or '')[:_SHOWN] for name in ('where', 'id', 'reason')})
    return [
        {'stage': stage, 'reason': reason, 'count': count, 'samples': shown[stage, reason]}
        for (stage, reason), count in counts.most_common()
    ]


def _lines(ledger: Ledger) -> Iterator[dict[str, Any]]:
    for shard in ledger.chosen:
        path = ledger.directory / 'quarantine' / f'{ledger.shards[shard].stem}.jsonl'
        try:
            with path.open(encoding='utf-8') as file:
                for line in file:
                    yield json.loads(line)
        except (OSError, ValueError) as error:
            raise UserError(f'cannot be read ({error})', where=str(path), fix='Run prepare_data again.') from error


def contamination(ledger: Ledger, samples: int) -> dict[str, Any] | None:
    """Hits by rule and evaluation set, and some of them; None where no run has looked for any."""
    import pyarrow.parquet

    every = sorted((ledger.directory / 'contamination').glob('*.parquet')) if ledger.final else []
    if not every:
        return None
    paths = [every[shard] for shard in ledger.chosen]  # a file for each of the ledger, with its number
    counts: Counter[tuple[str, str]] = Counter()
    shown: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in paths:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            items = zip(batch.column('rule').to_pylist(), batch.column('item').to_pylist(), strict=True)
            for row, (rule, item) in enumerate(items):
                key = rule, item.rpartition(':')[0]
                counts[key] += 1
                some = shown.setdefault(key, [])
                if len(some) < samples:
                    hit = {name: batch.column(name)[row].as_py() for name in ('id', 'item', 'text', 'value')}
                    some.append({**hit, 'text': hit['text'][:_SHOWN]})
    found = [
        {'rule': rule, 'set': name, 'hits': count, 'samples': shown[rule, name]}
        for (rule, name), count in counts.most_common()
    ]
    return {'hits': counts.total(), 'sets': found}
