"""Step `kills`: workers and whole jobs are killed at random times; what is left is compared with an undisturbed run."""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.benchmarks.data.measuring import load, read_texts

_SHARDS = 8


def kills(arguments: argparse.Namespace) -> None:
    """Print what was killed and what came of it; raise an AssertionError where bytes differ."""
    texts = read_texts(arguments.files, arguments.megabytes)
    draw = random.Random(time.time_ns())
    with tempfile.TemporaryDirectory() as temporary:
        for i in range(_SHARDS):
            lines = [json.dumps({'text': text}) for text in texts[i::_SHARDS]]
            lines.insert(1, '{damaged')
            Path(temporary, f'{i}.jsonl').write_text('\n'.join(lines))
        started = time.perf_counter()
        assert _start(temporary, 'whole').wait() == 0
        seconds = time.perf_counter() - started
        expected = _written(Path(temporary, 'whole'))
        print(f'{len(texts):,} documents in {_SHARDS} shards; undisturbed {seconds:.1f} s, {load()}', flush=True)
        for victim in ('job', 'workers'):
            killed = runs = stopped = 0
            while killed < arguments.rounds:
                output = f'{victim}-{runs}'
                runs += 1
                while True:
                    process = _start(temporary, output)
                    if victim == 'job':
                        with contextlib.suppress(subprocess.TimeoutExpired):
                            process.wait(draw.uniform(0, seconds) if killed < arguments.rounds else None)
                        if process.poll() is None:
                            # With its workers, or alone: they find out themselves.
                            (os.killpg if draw.random() < 0.5 else os.kill)(process.pid, signal.SIGKILL)
                            process.wait()
                            killed += 1
                    else:
                        while killed < arguments.rounds and process.poll() is None:
                            time.sleep(draw.uniform(0.2, seconds / 4))
                            if workers := _workers(process.pid):
                                with contextlib.suppress(ProcessLookupError):
                                    os.kill(draw.choice(workers), signal.SIGKILL)
                                    killed += 1
                        process.wait()
                    if process.returncode == 0:
                        break
                    stopped += 1
                found = _written(Path(temporary, output))
                differing = [name for name in expected | found if expected.get(name) != found.get(name)]
                assert not differing, differing
                print(f'{victim}: {killed} killed, {runs} runs to the end, begun again {stopped} times', flush=True)
    print(f'the same {len(expected)} files, {sum(map(len, expected.values())):,} bytes, after each run; {load()}')


def _start(folder: str, output: str) -> 'subprocess.Popen[bytes]':
    command = [sys.executable, '-m', 'tools.benchmarks.data.processes', f'{folder}/*.jsonl', f'{folder}/{output}', '2']
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def _workers(pid: int) -> list[int]:
    """Workers of a job: children of the server that forks them, its child."""
    return [worker for child in _children(pid) for worker in _children(child)]


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except OSError:  # gone by now
        return []


def _written(directory: Path) -> dict[str, bytes]:
    """Contents of all that a run leaves for readers: not the description of the run, nor the index of deduplication."""
    folders = ('documents', 'ledger', 'quarantine', 'shards', 'final', 'verdicts')
    paths = [path for folder in folders for path in (directory / folder).iterdir()]
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in [*paths, directory / 'summary.json', directory / 'final.json']
    }
