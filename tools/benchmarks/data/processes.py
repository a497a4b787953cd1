"""Step `processes`: the whole job with two processes against one, and against two jobs at once on half the files each.

Two jobs that have nothing to do with each other are what the machine can do: where they are not twice as fast as one,
its processors are not either, as they share caches and memory.

    python -m tools.benchmarks.data.processes FILES DIRECTORY PROCESSES

is what the step starts each time, so that each job begins with nothing loaded, and with the caches of a new process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

from tools.benchmarks.data.measuring import load, read_texts

_SHARDS, _HALVES = 8, ('0-3', '4-7')


def processes(arguments: argparse.Namespace) -> None:
    """Print the table of `processes`."""
    texts = read_texts(arguments.files, arguments.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(f'{len(texts):,} documents, {megabytes:.1f} MB in {_SHARDS} shards, {arguments.rounds} rounds, {load()}')
    seconds: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    halves: list[float] = []
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(_SHARDS):
            lines = [json.dumps({'text': text}) for text in texts[i::_SHARDS]]
            Path(temporary, f'{i}.jsonl').write_text('\n'.join(lines))
        for turn in range(arguments.rounds):
            for count, times in seconds.items():
                started = time.perf_counter()
                job = _start(f'{temporary}/*.jsonl', f'{temporary}/out-{turn}-{count}', count)
                times.append(_finished(job) | {'wall': time.perf_counter() - started})
            started = time.perf_counter()
            for job in [_start(f'{temporary}/[{half}].jsonl', f'{temporary}/{turn}-{half}', 1) for half in _HALVES]:
                _finished(job)
            halves.append(time.perf_counter() - started)
    medians = {
        count: {name: statistics.median(some[name] for some in times) for name in times[0]}
        for count, times in seconds.items()
    }
    print(f'{"processes":>9} {"wall s":>8} {"CPU s of the job":>17} {"of its workers":>15}    {load()}')
    for count, median in medians.items():
        print(f'{count:>9} {median["wall"]:8.2f} {median["own"]:17.2f} {median["workers"]:15.2f}')
    print(f'{"2 jobs":>9} {statistics.median(halves):8.2f}')
    # What two processors could reach if nothing else ran: the job's own part is done by one.
    bound = medians[1]['own'] / (medians[2]['own'] + medians[2]['workers'] / 2)
    print(
        f'{medians[1]["wall"] / medians[2]["wall"]:.2f} times as fast; by the CPU times at most {bound:.2f} times; '
        f'two jobs at once {medians[1]["wall"] / statistics.median(halves):.2f} times'
    )


def _start(files: str, directory: str, count: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, '-m', __spec__.name, files, directory, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def _finished(job: subprocess.Popen[bytes]) -> dict[str, float]:
    """The seconds that a job printed."""
    printed, _ = job.communicate()
    if job.returncode:
        raise SystemExit(f'the job failed with exit code {job.returncode}')
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    """Do the job once, without its report, whose seconds do not grow with the input; print the seconds it took."""
    # Here, because each worker imports this module, as it does llm.main, which imports nothing of a job.
    from llm.configuration import Invocation
    from llm.data.documents.deduplication.config import Deduplication
    from llm.data.documents.language import Language
    from llm.data.documents.normalization import Normalization
    from llm.data.documents.privacy import PersonalData
    from llm.data.documents.quality.c4 import C4
    from llm.data.documents.quality.fineweb import FineWebQuality
    from llm.data.documents.quality.gopher_quality import GopherQuality
    from llm.data.documents.quality.gopher_repetition import GopherRepetition
    from llm.data.documents.quality.rules import Rules
    from llm.data.documents.sources import JsonLines
    from llm.jobs.prepare_data import PrepareData

    files, directory, count = sys.argv[1:]
    rules = Rules((GopherRepetition(), GopherQuality(), C4(punctuated_lines=False), FineWebQuality()))
    job = PrepareData(
        directory,
        (JsonLines(files=files, name='texts'),),
        (Normalization(), Language(), PersonalData(), rules),
        Deduplication(),
        processes=int(count),
        report=None,
    )
    job(Invocation(dry_run=False, operative_config='', command=(), config_files=()))
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # its workers are counted when it is waited for
    used = {'own': resource.getrusage(resource.RUSAGE_SELF), 'workers': resource.getrusage(resource.RUSAGE_CHILDREN)}
    print(json.dumps({name: usage.ru_utime + usage.ru_stime for name, usage in used.items()}))


if __name__ == '__main__':
    main()
