"""Runs of several real processes: the same bits as one on the same mesh, through kills, signals and restarts."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
import pytest

from llm.errors import TRY_AGAIN
from llm.training.checkpoints import committed_steps
from llm.training.checkpoints.directory import step_path
from llm.training.metrics import read_json_lines
from tests.jobs.tiny_run import TinyRun
from tests.parallel.real_processes import ROOT, free_port, variables

pytestmark = pytest.mark.slow

# No run reaches its end: each is stopped after the checkpoint that a test wants.
SETTINGS = (
    *(
        'TOTAL_STEPS = 100_000',
        'SAVE_EVERY = 10',
        'EVALUATE_EVERY = 10',
        'checkpoints.CheckpointConfig.keep_every = 10',
    ),
    *('mesh.MeshConfig.data = 4', 'layer.LayerConfig.dropout = 0.1', 'NUM_LAYERS = 1'),
)
SAMPLES = (
    *('loop.LoopConfig.sample_every = 10', 'pretrain.Pretrain.samples = @sampling.SamplesConfig()'),
    *("sampling.SamplesConfig.prompts = ('ab', '')", 'sampling.SamplesConfig.max_new_tokens = 8'),
)
PATIENCE = 300


class Run:
    """A run directory, and the processes that are at work on it."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.directory = folder, folder / name
        self.checkpoints = self.directory / 'checkpoints'
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []

    def start(self, processes: int, devices: int, *settings: str, joined: bool = True) -> None:
        """Start `processes` of so many devices each; not `joined`, as on a laptop."""
        with free_port() as port:
            self.logs = [self.folder / f'{self.directory.name}_{process}.log' for process in range(processes)]
            self.processes = [
                self._start(process, devices, settings, (f'localhost:{port}', processes) if joined else None)
                for process in range(processes)
            ]

    def _start(
        self, process: int, devices: int, settings: tuple[str, ...], job: tuple[str, int] | None
    ) -> subprocess.Popen[bytes]:
        arguments = [f'--gin_file={self.folder / "run.gin"}']
        all_settings = (*SETTINGS, f'RUN_DIRECTORY = {str(self.directory)!r}', *settings)
        arguments += [f'--gin_bindings={setting}' for setting in all_settings]
        if job is not None:
            arguments += [f'--coordinator_address={job[0]}', f'--num_processes={job[1]}', f'--process_id={process}']
            arguments.append('--heartbeat_timeout_seconds=10')
        caches = {
            'LLM_CACHE': str(self.folder / 'tokens'),
            'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'compiled'),
        }
        with self.logs[process].open('wb') as log:
            return subprocess.Popen(
                [sys.executable, '-m', 'llm.main', *arguments],
                env=variables(devices) | caches,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, step: int) -> None:
        """Return when the checkpoint of `step` is committed."""
        deadline = time.monotonic() + PATIENCE
        while max(committed_steps(self.checkpoints), default=0) < step:
            assert time.monotonic() < deadline, self.texts()
            assert [process.poll() for process in self.processes] == [None] * len(self.processes), self.texts()
            time.sleep(0.05)

    def worker(self, process: int) -> psutil.Process:
        """The process that computes, below the one that watches over it."""
        (child,) = psutil.Process(self.processes[process].pid).children()
        return child

    def codes(self) -> list[int]:
        """The exit codes, when all have ended."""
        return [process.wait(PATIENCE) for process in self.processes]

    def texts(self) -> list[str]:
        """What each has written, without what Gloo says of its connections."""
        texts = [log.read_text(errors='replace').splitlines(keepends=True) for log in self.logs]
        return [''.join(line for line in lines if not line.startswith('[Gloo]')) for lines in texts]

    def run_until(self, step: int, processes: int, devices: int, *settings: str, joined: bool = True) -> int:
        """Run, and ask the last process to stop when `step` is saved; the step after which all have stopped."""
        self.start(processes, devices, *settings, joined=joined)
        self.wait_for(step)
        self.processes[-1].send_signal(signal.SIGTERM)
        assert self.codes() == [TRY_AGAIN] * processes, self.texts()
        last = max(committed_steps(self.checkpoints))
        assert f'after step {last}, which is saved' in self.texts()[0]
        return last

    def lines(self, name: str, last: int) -> list[dict]:
        """The lines of a file up to a step, without what depends on the clock."""
        lines = read_json_lines(self.directory / name)
        return [{k: v for k, v in line.items() if k != 'timing'} for line in lines if line['step'] <= last]

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """All of a checkpoint."""
        path = step_path(self.checkpoints, step) / 'state'
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            names = orbax.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            tree = orbax.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        return {jax.tree_util.keystr(name): array for name, array in jax.tree_util.tree_flatten_with_path(tree)[0]}

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()  # its worker goes with it
                process.wait()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('many')
    TinyRun(folder)
    return folder


