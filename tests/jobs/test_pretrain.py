"""The pretrain job: one command starts a run and goes on with it, through kills, signals and damage, to the same bits.

`tools/exact_restart.py` does this to the quickstart at many more instants. Here processes come from a fork server that
has imported everything, and the model is tiny.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import psutil
import pytest

from llm.data.vocabularies import load_vocabulary
from llm.errors import TRY_AGAIN
from llm.evaluation.reports import read_run
from llm.main import main
from llm.training.checkpoints.directory import step_path
from tests.jobs.tiny_run import RUN, corpus
from tools import exact_restart

SERVER = multiprocessing.get_context('forkserver')
# Steps enough for a watcher to see every phase, and dropout, which depends on the step.
SETTINGS = (
    *('TOTAL_STEPS = 80', 'SAVE_EVERY = 10', 'EVALUATE_EVERY = 40', 'BATCH_SIZE = 8', 'NUM_LAYERS = 1'),
    *('pretrain.Pretrain.samples = @sampling.SamplesConfig()', "sampling.SamplesConfig.prompts = ('ab', '')"),
    *('sampling.SamplesConfig.max_new_tokens = 8', 'layer.LayerConfig.dropout = 0.1'),
)


def child(arguments, variables, log):
    """What a process of the fork server does."""
    os.environ.update(variables)
    jax.config.update('jax_compilation_cache_dir', variables['JAX_COMPILATION_CACHE_DIR'])
    with open(log, 'ab') as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    raise SystemExit(main(arguments))


class Forked:
    """A process of the fork server as an exact_restart.Process."""

    def __init__(self, arguments, variables, log):
        SERVER.set_forkserver_preload(['llm.jobs.pretrain', 'orbax.checkpoint', 'tensorboard', __name__])
        self._process = SERVER.Process(target=child, args=(list(arguments), dict(variables), log))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def kill(self):
        self._process.kill()

    def wait(self, timeout=None):
        self._process.join(timeout)
        return self._process.exitcode


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Holds the corpus, the gin file and all runs."""
    folder = tmp_path_factory.mktemp('pretrain')
    files = str(corpus(folder / 'corpus.jsonl', documents=400))
    (folder / 'run.gin').write_text(RUN.format(files=files, directory='set by each run'))
    return folder


@pytest.fixture(scope='module')
def new_run(folder):
    """A new Run of these settings; `ready` shares the caches of the run left alone."""

    def new_run(name, ready=False):
        arguments = [f'--gin_file={folder / "run.gin"}', *(f'--gin_bindings={setting}' for setting in SETTINGS)]
        return exact_restart.Run(folder / name, arguments, Forked, caches=folder / 'alone' if ready else None)

    return new_run


@pytest.fixture(scope='module')
def alone(new_run):
    """A complete run that nobody disturbed."""
    run = new_run('alone')
    exact_restart.run_alone(run)
    return run


@pytest.fixture(scope='module')
def expected(alone):
    return exact_restart.results(alone)


@pytest.fixture(scope='module')
def killed(new_run, alone):
    """A run killed when it had two checkpoints."""
    run = new_run('killed', ready=True)
    run.start()
    wait_until(run, lambda: len(run.saved()) >= 2)
    assert run.kill() is not None
    return run


def wait_until(run, condition):
    while not condition():
        assert run.process.poll() is None, run.log.read_text()
        time.sleep(0.002)


def stop_at(run, step):
    """Halt the process when it has done `step` steps in all, or, on a machine with other work, a few more; how many."""
    wait_until(run, lambda: any(f'"step": {step},' in line for line in metrics(run)))
    os.kill(run.process.pid, signal.SIGSTOP)
    wait_until(run, lambda: psutil.Process(run.process.pid).status() == psutil.STATUS_STOPPED)
    return max(json.loads(line)['step'] for line in metrics(run) if line.endswith('}'))


def metrics(run):
    path = run.directory / 'metrics.jsonl'
    return path.read_text().splitlines() if path.exists() else []


