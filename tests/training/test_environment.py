"""What is recorded of the environment, and which changes are worth a warning."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys

import jax
import pytest

from llm.training import environment as module
from llm.training.environment import environment, warn_about_changes


def test_it_is_json_and_says_where_we_are():
    found = environment({'data': 4, 'tensor': 2})
    assert json.loads(json.dumps(found)) == found
    assert found['jaxlib'] == importlib.metadata.version('jaxlib')
    assert found['numpy'] == importlib.metadata.version('numpy')
    assert found['python'] == platform.python_version()
    assert (found['platform'], found['device_count'], found['process_count']) == ('cpu', 8, 1)
    assert found['mesh'] == {'data': 4, 'tensor': 2}
    assert '--xla_force_host_platform_device_count=8' in found['xla_flags']
    assert found['threads'] == len(os.sched_getaffinity(0))
    assert found['collectives'] == 'in-process'
    assert platform.machine() in found['cpu_model']
    assert found['x64'] is False
    with jax.enable_x64():
        assert environment()['x64'] is True


def test_the_number_of_threads_is_what_this_process_may_use():
    program = (
        'import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n'
        'from llm.training.environment import environment; found = environment()\n'
        'print(found["threads"], found["thread_variables"], found["device_count"])'
    )
    variables = {**os.environ, 'XLA_FLAGS': '', 'OMP_NUM_THREADS': '3'}
    output = subprocess.run([sys.executable, '-c', program], env=variables, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "1 {'OMP_NUM_THREADS': '3'} 1"


def test_the_same_environment_warns_of_nothing():
    assert warn_about_changes(environment({'data': 8}), environment({'data': 8})) == []
    # Through JSON and back, as a checkpoint holds it.
    assert warn_about_changes(json.loads(json.dumps(environment({'data': 8}))), environment({'data': 8})) == []


@pytest.mark.parametrize(
    'name', ['jaxlib', 'cpu_model', 'threads', 'mesh', 'collectives', 'device_count', 'xla_flags', 'git_commit']
)
def test_a_change_of_what_decides_bits_is_named(name):
    old = environment({'data': 8}) | {name: 'another'}
    new = environment({'data': 8})
    assert warn_about_changes(old, new) == [f"{name} was 'another', is {new[name]!r}"]


def test_what_does_not_decide_bits_and_what_was_not_recorded_warn_of_nothing():
    new = environment()
    assert warn_about_changes(new | {'python': '3.0', 'orbax-checkpoint': '0.1'}, new) == []
    assert warn_about_changes({'jaxlib': new['jaxlib']}, new) == []


def git(directory, *arguments):
    identity = ['-c', 'user.name=t', '-c', 'user.email=t@t']
    return subprocess.run(
        ['git', '-C', str(directory), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_and_changes_of_the_code(tmp_path, monkeypatch):
    package = tmp_path / 'llm' / 'training'
    package.mkdir(parents=True)
    file = package / 'environment.py'
    file.write_text('a = 1\n')
    monkeypatch.setattr(module, '__file__', str(file))
    look = module._git.__wrapped__
    assert look(tmp_path) == (None, None)
    git(tmp_path, 'init', '-q')
    # A copy installed below somebody else's repository does not belong to it.
    assert look(tmp_path) == (None, None)
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-q', '-m', 'first')
    head = git(tmp_path, 'rev-parse', 'HEAD')
    assert look(tmp_path) == (head, False)
    (tmp_path / 'untracked').write_text('')
    assert look(tmp_path) == (head, False)
    file.write_text('a = 2\n')
    assert look(tmp_path) == (head, True)
