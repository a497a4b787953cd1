"""Writing a token cache: shard by shard, in parallel processes, resumable after a kill, the same bytes in any case.

A shard is written under temporary names, flushed to disk and renamed; its .json comes last and commits it. A build that
was killed keeps every committed shard. The format is in `llm.data.token_cache`.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llm.data.sources import ReadCounts, Shard, Source, Split, empty_split_error
from llm.data.token_cache import (
    MANIFEST,
    PARTS,
    Boundaries,
    ShardRecord,
    TokenCache,
    Tokenizer,
    cache_digest,
    shard_file,
    token_dtype,
)
from llm.errors import UserError

# What one call of encode_batch is given: enough to keep its threads busy, little enough to bound memory.
_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 4096
_LOCK = 'build.lock'

logger = logging.getLogger(__name__)


def open_token_cache(
    source: Source,
    split: Split,
    vocabulary: Tokenizer,
    cache_directory: str | Path,
    *,
    workers: int = 0,
    progress: bool = True,
) -> TokenCache:
    """The token cache of a split of `source`, made first if it is not there or damaged.

    Args:
        cache_directory: holds one directory for each cache, named by its digest.
        workers: processes that read and tokenise; 0 takes one for each processor. 1 works in this process.
        progress: show a bar while building, if standard error is a terminal.

    Raises:
        UserError: nothing to read, too many bad records, no space, no permission, or a worker was killed.
    """
    shards = source.shards(split)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        fingerprints = list(threads.map(lambda shard: shard.fingerprint(), shards))
    digest = cache_digest(fingerprints, split, vocabulary)
    directory = Path(cache_directory).expanduser() / digest
    with disk_errors(directory):
        cache = _open_if_intact(directory)
        if cache is None:
            directory.mkdir(parents=True, exist_ok=True)
            with _locked(directory / _LOCK):
                cache = _open_if_intact(directory)  # another process may have made it meanwhile
                if cache is None:
                    _build(directory, digest, shards, fingerprints, split, vocabulary, workers, progress)
                    cache = TokenCache(directory)
    counts = ReadCounts(max_bad_records=getattr(source, 'max_bad_records', None))
    counts.merge(cache.counts)  # raises where the limit is passed
    if cache.num_documents == 0:
        raise empty_split_error(split, cache.counts, shards)
    return cache


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _open_if_intact(directory: Path) -> TokenCache | None:
    try:
        return TokenCache(directory)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning('token cache is damaged and is made again: %s', error)
        return None


def _build(
    directory: Path,
    digest: str,
    shards: Sequence[Shard],
    fingerprints: Sequence[str],
    split: Split,
    vocabulary: Tokenizer,
    workers: int,
    progress: bool,
) -> None:
    """Write all shards that are missing, then the manifest. The lock is held."""
    dtype = token_dtype(vocabulary.size)
    (directory / MANIFEST).unlink(missing_ok=True)
    for left_over in directory.glob('*.tmp'):
        left_over.unlink(missing_ok=True)
    records = {
        index: record
        for index, fingerprint in enumerate(fingerprints)
        if (record := _committed(directory, index, fingerprint, dtype.itemsize)) is not None
    }
    missing = [index for index in range(len(shards)) if index not in records]
    jobs = [_Job(directory, index, shards[index], fingerprints[index]) for index in missing]
    wanted = workers or processors()
    with tqdm(
        desc=f'tokenising {split}', unit='B', unit_scale=True, disable=None if progress else True, leave=False
    ) as bar:
        tally = _Tally(bar, done=len(shards) - len(jobs), total=len(shards))
        write = _write_here if min(wanted, len(jobs)) <= 1 else _write_in_processes
        records.update(write(jobs, vocabulary, min(wanted, len(jobs)), tally))
    counts = ReadCounts()
    ordered = [records[index] for index in range(len(shards))]
    for record in ordered:
        counts.merge(ReadCounts.from_dict(record.counts))
    manifest = {
        'digest': digest,
        'split': split,
        'vocabulary': vocabulary.digest,
        'boundaries': dataclasses.asdict(Boundaries.of(vocabulary)),
        'dtype': dtype.str,
        'counts': counts.as_dict(),
        'shards': [dataclasses.asdict(record) for record in ordered],
    }
    write_json(directory / MANIFEST, manifest)


def _committed(directory: Path, index: int, fingerprint: str, item_size: int) -> ShardRecord | None:
    """The record of a shard that an earlier build finished, if its files have their sizes."""
    try:
        record = ShardRecord(**json.loads((directory / shard_file(index, 'json')).read_text()))
    except (FileNotFoundError, TypeError, ValueError):
        return None
    return record if record.fingerprint == fingerprint and record.is_intact(directory, index, item_size) else None


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard to write."""

    directory: Path
    index: int
    shard: Shard
    fingerprint: str


class _Tally:
    """Moves the progress bar: bytes read, shards done, bad records."""

    def __init__(self, bar: Any, done: int, total: int):
        self._bar, self._done, self._total = bar, done, total
        self._show()

    def add_bytes(self, count: int) -> None:
        self._bar.update(count)

    def add_shard(self) -> None:
        self._done += 1
        self._show()

    def _show(self) -> None:
        self._bar.set_postfix_str(f'{self._done}/{self._total} shards')


