"""How fast vocabularies encode, against the libraries' own batch encoding, on the same text in one interleaved run.

    python tools/benchmarks/tokenizing.py [--megabytes=10] [--rounds=5] [--vocabulary=GPT2_DIRECTORY] [--files=GLOB]

GPT-2's ids: ours (`encode_batch`) against Hugging Face tokenizers' `encode_batch` and `encode_batch_fast`.
SentencePiece: ours against the library's own `encode` with as many threads. The text is the Python standard library
unless --files is given; without --vocabulary a byte-level BPE of 32,768 tokens is trained on it. Every contender's
ids are checked to be equal first. Each number of threads is a process of its own, because tokenizers reads it once.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llm.data.sources import Source, StandardLibrary, TextFiles, read_documents
from llm.data.vocabularies import ByteLevelBPE, SentencePieceVocabulary, load_vocabulary
from llm.data.vocabularies.training import sample_documents


def contenders(texts: list[str], threads: int, vocabulary: str) -> dict[str, Callable[[], list[Any]]]:
    """Each encodes all texts; those of one family (before the colon) give the same ids."""
    import sentencepiece

    if vocabulary:
        loaded = load_vocabulary(vocabulary)
        assert isinstance(loaded, ByteLevelBPE), f'{vocabulary} is not a byte-level BPE'
        bpe = loaded
    else:
        bpe = ByteLevelBPE.train(texts, 32_768)
    reference = bpe.reference_encoder
    pieces = SentencePieceVocabulary.train(sample_documents(texts, 2_000_000, 0), 8_192, 'bpe')
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces.files()['sentencepiece.model'])
    return {
        'bpe: ours': lambda: bpe.encode_batch(texts, num_threads=threads),
        'bpe: tokenizers': lambda: [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)],
        'bpe: tokenizers fast': lambda: [e.ids for e in reference.encode_batch_fast(texts, add_special_tokens=False)],
        'sentencepiece: ours': lambda: pieces.encode_batch(texts, num_threads=threads),
        'sentencepiece: library': lambda: processor.encode(texts, num_threads=threads),
    }


def measure(arguments: argparse.Namespace, threads: int) -> dict[str, float]:
    """MB/s of each contender, the median of its rounds."""
    source: Source = TextFiles(arguments.files, validation_fraction=0) if arguments.files else StandardLibrary()
    texts = sample_documents(read_documents(source, 'train'), int(arguments.megabytes * 1e6), seed=0)
    num_bytes = sum(len(text.encode()) for text in texts)
    runs = contenders(texts, threads, arguments.vocabulary)
    first: dict[str, np.ndarray] = {}
    for name, encode in runs.items():
        ids = np.concatenate([np.asarray(row, np.int64) for row in encode()])
        expected = first.setdefault(name.partition(':')[0], ids)
        assert np.array_equal(ids, expected), f'{name} gives other ids'
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, encode in runs.items():
            start = time.perf_counter()
            encode()
            seconds[name].append(time.perf_counter() - start)
    return {name: num_bytes / 1e6 / statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--megabytes', type=float, default=10, help='of text')
    parser.add_argument('--rounds', type=int, default=5, help='times that each contender encodes it all')
    parser.add_argument('--vocabulary', default='', help="directory with GPT-2's encoder.json and vocab.bpe")
    parser.add_argument('--files', default='', help='glob of text files')
    parser.add_argument('--threads', type=int, help='measure this number only, and print JSON')
    arguments = parser.parse_args()
    if arguments.threads:
        print(json.dumps(measure(arguments, arguments.threads)))
        return
    root = str(Path(__file__).parents[2])
    for threads in (1, 2):
        environment = {
            **os.environ,
            'RAYON_NUM_THREADS': str(threads),
            'TOKENIZERS_PARALLELISM': 'true',
            'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')]),
        }
        command = [sys.executable, __file__, *sys.argv[1:], f'--threads={threads}']
        speeds = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
        print(f'{threads} thread{"s" if threads > 1 else ""}, {arguments.megabytes:g} MB')
        for name, speed in speeds.items():
            ours = speeds[f'{name.partition(":")[0]}: ours']
            ratio = '' if name.endswith('ours') else f'   ours / {name.partition(": ")[2]}: {ours / speed:.2f}x'
            print(f'  {name:24}{speed:8.2f} MB/s{ratio}', flush=True)


if __name__ == '__main__':
    main()