def test_what_a_run_leaves(alone, expected):
    train = [json.loads(line) for line in metrics(alone) if '"train"' in line]
    assert [line['step'] for line in train] == list(range(1, 81))
    assert train[-1]['loss'] < train[0]['loss'] - 1
    assert alone.saved() == [60, 70, 80]
    run = read_run(alone.directory)
    scores = run.evaluations['text']
    assert [score['step'] for score in scores] == [40, 80]
    assert scores[1]['bits_per_byte'] < scores[0]['bits_per_byte']
    assert [(sample['step'], sample['prompt']) for sample in run.samples] == [(80, 'ab'), (80, '')]
    assert run.warnings == []
    assert (alone.directory / 'complete').read_text() == '80\n'
    assert '</html>' in (alone.directory / 'report.html').read_text()
    assert sum(isinstance(value, np.ndarray) for value in expected.values()) > 3 * 20


def test_killed_again_and_again_a_run_ends_in_the_same_bits(new_run, alone, expected):
    run = new_run('kills')
    shutil.copytree(alone.compiled, run.compiled)
    phases: list[str] = []

    def targets():
        yield from ('tokenising', 'saving', 'restoring')
        while phases.count('saving') < 2:
            yield 'saving'

    at_once = dict.fromkeys(('tokenising', 'saving'), 0.0) | {'restoring': 0.5}
    for phase in exact_restart.kill_round(run, targets(), at_once, random.Random(0)):
        phases += [phase]
    assert len(phases) >= 4 and phases.count('saving') == 2, phases
    assert exact_restart.differences(expected, run) == []


def test_a_difference_would_be_seen(alone, expected):
    changed = {name: value for name, value in expected.items() if name != 'samples.jsonl line 2'}
    name = next(name for name, value in changed.items() if isinstance(value, np.ndarray) and value.size > 9)
    changed[name] = changed[name].copy()
    changed[name].view(np.uint8).flat[7] ^= 1
    changed['metrics.jsonl line 9'] = changed['metrics.jsonl line 9'] | {'loss': 1.0}
    assert exact_restart.differences(changed, alone) == sorted(
        f'alone: {name}' for name in (name, 'metrics.jsonl line 9', 'samples.jsonl line 2')
    )


def test_signals_save_and_a_second_process_is_refused(new_run, expected, capfd):
    run = new_run('signals', ready=True)
    last = 0
    for number, steps in ((signal.SIGTERM, 5), (signal.SIGINT, 20)):
        run.start()
        step = stop_at(run, last + steps)
        if number == signal.SIGTERM:
            capfd.readouterr()
            assert main(run.arguments) == 2
            assert f'another process is using this run directory: pid {run.process.pid} ' in capfd.readouterr().err
        os.kill(run.process.pid, number)
        os.kill(run.process.pid, signal.SIGCONT)
        printed = run.finish(TRY_AGAIN)
        last = run.saved()[-1]
        assert step <= last <= step + 3
        assert f'stopped by {number.name} after step {last}, which is saved\n' in printed
        assert printed.splitlines()[-1].startswith(f'{run.directory}: stopped, run the same command to go on; see ')
    run.start()
    assert f'restored the checkpoint of step {last}\n' in run.finish()
    assert exact_restart.differences(expected, run) == []


def test_a_complete_run_says_so_and_does_nothing(alone, expected, capfd):
    before = {path: path.stat().st_mtime_ns for path in alone.directory.rglob('*') if path.suffix == '.jsonl'}
    assert main(alone.arguments) == 0
    printed = capfd.readouterr()
    assert printed.out == f'{alone.directory}: already complete; see {alone.directory}/report.html\n'
    assert printed.err == ''
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert main([*alone.arguments, '--gin_bindings=SEED = 1']) == 2
    assert (
        'holds a run of another config: data.seed 0 there, 1 here, step.seed 0 there, 1 here' in capfd.readouterr().err
    )
    assert exact_restart.differences(expected, alone) == []


