"""How many tokens a second the loader makes, by packing and by length of documents, on one CPU device.

    python tools/benchmarks/loader.py [--rows=16] [--sequence_length=256] [--seconds=2]

Documents are random tokens in a temporary token cache. Batches are made without making them ahead, so
this is the work of one thread; a training step needs it to be well above what the step consumes.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm.data.examples import MixedExamples, ShuffledExamples
from llm.data.index_maps import MixtureSchedule
from llm.data.loader import Loader
from llm.data.packing import PackedRows, training_plan
from llm.data.sources import TextFiles
from llm.data.token_cache import TokenCache
from llm.data.token_cache_building import open_token_cache
from llm.parallel.mesh import MeshConfig, make_mesh


class RandomTokens:
    """Turns the text 'seed length' into so many random tokens."""

    size = 50_257
    pad_id = 0
    bos_id: int | None = None
    eos_id: int | None = 1
    digest = 'random tokens'

    def encode_batch(self, texts: list[str], num_threads: int | None = None) -> list[np.ndarray]:
        numbers = [tuple(map(int, text.split())) for text in texts]
        return [np.random.default_rng(seed).integers(2, self.size, length) for seed, length in numbers]


def make_cache(folder: Path, mean_length: int, num_tokens: int, shards: int = 4) -> TokenCache:
    """A cache of documents whose lengths are exponentially distributed."""
    (folder / 'text').mkdir(parents=True)
    rng = np.random.default_rng(mean_length)
    lengths = rng.exponential(mean_length, num_tokens // mean_length).astype(int) + 1
    for shard, part in enumerate(np.array_split(lengths, shards)):
        lines = [json.dumps({'text': f'{shard * 10**7 + i} {length}'}) for i, length in enumerate(part)]
        (folder / 'text' / f'{shard}.jsonl').write_text('\n'.join(lines))
    source = TextFiles(str(folder / 'text' / '*.jsonl'), validation_fraction=0.0)
    return open_token_cache(source, 'train', RandomTokens(), folder / 'cache', workers=1)


def tokens_per_second(loader: Loader, sequence_length: int, seconds: float) -> float:
    """Tokens of whole batches made in about `seconds`, divided by the time they took."""
    jax.block_until_ready(loader.batch(0))
    start, steps = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        steps += 1
        jax.block_until_ready(loader.batch(steps))
    return steps * loader.batch_size * sequence_length / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=16)
    parser.add_argument('--sequence_length', type=int, default=256)
    parser.add_argument('--seconds', type=float, default=2.0)
    parser.add_argument('--tokens', type=int, default=5_000_000)
    options = parser.parse_args()
    sharding = NamedSharding(make_mesh(MeshConfig(data=1), jax.devices()[:1]), PartitionSpec())
    with tempfile.TemporaryDirectory() as folder:
        every = []
        for mean_length in (20, 200, 2000):
            cache = make_cache(Path(folder) / str(mean_length), mean_length, options.tokens)
            for mode in ('concatenate', 'best_fit'):
                start = time.perf_counter()
                plan = training_plan(cache, options.sequence_length, mode, 0)
                planning = time.perf_counter() - start
                rows = PackedRows(cache, plan, options.sequence_length)
                examples = ShuffledExamples(rows, 0, mode)
                every.append(examples)
                rate = tokens_per_second(
                    Loader(examples, options.rows, sharding, prefetch=0), options.sequence_length, options.seconds
                )
                filled = cache.num_tokens / (rows.num_rows * options.sequence_length)
                print(
                    f'{mode:>11}, documents of {mean_length:>5} tokens: {rate / 1e6:6.1f}M tokens/s, '
                    f'{filled:.2%} filled, plan of {cache.num_documents:,} documents in {planning:.2f} s'
                )
        mixed = MixedExamples(every, MixtureSchedule([1.0] * len(every)))
        rate = tokens_per_second(
            Loader(mixed, options.rows, sharding, prefetch=0), options.sequence_length, options.seconds
        )
        print(f'mixture of all six: {rate / 1e6:.1f}M tokens/s')


if __name__ == '__main__':
    main()
