"""Which shards are prepared: `shards/N.json` commits the files of one, as those of the runner for one machine do.

A shard's files are those of its pieces, so a record has the bytes of all files of a kind together.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from llm.data.documents.beam.files import join, listed, read_record, sizes, write_record
from llm.data.documents.shard_processing import PARTS, ShardCounts, Task, part, shard_digest

# Small reads that are waited for at once, most of them of a store on the net.
_READERS = 32
_FIELDS = {'shard', 'digest', 'counts', 'sizes'}


@dataclasses.dataclass
class Written:
    """What is known of a shard, or of a part of it; those of its parts add up.

    Attributes:
        shard, digest: name, and `shard_digest`; empty where it is written, which who reads it knows.
        read: records that are or should be documents. counts: of what was written. sizes: bytes of files, by kind.
    """

    shard: str = ''
    digest: str = ''
    read: int = 0
    counts: ShardCounts = dataclasses.field(default_factory=ShardCounts)
    sizes: Counter[str] = dataclasses.field(default_factory=Counter)

    def add(self, other: 'Written') -> None:
        """Another part of the same shard."""
        self.shard, self.digest = self.shard or other.shard, self.digest or other.digest
        self.read += other.read
        self.counts.add(other.counts)
        self.sizes.update(other.sizes)


def commit(element: tuple[int, Written], output: str) -> None:
    """Says that a shard, by its number, is done, if nothing was lost between who read it and who wrote it."""
    index, shard = element
    if not shard.counts.balanced or shard.read != shard.counts.documents:
        raise RuntimeError(
            f'documents were lost in {shard.shard}: {shard.read} were read, written are {shard.counts.as_json()}'
        )
    record = {
        'shard': shard.shard,
        'digest': shard.digest,
        'counts': shard.counts.as_json(),
        'sizes': dict(shard.sizes),
    }
    write_record(join(output, part(index, 'shards')), record)


class Shards:
    """What an output directory has of shards when it is looked at.

    Attributes:
        records: number -> what `commit` wrote; what is damaged is not there.
    """

    def __init__(self, output: str):
        self._marks = listed(join(output, 'shards/*.json'))
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            found = list(zip(self._marks, pool.map(read_record, self._marks), strict=True))
        self.records: dict[int, Any] = {
            _number(path): record for path, record in found if isinstance(record, dict) and record.keys() >= _FIELDS
        }
        self._files = {join(output, kind): sizes(join(output, kind)) for kind in PARTS}

    @property
    def known(self) -> dict[str, int]:
        """Name of a shard -> number of its files."""
        return {record['shard']: number for number, record in self.records.items()}

    def digest(self, numbers: Iterable[int]) -> str:
        """Changes when any record of these shards does."""
        some = [(number, self.records[number]) for number in sorted(numbers)]
        return hashlib.sha256(json.dumps(some, sort_keys=True).encode()).hexdigest()

    def done(self, tasks: Sequence[Task]) -> set[int]:
        """Numbers of the tasks that are done, by their inputs and the sizes of their files."""
        found: dict[int, Counter[str]] = {}
        for folder, files in self._files.items():
            for name, size in files.items():
                if not name.endswith('.tmp'):
                    found.setdefault(_number(name), Counter())[folder.rpartition('/')[2]] += size

        def same(task: Task) -> bool:
            record = self.records.get(task.index)
            if record is None or Counter(record['sizes']) != found.get(task.index):
                return False
            return bool(record['digest'] == shard_digest(task.shard, task.settings))

        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            return {task.index for task, is_done in zip(tasks, pool.map(same, tasks), strict=True) if is_done}

    def stale(self, done: set[int], numbers: set[int]) -> list[str]:
        """Paths of records of shards that have no number in this run, and of files of shards that are not done."""
        return [path for path in self._marks if _number(path) not in numbers] + [
            join(folder, name)
            for folder, files in self._files.items()
            for name in files
            if _number(name) not in done or name.endswith('.tmp')
        ]


def _number(path: str) -> int:
    """Of a shard by the name of a file of it; -1 where it is of none."""
    number = path.rpartition('/')[2].partition('.')[0].partition('-')[0]
    return int(number) if number.isdigit() else -1
