"""All figures and samples of a report on prepared documents, as JSON takes them."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.documents.reporting.clusters import find_clusters
from llm.data.documents.reporting.config import DataReport
from llm.data.documents.reporting.counting import UNKNOWN, Counting, Groups, measured
from llm.data.documents.reporting.duplicates import Duplicates
from llm.data.documents.reporting.ledger import Ledger
from llm.data.documents.reporting.records import contamination, quarantined
from llm.data.documents.reporting.sampling import Sampling
from llm.data.documents.reporting.tokenizer import analyse
from llm.data.vocabularies import load_vocabulary

Embed = Callable[[Sequence[str]], np.ndarray]


def collect(directory: Path, config: DataReport, embed: Embed | None = None) -> dict[str, Any]:
    """What report.json holds. The ledger is read by row groups, twice.

    Args:
        embed: texts -> vectors [texts, D] in place of TF-IDF, for clusters.

    Raises:
        UserError: the directory holds no finished run, cannot be read, or has lost documents since.
    """
    ledger = Ledger(directory, config.documents)
    ledger.check_documents()
    path = config.vocabulary or ledger.vocabulary
    vocabulary = load_vocabulary(path) if path else None
    counting, sampling, duplicates = Counting(ledger), Sampling(ledger, config), Duplicates(ledger, config)
    for rows in ledger.batches():
        counting.add(rows)
        sampling.add(rows)
        duplicates.add(rows)
    bad = quarantined(ledger, config.samples)
    report = _counts(ledger, counting, config, sum(row['count'] for row in bad))
    report['quarantined'] = bad
    domains = [row['name'] for row in report['groups']['domain'] if row['name'] != UNKNOWN]
    report['samples'] = {**sampling.as_json(), 'domains': sampling.domains(domains)}
    report['duplicates'] = duplicates.as_json()
    report['contamination'] = contamination(ledger, config.samples)
    report['tokenizer'] = analyse(ledger, vocabulary, str(path), config) if vocabulary else None
    report['clusters'] = find_clusters(sampling.everything, config, embed)
    return report


def _counts(ledger: Ledger, counting: Counting, config: DataReport, bad: int) -> dict[str, Any]:
    tokens = ledger.has_tokens
    total = counting.groups['source'].counts.sum(0)
    assert ledger.summary is not None
    judged = total.sum(0)
    return {
        'directory': str(ledger.directory),
        'has_tokens': tokens,
        'final': ledger.final,
        'files': [len(ledger.chosen), len(ledger.shards)],
        'totals': {
            'read': int(judged[0]) + bad,
            'quarantined': bad,
            'ignored': dict(Counter(ledger.summary['counts']['ignored']).most_common()),
            'judged': measured(judged, tokens=tokens),
            'stays': measured(total[-1], tokens=tokens),
            'final_characters': int(counting.kept_characters.counts.sum()),
        },
        'rules': _rules(ledger, counting),
        'groups': {
            kind: _group_rows(ledger, groups, None if kind == 'source' else config.names)
            for kind, groups in counting.groups.items()
        },
        'names': {kind: len(groups) for kind, groups in counting.groups.items()},
        'forgotten': [kind for kind, groups in counting.groups.items() if groups.pruned],
    }


def _rules(ledger: Ledger, counting: Counting) -> list[dict[str, Any]]:
    """Of each rule: what it removed first, at all, and it alone; by source and language, too."""
    tokens = ledger.has_tokens
    result = []
    for number, rule in enumerate(ledger.all_rules):
        row: dict[str, Any] = {'rule': rule, 'over_all_shards': number >= len(ledger.rules)}
        total = counting.groups['source'].counts.sum(0)
        row['first'] = measured(total[number], tokens=tokens)
        row['by'] = {}
        if row['over_all_shards']:
            # Each of these sees only what those before it left.
            row |= {'at_all': row['first'], 'only': row['first']}
            for kind in counting.rules:
                row['by'][kind] = {
                    name: {which: measured(some[number], tokens=tokens) for which in ('first', 'at_all', 'only')}
                    for name, some in counting.groups[kind].items()
                    if some[number].any()
                }
        else:
            both = counting.rules['source'].counts.sum(0)[number]
            row |= {'at_all': measured(both[0], tokens=tokens), 'only': measured(both[1], tokens=tokens)}
            for kind, groups in counting.rules.items():
                first = dict(counting.groups[kind].items())
                row['by'][kind] = {
                    name: {
                        'first': measured(first[name][number], tokens=tokens),
                        'at_all': measured(some[number][0], tokens=tokens),
                        'only': measured(some[number][1], tokens=tokens),
                    }
                    for name, some in groups.items()
                    if some[number].any()
                }
            histogram = counting.histograms[number]
            row['bounds'] = [[b.least, b.most, b.of] for b in ledger.bounds_of(rule)]
            row['histogram'] = None if histogram is None else histogram.as_json()
        result.append(row)
    return result


def _group_rows(ledger: Ledger, groups: Groups, most: int | None) -> list[dict[str, Any]]:
    """Of each name: what was judged, what stays, and which rules removed the rest."""
    tokens = ledger.has_tokens
    return [
        {
            'name': name,
            'judged': measured(counts.sum(0), tokens=tokens),
            'stays': measured(counts[-1], tokens=tokens),
            'removed': {
                ledger.all_rules[i]: measured(counts[i], tokens=tokens)
                for i in np.argsort(-counts[:-1, 0], kind='stable').tolist()
                if counts[i, 0]
            },
        }
        for name, counts in groups.items(most)
    ]
