"""The command line as users meet it: each case is a process, judged by its exit code and output."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SAMPLES = ROOT / 'tests' / 'configuration'
RUN = """
from __gin__ import dynamic_registration
from gin_samples import jobs
from gin_samples import models
STEPS = 3                     # how many
NAME = %gin.REQUIRED          # of the model
JOB = @jobs.Train()
jobs.Train.steps = %STEPS
jobs.Train.model = @models.Decoder()
models.Decoder.num_layers = 2
models.Decoder.name = %NAME
"""


@pytest.fixture
def llm(tmp_path):
    """Runs `python -m llm.main` with the arguments in a folder that holds run.gin."""
    (tmp_path / 'run.gin').write_text(RUN)

    def llm(*arguments, package=ROOT, stdout=subprocess.PIPE):
        path = os.pathsep.join((str(package), str(SAMPLES)))
        return subprocess.run(
            [sys.executable, '-m', 'llm.main', *arguments],
            cwd=tmp_path,
            env={**os.environ, 'PYTHONPATH': path, 'PYTHONDONTWRITEBYTECODE': '1'},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    return llm


def test_runs_the_job_with_its_invocation(llm, tmp_path):
    done = llm('--gin_file=run.gin', '--gin_bindings=NAME="a"', '--gin_bindings', 'STEPS = 4', '--dry_run')
    assert (done.returncode, done.stderr) == (0, '')
    got = json.loads(done.stdout)
    assert got['steps'] == 4
    assert got['dry_run'] is True
    assert got['config_files'] == ['run.gin']
    assert got['command'][:4] == ['python', '-m', 'llm.main', '--gin_file=run.gin']
    (tmp_path / 'config.gin').write_text(got['operative_config'])
    again = json.loads(llm('--gin_file', 'config.gin').stdout)
    assert again['operative_config'] == got['operative_config']
    assert again['dry_run'] is False


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (
            (),
            '--gin_file is missing. '
            'Name a run file, e.g. --gin_file=gin_configs/runs/quickstart.gin; --help lists them.',
        ),
        (('--gin_file',), 'argument --gin_file: expected one argument. See python -m llm.main --help.'),
        (('--gin_files=run.gin',), "unknown argument '--gin_files=run.gin'. Did you mean --gin_file?"),
        (('run.gin',), "unknown argument 'run.gin'. Did you mean --gin_file=run.gin?"),
        (('--gin_file=rum.gin',), "the gin file 'rum.gin' does not exist. Did you mean run.gin?"),
        (
            ('--gin_file=run.gin',),
            """run.gin:6: NAME must be set (of the model). Set NAME: --gin_bindings='NAME="..."'""",
        ),
        (
            ('--gin_file=run.gin', '--gin_bindings=NAME=a b'),
            "--gin_bindings='NAME=a b': cannot read the value a. "
            """A string needs quotes of its own: --gin_bindings='NAME="a b"'.""",
        ),
        (
            ('--gin_file=run.gin', '--gin_bindings=NAME="a"', '--gin_bindings=SETPS=1'),
            "--gin_bindings='SETPS=1': SETPS is set, but nothing that JOB needs refers to %SETPS. Did you mean STEPS?",
        ),
        (
            ('--gin_file=run.gin', '--gin_bindings=NAME="a"', "--gin_bindings=jobs.Train.failure='user'"),
            '/data: the disk is full. Free some space.',
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(llm, arguments, line):
    done = llm(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, '', f'error: {line}\n')


def test_a_bug_keeps_its_traceback(llm):
    done = llm('--gin_file=run.gin', '--gin_bindings=NAME="a"', "--gin_bindings=jobs.Train.failure='bug'")
    assert done.returncode == 1
    assert done.stderr.startswith('Traceback')
    assert 'jobs.py' in done.stderr
    assert done.stderr.endswith('ZeroDivisionError: a bug\n')


def test_interrupt(llm):
    done = llm('--gin_file=run.gin', '--gin_bindings=NAME="a"', "--gin_bindings=jobs.Train.failure='interrupt'")
    assert (done.returncode, done.stderr) == (130, 'interrupted\n')


def test_output_that_nobody_reads_any_more_ends_the_program_quietly(llm):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = llm('--gin_file=run.gin', '--gin_bindings=NAME="a"', stdout=writer)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, '')


def test_help_lists_the_run_files_and_loads_nothing_heavy(llm, tmp_path):
    runs = tmp_path / 'gin_configs' / 'runs'
    runs.mkdir(parents=True)
    (runs / 'b_run.gin').write_text('\n# Does b.\n# More of it.\nX = 1\n')
    (runs / 'a.gin').write_text('X = 1\n')
    done = llm('--help')
    assert (done.returncode, done.stderr) == (0, '')
    assert 'usage: python -m llm.main' in done.stdout
    assert done.stdout.endswith('run files:\n  gin_configs/runs/a.gin\n  gin_configs/runs/b_run.gin  Does b.\n')
    program = """
        import sys
        from llm import main
        try:
            main.main(['--help'])
        except SystemExit:
            print(sorted({'jax', 'flax', 'optax', 'numpy', 'tensorflow', 'seqio', 'torch'} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith('\n[]\n')


@pytest.fixture
def package(tmp_path):
    """A copy of what start-up needs of our package, as if installed in site-packages."""
    site = tmp_path / 'site-packages'
    for name in ('configuration', 'parallel'):
        shutil.copytree(ROOT / 'llm' / name, site / 'llm' / name)
    for name in ('__init__.py', 'command_line.py', 'errors.py', 'main.py'):
        shutil.copy(ROOT / 'llm' / name, site / 'llm' / name)
    return site


def test_refuses_a_foreign_package_in_the_same_place(llm, package):
    arguments = ('--gin_file=run.gin', '--gin_bindings=NAME="a"')
    remedy = 'Run pip uninstall llm llm-jax, then install llm-jax alone.'
    assert llm(*arguments, package=package).returncode == 0
    metadata = package / 'llm-0.27.dist-info'
    metadata.mkdir()
    (metadata / 'METADATA').write_text('Metadata-Version: 2.1\nName: llm\nVersion: 0.27\n')
    (metadata / 'RECORD').write_text('llm/__init__.py,,\n')
    done = llm(*arguments, package=package)
    line = f"error: PyPI's package llm 0.27 is installed over this one in {package / 'llm'}. {remedy}\n"
    assert (done.returncode, done.stderr) == (2, line)
    (package / 'llm/errors.py').write_text('class ModelError(Exception):\n    pass\n')
    done = llm(*arguments, package=package)
    line = f'error: another package called llm has overwritten files in {package / "llm"}. {remedy}\n'
    assert (done.returncode, done.stderr) == (2, line)


def test_a_foreign_package_elsewhere_is_harmless(llm, package, tmp_path):
    metadata = package / 'llm-0.27.dist-info'
    metadata.mkdir()
    (metadata / 'METADATA').write_text('Metadata-Version: 2.1\nName: llm\nVersion: 0.27\n')
    done = llm('--gin_file=run.gin', '--gin_bindings=NAME="a"', package=f'{ROOT}{os.pathsep}{package}')
    assert (done.returncode, done.stderr) == (0, '')
    other = tmp_path / 'other' / 'llm'
    other.mkdir(parents=True)
    (other / '__init__.py').write_text('')
    program = 'import importlib.util, llm, sys; spec = importlib.util.spec_from_file_location("ours", sys.argv[1]); '
    program += 'ours = importlib.util.module_from_spec(spec); spec.loader.exec_module(ours); sys.exit(ours.main([]))'
    done = subprocess.run(
        [sys.executable, '-c', program, str(package / 'llm' / 'main.py')],
        cwd=tmp_path / 'other',
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: another package called llm, in {other}, hides the one in {package / "llm"}.')
