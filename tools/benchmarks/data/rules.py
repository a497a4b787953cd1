"""Step `filters`: rules of quality against datatrove's filters."""

import argparse
from collections.abc import Callable
from typing import Any

from llm.data.documents.document import Document
from llm.data.documents.quality import words
from llm.data.documents.quality.c4 import C4
from llm.data.documents.quality.fineweb import FineWebQuality
from llm.data.documents.quality.gopher_quality import GopherQuality
from llm.data.documents.quality.gopher_repetition import GopherRepetition
from llm.data.documents.quality.rules import Rules
from llm.data.documents.shard_processing import BATCH_DOCUMENTS
from tools.benchmarks.data.measuring import in_turns, load, read_texts


def filters(arguments: argparse.Namespace) -> None:
    """Print the table of `filters`."""
    from datatrove import data
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    stage = Rules((GopherRepetition(), GopherQuality(), C4(punctuated_lines=False), FineWebQuality()))
    others = (
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    )
    texts = read_texts(arguments.files, arguments.megabytes)
    documents = [Document(str(i), text, 'benchmark') for i, text in enumerate(texts)]

    def ours() -> list[str | None]:
        results = []
        for start in range(0, len(documents), BATCH_DOCUMENTS):
            results += [
                d.text if d.removed_by is None else None for d in stage(documents[start : start + BATCH_DOCUMENTS])
            ]
        return results

    def cold() -> list[str | None]:
        words.empty_table()
        return ours()

    def theirs() -> list[str | None]:
        results = []
        for text in texts:
            document = data.Document(text=text, id='')
            kept = all(_kept(other.filter(document)) for other in others)
            results.append(document.text if kept else None)
        return results

    runs: dict[str, Callable[[], list[str | None]]] = {'ours, cold': cold, 'ours, warm': ours, 'datatrove': theirs}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f'{len(texts):,} documents, {megabytes:.1f} MB, {arguments.rounds} rounds, {load()}')
    results, speeds = in_turns(runs, megabytes, arguments.rounds)
    for name, speed in speeds.items():
        print(f'{name:12} {speed:8.2f} MB/s {speed / speeds["datatrove"]:8.1f} x')
    expected = results['datatrove']
    alike = sum((a is None) == (b is None) for a, b in zip(results['ours, warm'], expected, strict=True))
    same = sum(a == b for a, b in zip(results['ours, warm'], expected, strict=True))
    print(
        f'{sum(text is None for text in expected):,} removed by datatrove; decisions alike {alike / len(texts):.2%}, '
        f'and texts {same / len(texts):.2%}'
    )


def _kept(result: Any) -> bool:
    return bool(result[0] if isinstance(result, tuple) else result)
