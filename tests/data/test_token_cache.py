"""The token cache: what it holds, and that it is the same however it was made, interrupted or damaged."""

import concurrent.futures
import dataclasses
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from llm.data.sources import TextFiles
from llm.data.token_cache import TokenCache
from llm.data.token_cache_building import open_token_cache
from llm.errors import UserError
from tests.data.byte_tokens import ByteTokens

ROOT = Path(__file__).parents[2]


def write_corpus(folder: Path, shards: int = 5, documents: int = 30) -> TextFiles:
    """Documents 'i/j xxx…' in `shards` files, with an empty shard and non-ASCII text among them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        lines = [json.dumps({'text': f'{i}/{j} é ' + 'xyz' * (j % 7)}) for j in range(documents)]
        (folder / f'{i}.jsonl').write_text('\n'.join(lines if i != 2 else []))
    return TextFiles(str(folder / '*.jsonl'), validation_fraction=0.2)


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a cache by name, without the lock."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != 'build.lock'}


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / 'corpus')


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_holds_every_document_with_its_boundary_and_bytes(corpus, tmp_path, split):
    vocabulary = ByteTokens()
    cache = open_token_cache(corpus, split, vocabulary, tmp_path / 'cache', workers=1)
    texts = [text for shard in corpus.shards(split) for text in shard.documents(cache.counts.__class__())]
    assert cache.num_documents == len(texts) > 10
    for index, text in enumerate(texts):
        tokens = cache.document(index)
        assert tokens[-1] == vocabulary.eos_id
        assert vocabulary.decode(tokens[:-1]) == text
    assert cache.document_bytes().tolist() == [len(text.encode()) for text in texts]
    assert cache.num_bytes == sum(len(text.encode()) for text in texts) == cache.counts.bytes
    assert cache.num_tokens == cache.num_bytes + len(texts) == cache.document_ends()[-1]


def test_splits_divide_the_corpus(corpus, tmp_path):
    caches = [open_token_cache(corpus, split, ByteTokens(), tmp_path, workers=1) for split in ('train', 'validation')]
    texts = [ByteTokens().decode(cache.document(i)) for cache in caches for i in range(cache.num_documents)]
    assert len(texts) == len(set(texts)) == 120


def test_gather_equals_slicing_the_stream_over_shards(corpus, tmp_path):
    cache = open_token_cache(corpus, 'train', ByteTokens(), tmp_path, workers=1)
    stream = np.concatenate([cache.document(i) for i in range(cache.num_documents)])
    rng = np.random.default_rng(0)
    ends = cache.document_ends()
    starts = np.concatenate([[0], ends[:-1]])
    chosen = rng.integers(0, cache.num_documents, 200)
    first = starts[chosen] + rng.integers(0, 3, 200)
    lengths = rng.integers(0, 4, 200)
    expected = np.concatenate([stream[a : a + n] for a, n in zip(first, lengths, strict=True)])
    assert np.array_equal(cache.gather(first, lengths), expected)


@pytest.mark.parametrize('workers', [2, 3])
def test_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path, workers):
    alone = open_token_cache(corpus, 'train', ByteTokens(), tmp_path / '1', workers=1)
    together = open_token_cache(corpus, 'train', ByteTokens(), tmp_path / 'n', workers=workers)
    assert contents(alone.directory) == contents(together.directory)


KILLED_BUILD = """
import sys, time
sys.path.insert(0, {root!r})
from tests.data.test_token_cache import write_corpus, SlowTokens
from llm.data.token_cache_building import open_token_cache
from pathlib import Path
if __name__ == '__main__':
    open_token_cache(write_corpus(Path({corpus!r}), 12), 'train', SlowTokens(), {cache!r}, workers={workers})
