"""What the report of a run says of its data."""

from collections.abc import Iterable
from typing import Any

from llm.data.examples import MixedExamples
from llm.data.packing import PackedRows
from llm.data.sources import ReadCounts
from llm.data.token_cache import TokenCache


def facts(examples: MixedExamples) -> dict[str, int | float | str]:
    """What the training data is, in figures by label, for logs and the run's report."""
    result: dict[str, int | float | str] = {}
    for name, source, share in zip(examples.names, examples.sources, examples.schedule.shares(), strict=True):
        records = source.records
        assert isinstance(records, PackedRows)
        cache = records.cache
        result |= {
            f'{name}: documents': cache.num_documents,
            f'{name}: bytes': cache.num_bytes,
            f'{name}: tokens': cache.num_tokens,
            f'{name}: bytes per token': cache.num_bytes / max(1, cache.num_tokens - cache.num_documents),
            f'{name}: rows': records.num_rows,
            f'{name}: part of a row that is not padding': cache.num_tokens
            / (records.num_rows * records.sequence_length),
            f'{name}: share of training rows': share,
            f'{name}: token cache': str(cache.directory),
        }
    return result


def bad_records(caches: Iterable[TokenCache]) -> dict[str, Any]:
    """What reading met that was left out or mended: `bad_records` and `bad_examples` of the run's report."""
    counts = ReadCounts()
    for cache in caches:
        counts.merge(cache.counts)
    reasons = {'empty': counts.empty, 'invalid UTF-8': counts.invalid_utf8, 'left out': counts.skipped}
    return {
        'bad_records': {reason: number for reason, number in reasons.items() if number},
        'bad_examples': [
            {'where': f'{sample.file}:{sample.record}', 'reason': sample.reason} for sample in counts.samples
        ],
    }