def _write_here(
    jobs: Sequence[_Job], vocabulary: Tokenizer, workers: int, tally: _Tally
) -> Iterator[tuple[int, ShardRecord]]:
    for job in jobs:
        yield job.index, _write_shard(job, vocabulary, None, tally.add_bytes)
        tally.add_shard()


def _write_in_processes(
    jobs: Sequence[_Job], vocabulary: Tokenizer, workers: int, tally: _Tally
) -> Iterator[tuple[int, ShardRecord]]:
    # Spawned, because a fork of a process in which JAX runs threads may hang.
    context = multiprocessing.get_context('spawn')
    reports, stop = context.SimpleQueue(), context.Event()
    threads = max(1, processors() // workers)
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(vocabulary, threads, reports, stop)
    )
    try:
        pending = {pool.submit(_write_in_worker, job): job for job in jobs}
        while pending:
            done, _ = concurrent.futures.wait(pending, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
            while not reports.empty():
                tally.add_bytes(reports.get())
            for future in done:
                yield pending[future].index, future.result()
                del pending[future]
                tally.add_shard()
    except BrokenProcessPool as error:
        raise UserError(
            'a process that was tokenising died, which is often for want of memory',
            fix='Lower DataConfig.workers and start again: finished shards are kept.',
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=not pending, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(vocabulary: Tokenizer, threads: int, reports: Any, stop: Any) -> None:
    """Keep what all jobs of this process need, and see to it that it does not outlive the one that started it."""
    _worker.update(vocabulary=vocabulary, threads=threads, reports=reports, stop=stop)

    def die_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=die_with_parent, daemon=True).start()


def _write_in_worker(job: _Job) -> ShardRecord:
    def report(num_bytes: int) -> None:
        if _worker['stop'].is_set():
            raise InterruptedError('another shard failed')
        _worker['reports'].put(num_bytes)

    return _write_shard(job, _worker['vocabulary'], _worker['threads'], report)


def _write_shard(job: _Job, vocabulary: Tokenizer, threads: int | None, report: Callable[[int], None]) -> ShardRecord:
    """Write the files of one shard and commit them; `report` is told the bytes of each batch of documents."""
    counts = ReadCounts()
    boundary, dtype = np.asarray([Boundaries.of(vocabulary).end], np.int32), token_dtype(vocabulary.size)
    num_tokens = num_bytes = num_documents = 0
    with contextlib.ExitStack() as stack:
        files = {
            part: stack.enter_context(_CommittedFile(job.directory / shard_file(job.index, part))) for part in PARTS
        }
        for texts in _batches(job.shard.documents(counts)):
            ids = vocabulary.encode_batch(texts, threads)
            pieces = itertools.chain.from_iterable((np.asarray(document, np.int32), boundary) for document in ids)
            tokens = np.concatenate(list(pieces))
            if tokens.min() < 0 or tokens.max() >= vocabulary.size:
                raise ValueError(f'{type(vocabulary).__name__} gave an id outside [0, {vocabulary.size})')
            lengths = np.asarray([len(document) + 1 for document in ids], np.int64)
            sizes = np.asarray([len(text.encode()) for text in texts], np.int64)
            files['tokens'].write(tokens.astype(dtype))
            files['ends'].write((np.cumsum(lengths) + num_tokens).astype('<i8'))
            files['bytes'].write(sizes.astype('<i8'))
            num_tokens += len(tokens)
            num_bytes += int(sizes.sum())
            num_documents += len(texts)
            report(int(sizes.sum()))
        digests = {part: file.commit() for part, file in files.items()}
    # The limit is a setting of reading, not of what was read: it may be raised without reading again.
    counts.max_bad_records = None
    record = ShardRecord(
        job.shard.name, job.fingerprint, num_documents, num_tokens, num_bytes, digests, counts.as_dict()
    )
    write_json(job.directory / shard_file(job.index, 'json'), dataclasses.asdict(record))
    return record


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _CommittedFile:
    """A file that has its name only when it is complete and on disk; if the context ends before that, it is gone."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
        self._digest = hashlib.sha256()
        self._file = self._temporary.open('wb')

    def write(self, values: np.ndarray) -> None:
        data = values.tobytes()
        self._digest.update(data)
        self._file.write(data)

    def commit(self) -> str:
        """Rename to the final name; returns the SHA-256 of the content."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._temporary.replace(self._path)
        return self._digest.hexdigest()

    def __enter__(self) -> '_CommittedFile':
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):  # a full disk fails again here; the first failure is the one to tell
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file so that it is either absent or complete, after everything written before it in its folder."""
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
        with temporary.open('w') as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, waiting for a process that has it. The system frees it when a process dies."""
    with path.open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info('another process is making this token cache; waiting for it')
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks. Two builders then do the work twice, with the same result.
            logger.warning('%s cannot be locked (%s)', path, error.strerror)
        yield


@contextlib.contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """Turn what the disk refuses into a UserError; an error of reading a source names its own file and passes."""
    try:
        yield
    except OSError as error:
        fixes = {
            **dict.fromkeys(
                (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
                'Free some space or set DataConfig.cache_directory to another disk; finished shards are kept.',
            ),
            **dict.fromkeys(
                (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST),
                'Set DataConfig.cache_directory to a folder that you may write.',
            ),
        }
        if error.errno not in fixes:
            raise
        raise UserError(
            f'the token cache cannot be written ({error.strerror})', where=str(directory), fix=fixes[error.errno]
        ) from error
