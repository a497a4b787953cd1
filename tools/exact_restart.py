"""Kill a pretraining run at many instants, or damage its checkpoints: it must end as one left alone does, bit for bit.

    python tools/exact_restart.py                    # kills the quickstart, shortened, 30 times
    python tools/exact_restart.py --damage           # flips a bit in every file of its newest checkpoint, and cuts each
    python tools/exact_restart.py --full             # the run file as it is
    python tools/exact_restart.py --gin_file=A.gin --gin_bindings='...'

A round is a run with a directory and caches (tokens, compiled programs) of its own. Its process is killed by SIGKILL a
random time into a chosen phase, which is read from its files; the next one goes on, until the round is complete and is
compared with the run left alone: parameters, optimizer, data position, every metric but timings, samples, vocabulary,
tokens. A kill counts as one during a save if the unfinished checkpoint of the dead process lies there. Exit code 0 if
nothing differs, else 1.
"""

import argparse
import collections
import functools
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from llm.training.checkpoints import committed_steps
from llm.training.checkpoints.directory import PARTIAL, step_path
from llm.training.checkpoints.restoring import METADATA, restore_newest
from llm.training.metrics import read_json_lines

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ('--gin_file=gin_configs/runs/quickstart.gin',)
# Six saves, three evaluations and samples, in a minute: what a long run does, often enough to be hit.
SHORT = (
    *('TOTAL_STEPS = 24', 'WARMUP_STEPS = 4', 'SAVE_EVERY = 4', 'EVALUATE_EVERY = 8'),
    *('loop.LoopConfig.sample_every = 8', 'sampling.SamplesConfig.max_new_tokens = 32', 'BATCH_SIZE = 8'),
    *('datasets.DataConfig.evaluation_documents = 2', 'pretrain.Pretrain.xz_baselines = False'),
)
# A round goes through these in order. It would not come far without those that let it pass a commit.
EARLY = ('claiming', 'vocabulary', 'tokenising', 'compiling')
LATE = ('saving', 'evaluating', 'saving', 'restoring', 'saving', 'sampling', 'saving', 'training')
_LAST = 'finishing'
_POLL_SECONDS = 0.002
_PATIENCE_SECONDS = 3600


class Process(Protocol):
    """What is needed of subprocess.Popen."""

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


StartProcess = Callable[[Sequence[str], Mapping[str, str], Path], Process]


