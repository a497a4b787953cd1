"""What preparing N TB of web archives costs through Beam, stage by stage.

    python -m tools.data_cost_model [--terabytes=100] [--cores=4096] [--rates=docs/data_rates.json] [...]

Rates are those that tools/benchmarks/data_costs.py measured on one core. A stage costs its functions, in seconds per MB
of what they are given, and Beam, in seconds per element that a shuffle moves. What no small corpus can tell (how much
of a crawl stays, how much is there twice) is assumed, and an argument.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RATES = Path('docs/data_rates.json')
_SALTS = 256
# What each step of the first pipeline is given.
_PREPARE = {'raw': ('read',), 'markup': ('extraction',), 'text': ('normalization', 'language', 'rules', 'write')}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        given: TB. hours: of one core. shuffled: TB.
    """

    name: str
    given: float
    hours: float
    shuffled: float = 0.0


def prepare_model(rates: Mapping[str, float], sizes: Mapping[str, float]) -> float:
    """Seconds of CPU from bytes of each kind: raw (decompressed archives), markup and text."""
    return sum(rates[step] / rates[kind] * sizes[kind] for kind, steps in _PREPARE.items() for step in steps)


def shuffles(rates: Mapping[str, Any], name: str, drivers: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Number that they go with -> (elements, bytes) of a pipeline's shuffles."""
    result = {
        driver: (elements * drivers[driver], size * drivers[driver])
        for driver, (elements, size) in rates['shuffles'][name].items()
    }
    if 'words' in result:  # arrays, cut into ranges of keys whenever a worker has collected enough
        ranges = max(_SALTS, drivers['words'] / rates['range'])
        result['words'] = max(1.0, drivers['words'] / rates['collected']) * ranges, result['words'][1]
    return result


def functions_model(rates: Mapping[str, Any], drivers: Mapping[str, float], text: float) -> dict[str, dict[str, float]]:
    """Pipeline -> step -> seconds of CPU of what is done in files, without Beam."""
    each, megabytes = rates['functions'], text / 1e6
    # Each end of a pair is a document whose set is made, once.
    in_pairs = min(1.0, 2 * drivers['pairs'] / max(drivers['documents'], 1))
    return {
        'duplicates': {'cards': each['cards'] * megabytes, 'sets': each['sets'] * megabytes * in_pairs},
        'stars': {},
        'finish': {'passages': each['passages'] * megabytes, 'final': each['final'] * megabytes},
    }


def pipeline_model(
    rates: Mapping[str, Any], name: str, drivers: Mapping[str, float], text: float
) -> tuple[float, float]:
    """(seconds of CPU, bytes shuffled) of a pipeline over documents with these numbers and so many bytes of text.

    What a pipeline takes to start is not in it.
    """
    moved = shuffles(rates, name, drivers).values()
    in_files = sum(functions_model(rates, drivers, text)[name].values())
    return in_files + sum(elements for elements, _ in moved) * rates['element'], sum(size for _, size in moved)


def stages(
    rates: Mapping[str, Any], compressed: float, kept: float, pairs: float, repeated: float, page: float
) -> Iterator[Stage]:
    """All stages of so many bytes of compressed archives.

    Args:
        kept: share of documents, and of their text, that stages leave. pairs: candidates of a document that is left.
        repeated: share of words that begin a passage which is in the corpus twice.
        page: bytes of a page's records, decompressed; 0 takes what was measured.
    """
    archive = rates['archive']
    raw = compressed * archive['raw'] / archive['compressed']
    sizes = {kind: raw * archive[kind] / archive['raw'] for kind in ('raw', 'markup', 'text')}
    for kind, steps in _PREPARE.items():
        for step in steps:
            yield Stage(step, sizes[kind] / 1e12, archive[step] / archive[kind] * sizes[kind] / 3600)
    text = sizes['text'] * kept
    documents = raw / (page or archive['raw'] / archive['documents']) * kept
    known = rates['drivers']
    drivers = {
        'documents': documents,
        'bands': documents * known['bands'] / known['documents'],
        'pairs': documents * pairs,
        'edges': documents * pairs,
        'words': text * known['words'] / rates['text'],
        'repeated': text * known['words'] / rates['text'] * repeated,
    }
    for name in ('duplicates', 'stars', 'finish'):
        for step, spent in functions_model(rates, drivers, text)[name].items():
            yield Stage(f'{name}: {step}', text / 1e12, spent / 3600)
        for driver, (elements, size) in shuffles(rates, name, drivers).items():
            yield Stage(f'{name}: by {driver}', text / 1e12, elements * rates['element'] / 3600, size / 1e12)


def table(rows: list[Stage], cores: int, core_hour: float, shuffled: float) -> str:
    """In Markdown.

    Args:
        core_hour, shuffled: dollars for an hour of a core with its memory, and for a TB that is shuffled; 0 leaves out.
    """
    total = Stage('all', rows[0].given, sum(row.hours for row in rows), sum(row.shuffled for row in rows))
    lines = [f'| stage | TB in | CPU hours | TB shuffled | hours on {cores:,} cores |', '|---|---|---|---|---|']
    lines += [
        f'| {row.name} | {row.given:,.1f} | {row.hours:,.0f} | {row.shuffled:,.1f} | {row.hours / cores:,.1f} |'
        for row in (*rows, total)
    ]
    if core_hour or shuffled:
        lines.append(f'\n{total.hours * core_hour + total.shuffled * shuffled:,.0f} dollars')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--terabytes', type=float, default=100.0, help='of compressed archives')
    parser.add_argument('--cores', type=int, default=4096)
    parser.add_argument('--kept', type=float, default=0.25, help='share of documents that all stages leave')
    parser.add_argument('--pairs', type=float, default=8.0, help='candidates of a document that is left')
    parser.add_argument('--repeated', type=float, default=0.07, help='share of words that begin a repeated passage')
    parser.add_argument('--page', type=float, default=0.0, help='bytes of a page, decompressed; 0 as measured')
    parser.add_argument('--core_hour', type=float, default=0.0, help='dollars')
    parser.add_argument('--shuffled', type=float, default=0.0, help='dollars for a TB')
    parser.add_argument('--rates', type=Path, default=RATES)
    given = parser.parse_args()
    rates = json.loads(given.rates.read_text())
    rows = list(stages(rates, given.terabytes * 1e12, given.kept, given.pairs, given.repeated, given.page))
    print(table(rows, given.cores, given.core_hour, given.shuffled))
    print('\n| held against a run | | model | measured | error |\n|---|---|---|---|---|')
    for row in rates['validation']:
        error = row['model'] / row['measured'] - 1
        print(f'| {row["what"]} | {row["unit"]} | {row["model"]:.2f} | {row["measured"]:.2f} | {error:+.0%} |')


if __name__ == '__main__':
    main()