@pytest.fixture
def run(folder):
    """Makes runs, and ends their processes after the test."""
    runs = []

    def run(name):
        runs.append(Run(folder, name))
        return runs[-1]

    yield run
    for each in runs:
        each.close()


def assert_same(run, expected, steps):
    """Bit for bit: metrics and samples up to the last of the steps, and the checkpoints of all of them."""
    for name in ('metrics.jsonl', 'samples.jsonl'):
        assert run.lines(name, steps[-1]) == expected.lines(name, steps[-1])
    assert len(run.lines('metrics.jsonl', steps[-1])) == steps[-1] * 11 // 10  # and an evaluation every ten steps
    for step in steps:
        arrays, wanted = run.arrays(step), expected.arrays(step)
        assert arrays.keys() == wanted.keys()
        assert [name for name, array in arrays.items() if not np.array_equal(array, wanted[name])] == []


def test_a_kill_and_restarts_on_other_processes_and_meshes(run):
    # Two processes of two devices, one of which is killed.
    first = run('first')
    first.start(2, 2, *SAMPLES)
    first.wait_for(10)
    first.worker(1).kill()
    assert first.codes() == [75, 137], first.texts()
    ours, its = first.texts()
    assert 'error: process 1 of 2 was lost: no sign of life for 10 s. This process stops too.' in ours
    assert 'error: process 1 of 2 was ended by SIGKILL.' in its
    for text in (ours, its):
        assert 'Traceback' not in text
        assert 'Check failure stack trace' not in text
    kept = max(committed_steps(first.checkpoints))
    copy = run('copy')
    shutil.copytree(first.directory, copy.directory)

    # It goes on with four, of one device each, of which one is asked to stop.
    stopped = first.run_until(kept + 10, 4, 1, *SAMPLES)
    assert 'restored the checkpoint of step' in first.texts()[0]
    # Each process has written its part, and said nothing that process 0 says.
    files = sorted(path.name for path in step_path(first.checkpoints, kept + 10).glob('manifest_*.json'))
    assert files == [f'manifest_{process:05d}.json' for process in range(4)]
    assert [text for text in first.texts()[1:] if 'restored' in text or 'step ' in text] == []
    assert len(list((first.directory / 'tensorboard').iterdir())) == 2  # the two starts of process 0

    # The same as one process of four devices, started like many: a reduction over four goes through Gloo in both.
    alone = run('alone')
    alone.run_until(stopped, 1, 4, *SAMPLES)
    assert_same(first, alone, [*range(10, kept + 11, 10)])
    recorded = json.loads((alone.directory / 'environment.json').read_text())
    assert (recorded['process_count'], recorded['collectives']) == (1, 'gloo')

    # On another mesh, of one process started plainly, the data is the same, and the loss to rounding.
    settings = ('mesh.MeshConfig.data = 1', 'mesh.MeshConfig.fsdp = 2')
    copy.run_until(kept + 10, 1, 2, *settings, *SAMPLES, joined=False)
    assert "mesh was {'pipeline': 1, 'data': 4," in copy.texts()[0]
    train, wanted = (
        [line for line in each.lines('metrics.jsonl', kept + 10) if line['kind'] == 'train'] for each in (copy, alone)
    )
    assert len(train) == len(wanted) == kept + 10
    assert [line['tokens'] for line in train] == [line['tokens'] for line in wanted]
    np.testing.assert_allclose([line['loss'] for line in train], [line['loss'] for line in wanted], rtol=1e-5)


def test_process_0_is_killed(run):
    first = run('without the first')
    first.start(2, 1, 'mesh.MeshConfig.data = 2')
    first.wait_for(10)
    first.worker(0).kill()
    assert first.codes() == [137, 75], first.texts()
    text = first.texts()[1]
    assert text.splitlines()[-1].startswith('error: process 0 of 2, which holds the run together, has ended')
    assert 'Check failure stack trace' not in text


def test_the_others_hear_why_process_0_cannot_begin(run):
    first = run('refused')
    first.directory.mkdir()
    (first.directory / 'somebody.txt').touch()
    first.start(2, 1, 'mesh.MeshConfig.data = 2')
    assert first.codes() == [2, 2], first.texts()
    ours, its = first.texts()
    assert ours.endswith('Use a new or an empty directory.\n')
    assert its.startswith('error: process 0 failed at claiming the run directory (UserError: ')


def test_processes_that_do_not_come(run):
    first = run('lonely')
    with free_port() as port:
        done = subprocess.run(
            [
                *(sys.executable, '-m', 'llm.main', f'--gin_file={first.folder / "run.gin"}'),
                *(f'--coordinator_address=localhost:{port}', '--num_processes=2', '--process_id=1'),
                '--initialization_timeout_seconds=3',
            ],
            env=variables(),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 75
    assert done.stderr.startswith(f'error: process 1 of 2 waited 3 s at localhost:{port} for the coordinator and the ')
    assert done.stderr.count('\n') == 1