def test_a_kill_between_the_last_checkpoint_and_the_end(new_run, alone, expected):
    run = new_run('unmarked', ready=True)
    shutil.copytree(alone.directory, run.directory)
    (run.directory / 'complete').unlink()
    run.start()
    run.finish()
    assert exact_restart.differences(expected, run) == []


def test_damage_is_named_and_the_checkpoint_before_is_used(new_run, killed, expected):
    newest = step_path(killed.directory / 'checkpoints', killed.saved()[-1])
    damages = {(name, damage.__name__): damage for name, damage in exact_restart.damages(newest)}
    largest = max((path for path in newest.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    for number, (name, kind) in enumerate(
        ((str(largest.relative_to(newest)), 'flip'), ('COMMITTED', 'cut'), ('metadata.json', 'flip'))
    ):
        run = new_run(f'damage {number}', ready=True)
        shutil.copytree(killed.directory, run.directory)
        assert exact_restart.damage_round(run, name, damages[name, kind]) == []
        assert exact_restart.differences(expected, run) == []
        assert any(f'{newest.name}/{name} ' in warning for warning in read_run(run.directory).warnings)


def test_another_mesh_goes_on_with_the_same_data_and_loss(new_run, killed, expected):
    run = new_run('mesh', ready=True)
    shutil.copytree(killed.directory, run.directory)
    run.arguments += ('--gin_bindings=mesh.MeshConfig.data = 2', '--gin_bindings=mesh.MeshConfig.tensor = 2')
    run.start()
    printed = run.finish()
    assert "mesh was {'pipeline': 1, 'data': 1," in printed and 'may not give the same bits' in printed
    for line in metrics(run):
        record = json.loads(line)
        wanted = expected[f'metrics.jsonl line {metrics(run).index(line) + 1}']
        assert (record['step'], record['kind'], record['tokens']) == (wanted['step'], wanted['kind'], wanted['tokens'])
        np.testing.assert_allclose(record['loss'], wanted['loss'], rtol=1e-5)


def test_initial_parameters_and_nothing_else_come_from_another_run(tiny_run):
    assert tiny_run() == 0
    first = tiny_run.metrics('train')
    final = tiny_run.metrics('evaluation')[-1]
    settings = (
        f"RUN_DIRECTORY = '{tiny_run.folder}/next'",
        f"INITIAL_PARAMETERS = '{tiny_run.directory}'",
        # So small that it moves nothing: what is evaluated at the end are the parameters that it started from.
        'LEARNING_RATE = 1e-30',
    )
    assert main([*tiny_run.arguments, *(f'--gin_bindings={setting}' for setting in settings)]) == 0
    tiny_run.directory = tiny_run.folder / 'next'
    second = tiny_run.metrics('train')
    assert [line['step'] for line in second] == [line['step'] for line in first] == list(range(1, 13))
    assert [line['tokens'] for line in second] == [line['tokens'] for line in first]
    assert tiny_run.metrics('evaluation')[-1]['loss'] == final['loss']


def test_a_vocabulary_is_trained_to_the_size_of_the_model_and_can_be_used_again(tiny_run):
    settings = ("training.VocabularyConfig.kind = 'byte_level_bpe'", 'VOCAB_SIZE = 300')
    assert tiny_run(*settings) == 0
    kept = tiny_run.directory / 'vocabulary'
    vocabulary = load_vocabulary(kept)
    assert vocabulary.size == 300
    run_file = tiny_run.folder / 'run.gin'
    run_file.write_text(run_file.read_text().replace("training.VocabularyConfig.kind = 'bytes'\n", ''))
    again = tiny_run.folder / 'again'
    assert tiny_run(f'VOCABULARY = {str(kept)!r}', f'RUN_DIRECTORY = {str(again)!r}', 'VOCAB_SIZE = 320') == 0
    assert load_vocabulary(again / 'vocabulary') == vocabulary
