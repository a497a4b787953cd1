"""Real texts to measure with, and speeds of several things measured in turns."""

import gc
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.data.sources import TextFiles, read_documents

DEV_DATA = Path(os.environ.get('LLM_DEV_DATA', '../shared/data'))
_PAGE = 4000  # characters of a page that a book is cut into, to the next line end
_MIXED = 10  # up to so many MB books are a part of every kind of text; beyond, there is nothing else to take more of


def read_texts(files: str, megabytes: float) -> list[str]:
    """The documents of files that `TextFiles` reads; without, the real texts of LLM_DEV_DATA, books cut into pages."""
    if files:
        return _up_to(megabytes, list(read_documents(TextFiles(files, validation_fraction=0), 'train')))
    texts = []
    for name in ('cc_en_head-0091', 'cc_en_head-0174', 'udhr'):
        with gzip.open(DEV_DATA / 'web' / f'{name}.jsonl.gz', 'rt', encoding='utf-8') as file:
            texts += [json.loads(line)['text'] for line in file][:: 6 if name == 'udhr' else 1]
    with gzip.open(DEV_DATA / 'dedup' / 'articles_1000.txt.gz', 'rt', encoding='utf-8') as file:
        texts += [line.split(' ', 1)[1] for line in file][::4]
    books = TextFiles(str(DEV_DATA / 'text' / 'classic_books.jsonl.zst'), validation_fraction=0)
    part = (2, 40) if megabytes <= _MIXED else (1, 1 << 30)
    for i, book in enumerate(read_documents(books, 'train')):
        if sum(map(len, texts)) > megabytes * 1e6:
            break
        start = 0
        for _ in range(part[1] if i % part[0] == 0 else 0):
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


def in_turns(
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


def load() -> str:
    """What else the machine does: processes that run or wait, and processors."""
    return f'load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors'
