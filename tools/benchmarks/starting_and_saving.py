"""Time from the command to the first training step, cold and cached; and how long a save holds training up.

    python tools/benchmarks/starting_and_saving.py [--gin_file=gin_configs/runs/quickstart.gin] [--rounds=3]

Cold: no token cache, no compiled programs. Cached: another run directory with what the cold start left in the caches;
the vocabulary is learned again, as it belongs to the run. Beside them, what no start can be faster than: importing JAX
in a fresh process. Saving: how long `Checkpointer.save` keeps the loop from its next step, against writing the same
arrays with `numpy.save` before going on. Medians of the rounds, which interleave.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from llm.configuration import load_job
from llm.jobs.pretrain import Pretrain
from llm.training.checkpoints import Checkpointer
from llm.training.trainer import Trainer


def seconds_to_first_step(gin_file: str, run: Path, caches: Path) -> float:
    """From starting the process until metrics.jsonl has its first line."""
    command = [sys.executable, '-m', 'llm.main', f'--gin_file={gin_file}', f'--gin_bindings=RUN_DIRECTORY="{run}"']
    environment = os.environ | {
        'LLM_CACHE': str(caches / 'tokens'),
        'JAX_COMPILATION_CACHE_DIR': str(caches / 'compiled'),
        'JAX_PLATFORMS': 'cpu',
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = run / 'metrics.jsonl'
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
            sys.exit(f'the run ended with exit code {process.returncode} before its first step')
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    return seconds


def seconds_to_import_jax() -> float:
    """A fresh process that imports JAX and does nothing."""
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', 'import jax'], check=True)
    return time.perf_counter() - start


def save_seconds(gin_file: str, folder: Path, rounds: int) -> tuple[list[float], list[float], int]:
    """(each save's stall, each plain write, bytes) for the train state of the run."""
    job, _ = load_job([gin_file])
    assert isinstance(job, Pretrain)
    trainer = Trainer(job.model, job.optimizer, job.step, job.loop.total_steps)
    state = trainer.state_dict(trainer.fresh_state())
    arrays = jax.block_until_ready(jax.tree.leaves(state))
    ours, plain = [], []
    with Checkpointer(folder / 'checkpoints', job.checkpoint) as checkpointer:
        for step in range(rounds):
            start = time.perf_counter()
            checkpointer.save(step + 1, state, {})
            ours.append(time.perf_counter() - start)
            checkpointer.wait()
            start = time.perf_counter()
            with open(folder / 'arrays.npy', 'wb') as file:
                for array in arrays:
                    np.save(file, np.asarray(array))
                file.flush()
                os.fsync(file.fileno())
            plain.append(time.perf_counter() - start)
    return ours, plain, sum(array.nbytes for array in arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gin_file', default='gin_configs/runs/quickstart.gin', help='a run of the pretrain job')
    parser.add_argument('--rounds', type=int, default=3)
    arguments = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    taken: dict[str, list[float]] = {'cold': [], 'cached': [], 'import jax': []}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.rounds):
            folder = Path(temporary) / str(number)
            caches = folder / 'caches'
            for name in ('cold', 'cached'):
                taken[name].append(seconds_to_first_step(arguments.gin_file, folder / name, caches))
            taken['import jax'].append(seconds_to_import_jax())
        ours, plain, num_bytes = save_seconds(arguments.gin_file, Path(temporary), 5 * arguments.rounds)
    print(json.dumps({name: [round(s, 2) for s in seconds] for name, seconds in taken.items()}))
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    for name in ('cold', 'cached'):
        ratio = medians[name] / medians['import jax']
        print(f'command to first step, {name}: {medians[name]:.1f} s, {ratio:.1f}x importing JAX')
    stall, write = statistics.median(ours), statistics.median(plain)
    print(f'a save of {num_bytes / 1e6:.0f} MB stalls {1e3 * stall:.0f} ms, numpy.save {1e3 * write:.0f} ms')
    print(f'stall / numpy.save: {stall / write:.2f}x')


if __name__ == '__main__':
    main()
