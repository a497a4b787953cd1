"""Which processes a run has, and what real ones do together: join, wait for process 0, agree, fail."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from llm.errors import UserError
from llm.parallel.processes import Processes, find_processes
from tests.parallel.real_processes import ROOT, free_port, run_processes


@pytest.fixture
def environ(monkeypatch):
    """The environment of a machine of its own."""
    for name in list(os.environ):
        if name.startswith(('SLURM_', 'OMPI_', 'JAX_COORDINATOR', 'JAX_NUM_P', 'JAX_PROCESS', 'JOB_', 'KUBERNETES_')):
            monkeypatch.delenv(name)
    return monkeypatch.setenv


def test_a_laptop_is_alone_and_does_not_ask_jax(environ):
    program = (
        'import sys; from llm.parallel.processes import find_processes as find; '
        'print(find(), find(num_processes=1), "jax" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == 'None None False\n'


def test_flags_and_variables_say_the_same_and_flags_come_first(environ):
    by_flags = find_processes('host:8476', 4, 2, heartbeat_timeout_seconds=7, initialization_timeout_seconds=9)
    assert by_flags == Processes('host:8476', 4, 2, '', 9, 7)
    for name, value in by_flags.variables().items():
        environ(name, value)
    assert find_processes(heartbeat_timeout_seconds=7, initialization_timeout_seconds=9) == by_flags
    assert find_processes(process_id=0) == Processes('host:8476', 4, 0)
    # One process with an address is started like many.
    assert find_processes(num_processes=1, process_id=0) == Processes('host:8476', 1, 0)


SLURM = {
    'SLURM_JOB_ID': '4097',
    'SLURM_STEP_NODELIST': 'node[003-004],other7',
    'SLURM_NTASKS': '6',
    'SLURM_PROCID': '5',
    'SLURM_LOCALID': '1',
}


def test_slurm_says_it_all(environ):
    for name, value in SLURM.items():
        environ(name, value)
    # JAX takes the port from the job's number, and the device that a task may use from its place on the node.
    assert find_processes() == Processes('node003:61441', 6, 5, '1')
    assert find_processes(num_processes=1) is None
    environ('SLURM_NTASKS', '1')
    assert find_processes() is None


def test_open_mpi_says_it_all(environ):
    environ('OMPI_MCA_orte_hnp_uri', '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911')
    environ('OMPI_COMM_WORLD_SIZE', '3')
    environ('OMPI_COMM_WORLD_RANK', '2')
    environ('OMPI_COMM_WORLD_LOCAL_RANK', '0')
    found = find_processes()
    assert (found.coordinator_address.partition(':')[0], found.num_processes, found.process_id) == ('10.96.0.1', 3, 2)


def test_two_tpu_slices_on_gke():
    """In a process of its own: JAX looks for TPUs when it is imported."""
    variables = {
        'JAX_FORCE_TPU_INIT': '1',  # as if there were chips
        'TPU_WORKER_HOSTNAMES': 'localhost,host-1',
        'TPU_WORKER_ID': '1',
        'MEGASCALE_NUM_SLICES': '2',
        'MEGASCALE_SLICE_ID': '1',
        'MEGASCALE_COORDINATOR_ADDRESS': 'localhost:8080',
    }
    program = 'from llm.parallel.processes import find_processes; print(find_processes())'
    done = subprocess.run(
        [sys.executable, '-c', program],
        env=os.environ | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("Processes(coordinator_address='localhost:8482', num_processes=4, process_id=3,")


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('host', 2, 0), "coordinator address 'host' is not HOST:PORT"),
        (('host:0', 2, 0), "'host:0' is not HOST:PORT"),
        ((':80', 2, 0), "':80' is not HOST:PORT"),
        (('host:80', 2, 2), 'process_id is 2 of 2 processes'),
        (('host:80', 2, -1), 'process_id is -1 of 2'),
        (('host:80', 0, 0), 'process_id is 0 of 0'),
        ((None, 2, 0), r'--coordinator_address \(JAX_COORDINATOR_ADDRESS\) missing'),
        (('host:80', 2, None), r'--process_id \(JAX_PROCESS_ID\) missing'),
        (('host:80', None, None), r'--num_processes \(JAX_NUM_PROCESSES\) and --process_id .* missing'),
        ((None, None, 1), '--coordinator_address .* and --num_processes .* missing'),
    ],
)
def test_what_is_wrong_is_named(environ, arguments, message):
    with pytest.raises(UserError, match=message):
        find_processes(*arguments)


def test_a_variable_that_is_no_number_and_a_cluster_that_does_not_say(environ):
    environ('JAX_NUM_PROCESSES', 'two')
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES: 'two' is not a number"):
        find_processes()
    environ('JAX_NUM_PROCESSES', '2')
    for name, value in (SLURM | {'SLURM_PROCID': 'first'}).items():
        environ(name, value)
    with pytest.raises(UserError, match=r"does not say which processes there are \(invalid literal .*'first'\)"):
        find_processes()


TOGETHER = """
import json
import jax
folder = Path(sys.argv[1])