def start_process(arguments: Sequence[str], variables: Mapping[str, str], log: Path) -> Process:
    """`python -m llm.main` with these arguments and additional environment variables; what it prints goes to `log`."""
    with log.open('ab') as file:
        return subprocess.Popen(
            [sys.executable, '-m', 'llm.main', *arguments],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


class Run:
    """A run directory with its caches, and the process that works on it, watched from outside.

    Args:
        root: holds the run directory, the caches and the log.
        arguments: of llm.main, without the run directory.
        caches: another root, to use its caches.

    Attributes:
        directory: the run directory. tokens, compiled: its caches. log: what all its processes printed.
        arguments: of llm.main. process: the one that was started last.
    """

    def __init__(
        self, root: Path, arguments: Sequence[str], start: StartProcess = start_process, caches: Path | None = None
    ):
        self.root, self.directory, self.log = root, root / 'run', root / 'log.txt'
        self.tokens, self.compiled = ((caches or root) / name for name in ('tokens', 'compiled'))
        self.arguments = (*arguments, f'--gin_bindings=RUN_DIRECTORY = {str(self.directory)!r}')
        self._start_process = start
        self._started = 0.0
        self._leftovers: set[str] = set()
        self._settings: dict[str, Any] = {}
        root.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Start a process on the directory."""
        variables = {'LLM_CACHE': str(self.tokens), 'JAX_COMPILATION_CACHE_DIR': str(self.compiled)}
        self._leftovers = self._partial()
        self._started = time.time()
        self._log_before = self.log.stat().st_size if self.log.exists() else 0
        self.process = self._start_process(self.arguments, variables, self.log)

    def finish(self, expected: int = 0) -> str:
        """Wait for the process to end well; what it printed.

        Raises:
            RuntimeError: its exit code is not the one that is expected.
        """
        code = self.process.wait(_PATIENCE_SECONDS)
        printed = self.log.read_bytes()[self._log_before :].decode(errors='replace')
        if code != expected:
            raise RuntimeError(f'{self.directory}: exit code {code}\n{printed[-3000:]}')
        return printed

    def kill(self) -> str | None:
        """Kill the process; what it was doing, or None if it came to its end by itself."""
        self.process.kill()
        return self.phase() if self.process.wait() == -signal.SIGKILL else None

    def saved(self) -> list[int]:
        """The steps of the committed checkpoints."""
        return committed_steps(self.directory / 'checkpoints')

    def phase(self) -> str:
        """What the process is doing, or was doing when it died, as far as files tell."""
        partial = self._partial()
        self._leftovers &= partial  # it removes what others left before it saves anything itself
        if partial - self._leftovers:
            return 'saving'
        config = self.directory / 'config.json'
        if not self._settings and not config.exists():
            return 'claiming'
        self._settings = settings = self._settings or json.loads(config.read_text())
        if not (self.directory / 'vocabulary').exists():
            return 'vocabulary'
        lines = read_json_lines(self.directory / 'metrics.jsonl')
        lines = [line for line in lines if line['timing']['started'] >= self._started]
        saved = self.saved()
        if not lines:
            if saved:
                return 'restoring'
            return 'compiling' if (self.directory / 'environment.json').exists() else 'tokenising'
        last, step = lines[-1], lines[-1]['step']
        final = step == settings['loop.total_steps']
        if final and saved[-1:] == [step]:
            return _LAST

        def due(interval: str) -> bool:
            return final or bool(settings[interval] and step % settings[interval] == 0)

        if last['kind'] == 'train' and due('loop.evaluate_every'):
            return 'evaluating'
        sampled = {line['step'] for line in read_json_lines(self.directory / 'samples.jsonl')}
        return 'sampling' if due('loop.sample_every') and step not in sampled else 'training'

    def _partial(self) -> set[str]:
        return {path.name for path in (self.directory / 'checkpoints').glob(f'*{PARTIAL}')}


def visits(run: Run) -> Iterator[str]:
    """Each phase that the running process enters, when it does, until it ends."""
    before = ''
    while run.process.poll() is None:
        phase = run.phase()
        if phase != before:
            before = phase
            yield phase
        time.sleep(_POLL_SECONDS)


def run_alone(run: Run) -> dict[str, float]:
    """Let a fresh run come to its end; mean seconds that it spent in each phase at a time, or would when restored."""
    run.start()
    spent: dict[str, list[float]] = collections.defaultdict(list)
    before, since = '', time.perf_counter()
    for phase in itertools.chain(visits(run), ['']):
        now = time.perf_counter()
        spent[before].append(now - since)
        before, since = phase, now
    run.finish()
    durations = {phase: statistics.fmean(seconds) for phase, seconds in spent.items() if phase}
    return {**durations, 'restoring': durations['claiming'] + durations['compiling']}


def kill_in(run: Run, target: str, number: int, delay: float) -> str | None:
    """Kill the process `delay` seconds into its visit `number` (from 1) of a phase.

    Returns:
        The phase in which it died, or None if it ended before.
    """
    reached = itertools.islice((phase for phase in visits(run) if phase == target), number - 1, number)
    if next(reached, None) is not None:
        time.sleep(delay)
    return run.kill()


def kill_round(
    run: Run, targets: Iterable[str], durations: Mapping[str, float], generator: random.Random
) -> Iterator[str]:
    """Start processes on `run` and kill each in the next of `targets`, until one ends; the phases they died in.

    The last one, which ends by itself, has ended well when the iterator is exhausted.
    """
    usual = statistics.fmean(durations.values())
    for target in targets:
        run.start()
        delay = generator.uniform(0, 0.8 * durations.get(target, usual))
        phase = kill_in(run, target, generator.choice((1, 2)) if target == 'saving' else 1, delay)
        if phase is None:
            run.finish()
            return
        yield phase
    run.start()
    run.finish()


def results(run: Run) -> dict[str, Any]:
    """Everything about a finished run that must be the same however it came about, by name."""
    found: dict[str, Any] = {}
    checkpoints = run.directory / 'checkpoints'
    for step in run.saved():
        path = step_path(checkpoints, step)
        metadata = json.loads((path / METADATA).read_bytes())
        abstract: dict[str, Any] = {}
        for name, (dtype, shape) in metadata['arrays'].items():
            *parents, last = name.split('/')
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), parents, abstract)
            node[last] = jax.ShapeDtypeStruct(shape, dtype)
        state = restore_newest(checkpoints, [step], abstract).state
        for keys, array in jax.tree.leaves_with_path(state):
            found[f'{path.name} {jax.tree_util.keystr(keys, simple=True, separator="/")}'] = np.asarray(array)
        for name in ('step', 'arrays', 'metrics', 'metadata'):
            found[f'{path.name} {name}'] = metadata[name]
    for name in ('metrics.jsonl', 'samples.jsonl'):
        for number, line in enumerate((run.directory / name).read_text().splitlines(), start=1):
            found[f'{name} line {number}'] = {key: value for key, value in json.loads(line).items() if key != 'timing'}
    files = [run.directory / 'config.json', run.directory / 'complete', *(run.directory / 'vocabulary').iterdir()]
    for path in [*files, *(path for path in run.tokens.rglob('*') if path.suffix != '.lock' and path.is_file())]:
        found[f'file {path.name}' if path in files else f'file {path.relative_to(run.tokens)}'] = path.read_bytes()
    return found


def differences(expected: Mapping[str, Any], run: Run) -> list[str]:
    """The names of what differs between the results of a run and those expected."""
    found = results(run)

    def same(name: str) -> bool:
        if name not in found or name not in expected:
            return False
        a, b = expected[name], found[name]
        if isinstance(a, np.ndarray):
            return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        return bool(a == b)

    return [f'{run.root.name}: {name}' for name in sorted(expected.keys() | found.keys()) if not same(name)]


def damages(checkpoint: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """For every file of a checkpoint: its name, and a function that damages it in a copy; first one bit, then half."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1 << len(content) % 8
        path.write_bytes(content)

    def cut(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    for path in sorted(path for path in checkpoint.rglob('*') if path.is_file() and path.stat().st_size):
        for damage in (flip, cut):
            yield str(path.relative_to(checkpoint)), damage


def damage_round(run: Run, name: str, damage: Callable[[Path], None]) -> list[str]:
    """Damage a file of the newest checkpoint of a killed run and let it finish; what was not said as it should be."""
    before, newest = run.saved()[-2:]
    checkpoint = step_path(run.directory / 'checkpoints', newest)
    damage(checkpoint / name)
    run.start()
    printed = run.finish()
    wanted = (f'{checkpoint.name}/{name} ', f'restored the checkpoint of step {before}\n')
    return [f'{run.root.name}: {name} damaged, but not said: {text!r}' for text in wanted if text not in printed]


def _kill_many(new_run: Callable[[str], Run], kills: int, in_save: int, seed: int) -> list[str]:
    alone = new_run('alone')
    durations = run_alone(alone)
    expected = results(alone)
    print(f'left alone: {", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in durations.items())}', flush=True)
    generator = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    bad: list[str] = []
    for number in itertools.count(1):
        left = max(kills - counts.total(), in_save - counts['saving'])
        if left <= 0:
            break
        if counts.total() > 10 * kills:
            raise RuntimeError(f'{counts.total()} kills, and only {counts["saving"]} of them during a save')
        run = new_run(f'round {number}')
        late = [LATE[(i + 4 * (number - 1)) % len(LATE)] for i in range(len(LATE))]
        plan = [*sorted(generator.sample(EARLY, 2), key=EARLY.index), *late, _LAST]
        if left < len(plan):  # what is missing may be kills during a save, which come late
            plan = late[:left]
        for phase in kill_round(run, plan, durations, generator):
            counts[phase] += 1
            print(f'{run.root.name}: killed while {phase}, with checkpoints of steps {run.saved()}', flush=True)
        found = differences(expected, run)
        print(f'{run.root.name}: {len(found) or "nothing"} differs', flush=True)
        bad += found
        if not found:
            shutil.rmtree(run.root)
    arrays = sum(isinstance(value, np.ndarray) for value in expected.values())
    lines = sum(' line ' in name for name in expected)
    print(f'{counts.total()} kills: {", ".join(f"{count} {phase}" for phase, count in counts.most_common())}')
    print(f'compared in each of {number - 1} rounds: {arrays} arrays, {lines} lines of metrics and samples, '
          f'{len(expected) - arrays - lines} files and records')  # fmt: skip
    return bad


def _damage_many(new_run: Callable[..., Run]) -> list[str]:
    alone = new_run('alone')
    run_alone(alone)
    expected = results(alone)
    base = new_run('killed', caches=alone.root)
    base.start()
    while len(base.saved()) < 2:
        if base.process.poll() is not None:
            base.finish()
            raise RuntimeError('the run ended before it had two checkpoints')
        time.sleep(_POLL_SECONDS)
    base.kill()
    steps = base.saved()
    bad: list[str] = []
    found = list(damages(step_path(base.directory / 'checkpoints', steps[-1])))
    for number, (name, damage) in enumerate(found, start=1):
        root = base.root.with_name(f'damaged {number}')
        shutil.copytree(base.root, root)
        run = new_run(root.name, caches=alone.root)
        problems = damage_round(run, name, damage) + differences(expected, run)
        print(f'{damage.__name__} {name}: {"; ".join(problems) or "named, the one before used, nothing differs"}')
        bad += problems
        if not problems:
            shutil.rmtree(root)
    print(f'{len(found) // 2} files of the checkpoint of step {steps[-1]}: a bit flipped in each, and each cut')
    return bad


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gin_file', action='append', help='another run file than the quickstart; may be repeated')
    parser.add_argument('--gin_bindings', action='append', default=[], help='a gin statement; may be repeated')
    parser.add_argument('--full', action='store_true', help='do not shorten the quickstart')
    parser.add_argument('--damage', action='store_true', help='damage checkpoints instead of killing')
    parser.add_argument('--kills', type=int, default=30, help='how many')
    parser.add_argument('--in_save', type=int, default=10, help='how many of them must be during a save')
    parser.add_argument('--seed', type=int, default=0, help='of the instants')
    parser.add_argument('--directory', type=Path, help='where to work; kept, while a temporary one is deleted')
    flags = parser.parse_args(arguments)
    jax.config.update('jax_platforms', 'cpu')  # here checkpoints are only read; the device is the run's

    files = [f'--gin_file={file}' for file in flags.gin_file or ()] or QUICKSTART
    shorten = () if flags.full or flags.gin_file else SHORT
    command = (*files, *(f'--gin_bindings={binding}' for binding in (*shorten, *flags.gin_bindings)))
    work = flags.directory or Path(tempfile.mkdtemp(prefix='exact_restart_'))

    def new_run(name: str, caches: Path | None = None) -> Run:
        return Run(work / name, command, caches=caches)

    bad = _damage_many(new_run) if flags.damage else _kill_many(new_run, flags.kills, flags.in_save, flags.seed)
    for line in bad:
        print(f'DIFFERS: {line}')
    if not bad and not flags.directory:
        shutil.rmtree(work)
    print(f'NOT EXACT: {len(bad)} differences; see {work}' if bad else 'EXACT: nothing differs')
    return 1 if bad else 0


if __name__ == '__main__':
    sys.exit(main())
