"""How fast n-gram models are estimated and documents scored, beside KenLM (`pip install kenlm`) on the same text.

    python -m tools.benchmarks.ngram_models [--train_megabytes=20] [--score_megabytes=4] [--rounds=3] [--lmplz=PATH]

MB of UTF-8 a second of the process's own time, medians of rounds in turns, on one core. KenLM is given the same model
as an ARPA file, read into its default tables, and lines that are divided into tokens already; ours starts from
documents. With the path of lmplz, its time for the same text too.
"""

import argparse
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.data.documents.ngram_models import load_ngram_model
from llm.data.documents.ngram_models.arpa import write_arpa
from llm.data.documents.ngram_models.building import build_ngram_model
from llm.data.documents.ngram_models.estimating import KneserNey
from llm.data.documents.ngram_models.tokens import TokenConfig, TokenKind
from llm.data.sources import TextFiles, read_documents

_PAGE = 4000


def _pages(megabytes: float) -> list[str]:
    """The books of LLM_DEV_DATA, cut into pages."""
    folder = Path(os.environ.get('LLM_DEV_DATA', '../shared/data'))
    pages: list[str] = []
    size = 0.0
    books = TextFiles(str(folder / 'text' / 'classic_books.jsonl.zst'), validation_fraction=0)
    for book in read_documents(books, 'train'):
        start = 0
        while start < len(book) and size < megabytes * 1e6:
            end = book.find('\n', start + _PAGE)
            end = len(book) if end < 0 else end
            pages.append(book[start:end])
            size += len(pages[-1].encode())
            start = end + 1
    return pages


def _seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(kind: TokenKind, pages: list[str], score_megabytes: float, rounds: int, lmplz: str) -> None:
    """Print the figures for one kind of tokens."""
    held_out: list[str] = []
    while sum(map(len, held_out)) < score_megabytes * 1e6:
        held_out.append(pages.pop())
    megabytes = sum(len(text.encode()) for text in held_out) / 1e6
    trained = sum(len(text.encode()) for text in pages) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / 'model'
        directory.mkdir()
        config = KneserNey(5, (0, 0, 1))
        seconds = _seconds(lambda: build_ngram_model(pages, [], directory, config=config, tokens=TokenConfig(kind)))
        model = load_ngram_model(str(directory))
        counts = ', '.join(f'{count:,}' for count in model.facts['ngrams'])
        print(f'{kind}: estimated from {trained:.1f} MB at {trained / seconds:.2f} MB/s; n-grams {counts}')
        lines = [line for text in pages for line in text.split('\n') if line.strip()]
        if lmplz and kind == 'white_space':
            (Path(folder) / 'text').write_text('\n'.join(lines))
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [lmplz, '-o', '5', '--prune', '0', '0', '1', '-S', '1G', '-T', folder, '--skip_symbols']
            subprocess.run(
                [*command, '--text', f'{folder}/text', '--arpa', f'{folder}/lmplz.arpa'],
                check=True,
                capture_output=True,
            )
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(f'  lmplz: {trained / spent:.2f} MB/s')
        theirs = None
        if kind == 'white_space':
            import kenlm

            write_arpa(model, Path(folder) / 'model.arpa')
            theirs = kenlm.Model(str(Path(folder) / 'model.arpa'))
        tokens = [line for text in held_out for line in text.split('\n') if line.strip()]
        ours_rates, their_rates = [], []
        for _ in range(rounds):
            ours_rates.append(megabytes / _seconds(lambda: model.perplexities(held_out)))
            if theirs is not None:
                their_rates.append(megabytes / _seconds(lambda: [theirs.score(line) for line in tokens]))
        said = f'  scored {megabytes:.1f} MB at {statistics.median(ours_rates):.1f} MB/s'
        print(said + (f', KenLM {statistics.median(their_rates):.1f} MB/s' if their_rates else ''), flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train_megabytes', type=float, default=20)
    parser.add_argument('--score_megabytes', type=float, default=4)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--lmplz', default='')
    arguments = parser.parse_args()
    for kind in ('words', 'white_space'):
        pages = _pages(arguments.train_megabytes + arguments.score_megabytes)
        measure(kind, pages, arguments.score_megabytes, arguments.rounds, arguments.lmplz)  # type: ignore[arg-type]


if __name__ == '__main__':
    main()