def make():  # the second who comes finds what the first has made
    made = (folder / 'made').exists()
    (folder / 'made').touch()
    return made

with processes.joined(found):
    result = {'first': processes.is_first(), 'devices': jax.device_count()}
    result['word'] = processes.from_first('a word', lambda: f'from {found.process_id}')
    result['made before'] = processes.first_then_others('a thing', make)
    processes.check_shared(folder / 'made')
    processes.check_same('answer', '42')

    def fail():
        raise UserError('the disk is full')

    messages = []
    for attempt in (lambda: processes.from_first('the impossible', fail),
                    lambda: processes.check_same('digest', f'digest {found.process_id}'),
                    lambda: processes.require_one('counting')):
        try:
            attempt()
        except UserError as error:
            messages.append(str(error))
    (folder / f'result_{found.process_id}.json').write_text(json.dumps([result, messages]))
"""


def test_process_0_goes_first_and_the_others_hear_of_it(tmp_path):
    run_processes(2, TOGETHER, str(tmp_path), codes=[0, 0])
    first, second = (json.loads((tmp_path / f'result_{process}.json').read_text()) for process in range(2))
    assert first[0] == {'first': True, 'devices': 2, 'word': 'from 0', 'made before': False}
    assert second[0] == {'first': False, 'devices': 2, 'word': 'from 0', 'made before': True}
    one = 'counting runs in one process. Start it once, without --num_processes or srun.'
    assert first[1] == ['the disk is full', one]
    assert second[1] == [
        'process 0 failed at the impossible (UserError: the disk is full). Its output says more.',
        'the digest is digest 1 on process 1 and digest 0 on process 0. '
        'All processes must read the same files: use a file system that they share.',
        one,
    ]


FAIL = """
import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

with processes.joined(found):
    process_allgather(np.int32(1))
    if found.process_id == 1:
        raise {error}
    process_allgather(np.int32(2))
"""


@pytest.mark.parametrize(
    ('error', 'code', 'text'),
    [
        ("ValueError('a bug')", 1, 'ValueError: a bug\n'),
        ("UserError('a mistake')", 2, 'error: a mistake\n'),
    ],
)
def test_one_that_fails_does_not_wait_and_the_others_stop(error, code, text):
    outputs = run_processes(2, FAIL.format(error=error), codes=[75, code], heartbeat=8)
    assert text in outputs[1]
    assert ('Traceback' in outputs[1]) == (code == 1)
    assert 'error: process 1 of 2 was lost: no sign of life for 8 s. This process stops too.' in outputs[0]
    assert 'Traceback' not in outputs[0]


def test_a_bug_in_all_of_them_shows_as_a_bug():
    program = textwrap.dedent("""
    with processes.joined(found):
        raise TypeError('everywhere')
    """)
    for output in run_processes(2, program, codes=[1, None]):
        assert 'Traceback' in output or 'process 0 of 2, which holds the run together, has ended' in output


def test_a_port_that_is_taken():
    with free_port(keep=True) as port:
        output = run_processes(1, 'with processes.joined(found): pass', codes=[2], port=port)[0]
    assert f'error: localhost:{port}: process 0 of 1 cannot join' in output
    assert f'Is port {port} of the host of process 0 in use?' in output
