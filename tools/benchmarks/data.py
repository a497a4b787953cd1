"""Speed of data preparation against published implementations, interleaved on the same documents.

    python -m tools.benchmarks.data minhash [--megabytes=4] [--rounds=5]

Prints megabytes of UTF-8 a second of CPU time: the median over rounds. Peers that are not installed are left out.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

_PAGE = 3000


def pages(megabytes: float) -> list[str]:
    """Pages of books of 3,000 characters from the folder of development data."""
    folder = Path(os.environ.get('LLM_DEV_DATA', '../shared/data'))

    def cut() -> Iterator[str]:
        with zstandard.open(folder / 'text' / 'classic_books.jsonl.zst', 'rt', encoding='utf-8') as file:
            for line in file:
                text = json.loads(line)['text']
                yield from (text[i : i + _PAGE] for i in range(0, len(text), _PAGE))

    return list(itertools.islice(cut(), int(megabytes * 1e6 / _PAGE)))


def interleaved(contestants: dict[str, Callable[[list[str]], Any]], texts: list[str], rounds: int) -> None:
    """Each contestant once a round, after one that is not counted; prints the medians."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            started = time.process_time()
            run(texts)
            if turn:
                seconds[name].append(time.process_time() - started)
    for name, some in seconds.items():
        print(f'{name:44}{size / statistics.median(some):10.2f} MB/s ({min(some):.2f} to {max(some):.2f} s)')


def minhash() -> dict[str, Callable[[list[str]], Any]]:
    """Signatures of 112 hash functions over word 5-grams; of rensa over single words, split at white space."""
    from llm.data.documents.deduplication.minhash import Bands
    from llm.data.documents.deduplication.words import ngrams, words_of

    bands = Bands.named('fineweb')

    def ours(texts: list[str]) -> None:
        for i in range(0, len(texts), 512):
            bands.signatures(ngrams(words_of(texts[i : i + 512]), 5))

    found: dict[str, Callable[[list[str]], Any]] = {'llm.data: 14 x 8, 5-grams': ours}
    if importlib.util.find_spec('rensa'):
        import rensa

        found['rensa RMinHash: 112, words of split()'] = lambda texts: rensa.RMinHash.digest_matrix_from_token_sets(
            [text.split() for text in texts], 112, 1
        )
    if importlib.util.find_spec('datatrove'):
        from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
        from datatrove.utils.hashing import HashConfig

        hashing = 'xxhash' if importlib.util.find_spec('xxhash') else 'sha1'
        step = MinhashDedupSignature('unused', MinhashConfig(hash_config=HashConfig(hash_fc=hashing)))
        found[f'datatrove: 14 x 8, 5-grams, {hashing}'] = lambda texts: [
            step.get_signature(step.get_shingles(text)) for text in texts
        ]
    return found


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {'minhash': minhash}
    parser.add_argument('step', choices=steps)
    parser.add_argument('--megabytes', type=float, default=4)
    parser.add_argument('--rounds', type=int, default=5)
    arguments = parser.parse_args()
    interleaved(steps[arguments.step](), pages(arguments.megabytes), arguments.rounds)


if __name__ == '__main__':
    main()