"""


class SlowTokens(ByteTokens):
    """As ByteTokens, and slow enough to be killed at work."""

    digest = ByteTokens().digest

    def encode_batch(self, texts, num_threads=None):
        time.sleep(0.1)
        return super().encode_batch(texts, num_threads)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_killed_build_is_taken_up_and_gives_the_same_bytes(tmp_path, workers):
    script = tmp_path / 'build.py'
    script.write_text(
        KILLED_BUILD.format(root=str(ROOT), corpus=str(tmp_path / 'corpus'), cache=str(tmp_path / 'n'), workers=workers)
    )
    process = subprocess.Popen([sys.executable, str(script)])
    while len(list((tmp_path / 'n').glob('*/*.json'))) < 3:
        assert process.poll() is None, 'the build ended before it could be killed'
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert psutil.wait_procs(children, timeout=60)[1] == [], 'workers outlive the process that started them'
    committed = {path: path.stat().st_mtime_ns for path in (tmp_path / 'n').glob('*/*.json')}
    assert not list((tmp_path / 'n').glob('*/manifest.json')) and len(committed) < 12

    corpus = write_corpus(tmp_path / 'corpus', 12)
    resumed = open_token_cache(corpus, 'train', ByteTokens(), tmp_path / 'n', workers=workers)
    whole = open_token_cache(corpus, 'train', ByteTokens(), tmp_path / '1', workers=1)
    assert contents(resumed.directory) == contents(whole.directory)
    assert committed == {path: path.stat().st_mtime_ns for path in committed}, 'a finished shard was made again'


def test_a_finished_cache_is_only_opened(corpus, tmp_path):
    first = open_token_cache(corpus, 'train', ByteTokens(), tmp_path, workers=1)
    times = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    second = open_token_cache(corpus, 'train', ByteTokens(), tmp_path, workers=1)
    assert second.digest == first.digest
    assert times == {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}


def test_other_content_vocabulary_split_or_boundary_is_another_cache(corpus, tmp_path):
    def digest(source=corpus, split='train', vocabulary=ByteTokens()):
        return open_token_cache(source, split, vocabulary, tmp_path / 'cache', workers=1).digest

    digests = [digest(), digest(split='validation'), digest(vocabulary=ByteTokens(bos_id=2)), digest()]
    (tmp_path / 'corpus' / '0.jsonl').write_text('{"text": "another"}\n{"text": "text"}')
    digests.append(digest())
    assert digests[0] == digests[3] and len(set(digests)) == 4


@pytest.mark.parametrize('part', ['tokens', 'ends', 'bytes', 'json', 'manifest'])
def test_a_truncated_file_is_noticed_and_only_its_shard_made_again(corpus, tmp_path, part):
    cache = open_token_cache(corpus, 'train', ByteTokens(), tmp_path, workers=1)
    before = contents(cache.directory)
    damaged = cache.directory / ('manifest.json' if part == 'manifest' else f'00001.{part}')
    damaged.write_bytes(damaged.read_bytes()[:-3])
    if part == 'json':
        (cache.directory / 'manifest.json').unlink()
    times = {path: path.stat().st_mtime_ns for path in cache.directory.glob('00000.*')}
    assert contents(open_token_cache(corpus, 'train', ByteTokens(), tmp_path, workers=1).directory) == before
    assert times == {path: path.stat().st_mtime_ns for path in cache.directory.glob('00000.*')}


def test_a_flipped_bit_is_found_by_reading(corpus, tmp_path):
    cache = open_token_cache(corpus, 'train', ByteTokens(), tmp_path, workers=1)
    assert cache.damaged_files() == []
    path = cache.directory / '00003.tokens'
    data = bytearray(path.read_bytes())
    data[7] ^= 4
    path.write_bytes(data)
    assert cache.damaged_files() == [path]


def test_a_large_vocabulary_takes_four_bytes(corpus, tmp_path):
    small = open_token_cache(corpus, 'train', ByteTokens(size=65536), tmp_path, workers=1)
    large = open_token_cache(corpus, 'train', ByteTokens(size=65537), tmp_path, workers=1)
    sizes = [(cache.directory / '00000.tokens').stat().st_size for cache in (small, large)]
    assert sizes[1] == 2 * sizes[0]
    assert np.array_equal(small.document(3), large.document(3)) and large.document(3).dtype == np.int32


def test_an_id_outside_the_vocabulary_is_a_bug_that_shows(corpus, tmp_path):
    with pytest.raises(ValueError, match='outside'):
        open_token_cache(corpus, 'train', ByteTokens(size=100), tmp_path, workers=1)


def test_a_pickled_cache_reads_the_same(corpus, tmp_path):
    cache = open_token_cache(corpus, 'train', ByteTokens(), tmp_path, workers=1)
    cache.document(0)
    assert np.array_equal(pickle.loads(pickle.dumps(cache)).document(7), cache.document(7))


def test_two_builders_at_once_agree(corpus, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(open_token_cache, corpus, 'train', SlowTokens(), tmp_path, workers=1, progress=False)
            for _ in range(4)
        ]
        digests = {job.result().digest for job in jobs}
    assert len(digests) == 1
    assert TokenCache(tmp_path / digests.pop()).damaged_files() == []


def test_a_vocabulary_without_boundary_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match='neither a bos nor an eos'):
        open_token_cache(corpus, 'train', ByteTokens(bos_id=None, eos_id=None), tmp_path)


def test_a_split_without_documents_is_refused(tmp_path):
    (tmp_path / 'empty.jsonl').write_text('{"text": " "}\n')
    with pytest.raises(UserError, match='the train split has no documents'):
        open_token_cache(TextFiles(str(tmp_path / '*.jsonl')), 'train', ByteTokens(), tmp_path / 'cache')


def test_bad_records_are_counted_and_limited_over_all_shards(tmp_path):
    for i in range(3):
        (tmp_path / f'{i}.jsonl').write_text('{"text": "good"}\nnot json\n')
    source = TextFiles(str(tmp_path / '*.jsonl'), validation_fraction=0.0, max_bad_records=2)
    for _ in range(2):
        with pytest.raises(UserError, match='3 bad records'):
            open_token_cache(source, 'train', ByteTokens(), tmp_path / 'cache', workers=1)
    allowed = dataclasses.replace(source, max_bad_records=3)
    counts = open_token_cache(allowed, 'train', ByteTokens(), tmp_path / 'cache', workers=1).counts
    assert counts.skipped == 3 and counts.documents == 3
    assert [(Path(sample.file).name, sample.record) for sample in counts.samples] == [
        ('0.jsonl', 2),
        ('1.jsonl', 2),
        ('2.jsonl', 2),
    ]


def test_no_permission_is_a_user_error(corpus, tmp_path):
    (tmp_path / 'file').write_text('')
    for directory in ('/sys/cache', tmp_path / 'file' / 'cache'):
        with pytest.raises(UserError, match='cannot be written') as caught:
            open_token_cache(corpus, 'train', ByteTokens(), directory, workers=1)
        assert 'cache_directory' in caught.value.fix


def test_no_space_is_a_user_error_and_leaves_nothing_half_written(corpus, tmp_path):
    # A limit on the size of files fails a write as a full disk does, with EFBIG for ENOSPC.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(UserError, match='cannot be written') as caught:
            open_token_cache(corpus, 'train', ByteTokens(), tmp_path / 'cache', workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'Free some space' in caught.value.fix
    assert not list((tmp_path / 'cache').glob('*/*.tmp'))
    assert open_token_cache(corpus, 'train', ByteTokens(), tmp_path / 'cache', workers=1).damaged_files() == []


class DeadlyTokens(ByteTokens):
    """Dies as a process does when memory runs out."""

    def encode_batch(self, texts, num_threads=None):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_a_user_error(corpus, tmp_path):
    with pytest.raises(UserError, match='tokenising died'):
        open_token_cache(corpus, 'train', DeadlyTokens(), tmp_path, workers=2)
