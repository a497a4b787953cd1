"""How fast documents are prepared, a step a command, against the libraries that others use for it.

    python -m tools.benchmarks.data filters [--megabytes=3] [--rounds=3] [--files=GLOB]
    python -m tools.benchmarks.data minhash

filters: the rules of FineWeb (gin_configs/documents/fineweb_rules.gin) against datatrove's filters, on the same
documents in turns on one core; MB of UTF-8 a second of the process's own time, medians; and how often both agree.
`cold` begins with an empty table of words each round, as no long run does; `warm` has seen the documents before. Both
judge every document by every rule; datatrove stops at the first rule that removes a document, as its pipelines do.

minhash: signatures of 112 hash functions (14 bands of 8) over word 5-grams; of rensa (`pip install rensa`) over single
words of `split()`.
"""

import argparse
import gc
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.data.documents.deduplication.minhash import Bands
from llm.data.documents.deduplication.words import ngrams, words_of
from llm.data.documents.document import Document
from llm.data.documents.quality import words
from llm.data.documents.quality.c4 import C4
from llm.data.documents.quality.fineweb import FineWebQuality
from llm.data.documents.quality.gopher_quality import GopherQuality
from llm.data.documents.quality.gopher_repetition import GopherRepetition
from llm.data.documents.quality.rules import Rules
from llm.data.documents.shard_processing import BATCH_DOCUMENTS
from llm.data.sources import TextFiles, read_documents

_PAGE = 4000  # characters of a page that a book is cut into, to the next line end


def read_texts(files: str, megabytes: float) -> list[str]:
    """The documents of files that `TextFiles` reads; without, the real texts of LLM_DEV_DATA, books cut into pages."""
    if files:
        return _up_to(megabytes, list(read_documents(TextFiles(files, validation_fraction=0), 'train')))
    folder = Path(os.environ.get('LLM_DEV_DATA', '../shared/data'))
    texts = []
    for name in ('cc_en_head-0091', 'cc_en_head-0174', 'udhr'):
        with gzip.open(folder / 'web' / f'{name}.jsonl.gz', 'rt', encoding='utf-8') as file:
            texts += [json.loads(line)['text'] for line in file][:: 6 if name == 'udhr' else 1]
    with gzip.open(folder / 'dedup' / 'articles_1000.txt.gz', 'rt', encoding='utf-8') as file:
        texts += [line.split(' ', 1)[1] for line in file][::4]
    books = TextFiles(str(folder / 'text' / 'classic_books.jsonl.zst'), validation_fraction=0)
    for i, book in enumerate(read_documents(books, 'train')):
        if sum(map(len, texts)) > megabytes * 1e6:
            break
        start = 0
        for _ in range(40 if i % 2 == 0 else 0):
            end = book.find('\n', start + _PAGE)
            texts.append(book[start : end if end > 0 else len(book)])
            start = end + 1
            if end < 0:
                break
    return _up_to(megabytes, texts)


def _up_to(megabytes: float, texts: list[str]) -> list[str]:
    kept, size = [], 0
    for text in texts:
        if size < megabytes * 1e6:
            kept.append(text)
            size += len(text.encode())
    return kept


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
    print(f'{len(texts):,} documents, {megabytes:.1f} MB, {arguments.rounds} rounds')
    results, speeds = _in_turns(runs, megabytes, arguments.rounds)
    for name, speed in speeds.items():
        print(f'{name:12} {speed:8.2f} MB/s {speed / speeds["datatrove"]:8.1f} x')
    expected = results['datatrove']
    alike = sum((a is None) == (b is None) for a, b in zip(results['ours, warm'], expected, strict=True))
    same = sum(a == b for a, b in zip(results['ours, warm'], expected, strict=True))
    print(
        f'{sum(text is None for text in expected):,} removed by datatrove; decisions alike {alike / len(texts):.2%}, '
        f'and texts {same / len(texts):.2%}'
    )


def minhash(arguments: argparse.Namespace) -> None:
    """Print the table of `minhash`."""
    import rensa
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    bands = Bands.named('fineweb')
    # Its other choice, xxhash, takes no strings any more.
    step = MinhashDedupSignature('unused', MinhashConfig(hash_config=HashConfig(hash_fc='sha1')))
    texts = read_texts(arguments.files, arguments.megabytes)

    def ours() -> None:
        for start in range(0, len(texts), 512):
            bands.signatures(ngrams(words_of(texts[start : start + 512]), 5))

    def single_words() -> None:
        rensa.RMinHash.digest_matrix_from_token_sets([text.split() for text in texts], 112, 1)

    def theirs() -> None:
        for text in texts:
            step.get_signature(step.get_shingles(text))

    runs: dict[str, Callable[[], Any]] = {'ours': ours, 'rensa': single_words, 'datatrove': theirs}
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f'{len(texts):,} documents, {megabytes:.1f} MB, {arguments.rounds} rounds')
    for name, speed in _in_turns(runs, megabytes, arguments.rounds)[1].items():
        print(f'{name:20} {speed:8.2f} MB/s')


def _kept(result: Any) -> bool:
    return bool(result[0] if isinstance(result, tuple) else result)


def _in_turns(
    runs: dict[str, Callable[[], Any]], megabytes: float, rounds: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """(what each gives, the median of its MB/s)."""
    results = {name: run() for name, run in runs.items()}  # and what they load is loaded
    # What is there now is not looked through for garbage: each has the heap that it would have in a process of its own.
    gc.collect()
    gc.freeze()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - started)
    return results, {name: megabytes / statistics.median(times) for name, times in seconds.items()}


STEPS = {'filters': filters, 'minhash': minhash}


def main() -> None:
    """Measure the step that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('step', choices=STEPS)
    parser.add_argument('--megabytes', type=float, default=3.0)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--files', default='')
    arguments = parser.parse_args()
    STEPS[arguments.step](arguments)


if __name__ == '__main__':
    main()
