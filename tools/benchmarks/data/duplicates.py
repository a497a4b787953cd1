"""Steps `minhash` and `near_duplicates`: signatures, and the duplicates that are found with them."""

import argparse
import gzip
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.minhash import Bands
from llm.data.documents.deduplication.pipeline import finish
from llm.data.documents.deduplication.words import ngrams, words_of
from tests.data.documents.deduplication.datatrove_clusters import clusters_of_datatrove
from tests.data.documents.deduplication.prepared import rows, write_shards
from tools.benchmarks.data.measuring import DEV_DATA, in_turns, load, read_texts


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
    print(f'{len(texts):,} documents, {megabytes:.1f} MB, {arguments.rounds} rounds, {load()}')
    for name, speed in in_turns(runs, megabytes, arguments.rounds)[1].items():
        print(f'{name:20} {speed:8.2f} MB/s')


def near_duplicates(arguments: argparse.Namespace) -> None:
    """Print the table of `near_duplicates`."""
    print(f'{"articles":>8} {"":10} {"true pairs":>10} {"found":>6} {"others":>6} {"CPU s":>7}    {load()}')
    for count in (100, 1000):
        folder = DEV_DATA / 'dedup'
        with gzip.open(folder / f'articles_{count}.txt.gz', 'rt', encoding='utf-8') as file:
            articles = [(name, text) for name, text in (line.rstrip('\n').split(' ', 1) for line in file)]
        lines = (folder / f'articles_{count}.truth').read_text().splitlines()
        truth = {frozenset(line.split()) for line in lines if line.strip()}
        for name, find in (('ours', _ours), ('datatrove', clusters_of_datatrove)):
            with tempfile.TemporaryDirectory() as temporary:
                started = time.process_time()
                clusters = find(articles, Path(temporary))
                seconds = time.process_time() - started
            pairs = {frozenset((a, b)) for cluster in clusters for a in cluster for b in cluster if a != b}
            figures = f'{len(truth):>10} {len(truth & pairs):>6} {len(pairs - truth):>6} {seconds:>7.2f}'
            print(f'{count:>8} {name:10} {figures}')


def _ours(articles: list[tuple[str, str]], folder: Path) -> list[list[str]]:
    """Clusters by the real phases; pairs of them have been verified on their sets of n-grams."""
    output = write_shards(folder, [[{'id': name, 'text': text} for name, text in articles]])
    finish(output, Deduplication(), None, processes=1)
    clusters: dict[str, list[str]] = {}
    for row in rows(output, 'verdicts'):
        if row['rule']:
            clusters.setdefault(row['representative'], [row['representative']]).append(row['id'])
    return list(clusters.values())
