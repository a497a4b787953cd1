"""Manifests for schedulers: against the schedulers' own schemas, and run where that can be done without a cluster."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_batch_v1_job_template_spec import IoK8sApiBatchV1JobTemplateSpec
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from pydantic import ValidationError

from llm.command_line import parse_flags
from llm.configuration import load_job
from llm.errors import UserError
from tests.jobs.tiny_run import TinyRun
from tests.parallel.real_processes import ROOT, free_port, variables
from tools.cluster.description import CHIPS, ClusterRun, read_description
from tools.cluster.generate import generate, main
from tools.cluster.manifests import jobset, skypilot, slurm

EXAMPLES = sorted((ROOT / 'tools' / 'cluster').glob('*/run.yaml'))
SKYPILOT = json.loads((Path(__file__).parent / 'skypilot_schema.json').read_text())


def cluster_run(chip: str, **fields: object) -> ClusterRun:
    size = {2: {'topology': '4x8'}, 3: {'topology': '2x4x4'}, 0: {'hosts': 3}}[CHIPS[chip].tpu_dimensions]
    given = {'name': 'a-run', 'arguments': ('--gin_file=a b.gin',), 'chip': chip, 'image': 'registry/llm:1'}
    return ClusterRun(**(given | size | fields))


RUNS = [cluster_run(chip) for chip in CHIPS] + [
    cluster_run('v5p', slices=3, spot=True),
    cluster_run('h100', partition='gpu', setup='source "a b/activate"\nulimit -c 0', hosts=1),
]


@pytest.mark.parametrize('description', EXAMPLES, ids=lambda path: path.parent.name)
def test_the_examples_are_as_generated(description, tmp_path):
    made = generate(description)
    here = {path.name: path.read_text() for path in description.parent.iterdir() if path.name != 'run.yaml'}
    assert made == here
    assert main([str(description), str(tmp_path)]) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == made


@pytest.mark.parametrize('description', EXAMPLES, ids=lambda path: path.parent.name)
def test_the_examples_name_runs_that_exist(description):
    flags = parse_flags(read_description(description).command()[3:])
    load_job(flags.gin_file, flags.gin_bindings)
    assert flags.heartbeat_timeout_seconds == 100


def test_there_is_an_example_with_and_without_tpus():
    assert [path.parent.name for path in EXAMPLES] == ['h100', 'v5e']


def check_jobset(content):
    """By the models that Kubeflow generates from JobSet's and Kubernetes' OpenAPI: types, what is required, and, since
    they drop what they do not know, that nothing is lost on the way through them."""
    through = JobsetV1alpha2JobSet.from_dict(content).to_dict()
    assert through == content


@pytest.mark.parametrize('run', RUNS, ids=lambda run: f'{run.chip}-{run.slices}')
def test_a_jobset_is_one(run):
    content = yaml.safe_load(jobset(run, 'x.yaml'))
    check_jobset(content)
    (job,) = content['spec']['replicatedJobs']
    pods = job['template']['spec']
    assert job['replicas'] * pods['completions'] == run.slices * run.hosts_per_slice
    (container,) = pods['template']['spec']['containers']
    assert container['command'] == ['python', '-m', 'llm.main', '--gin_file=a b.gin', '--heartbeat_timeout_seconds=100']
    limits = container['resources']['limits']
    names = {variable['name'] for variable in container['env']}
    if run.is_tpu:
        # JAX asks the TPU who is who; all chips of a slice are asked for.
        assert limits == {'google.com/tpu': 4}
        assert pods['completions'] * 4 == run.num_chips == 32
        assert names == {'LLM_CACHE'}
    else:
        assert names == {'LLM_CACHE', 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'}
        address = next(v['value'] for v in container['env'] if v['name'] == 'JAX_COORDINATOR_ADDRESS')
        # <jobset>-<replicated job>-<replica>-<pod>.<jobset>, as JobSet names hosts.
        assert address == f'a-run-{job["name"]}-0-0.a-run:8476'


def test_the_check_of_jobsets_can_fail():
    content = yaml.safe_load(jobset(RUNS[0], 'x.yaml'))

    def changed(change):
        copy = json.loads(json.dumps(content))
        change(copy['spec']['replicatedJobs'][0]['template']['spec'], copy['spec'])
        return copy

    with pytest.raises(AssertionError):
        check_jobset(changed(lambda job, spec: spec.update(maxRestart=3)))
    with pytest.raises(AssertionError):
        check_jobset(changed(lambda job, spec: job['template']['spec'].update(restartPolice='Never')))
    with pytest.raises(ValidationError):
        check_jobset(changed(lambda job, spec: job.update(completions='four')))
    with pytest.raises(ValidationError):
        check_jobset(changed(lambda job, spec: job['template']['spec'].pop('containers')))
    with pytest.raises(ValidationError):
        IoK8sApiBatchV1JobTemplateSpec.from_dict({'spec': {}})


@pytest.mark.parametrize('run', RUNS, ids=lambda run: f'{run.chip}-{run.slices}')
def test_a_skypilot_task_is_one(run):
    content = yaml.safe_load(skypilot(run, 'x.yaml'))
    jsonschema.Draft7Validator(SKYPILOT['task']).validate(content)
    jsonschema.Draft7Validator(SKYPILOT['resources']).validate(content['resources'])
    size = {'v4': 'tpu-v4-64', 'v5e': 'tpu-v5litepod-32', 'v5p': 'tpu-v5p-64', 'v6e': 'tpu-v6e-32'}
    others = {'h100': 'H100:8', 'a100': 'A100-80GB:8', 'cpu': None}
    assert content['resources'].get('accelerators') == (size | others)[run.chip]
    assert content['num_nodes'] == (run.slices if run.is_tpu else run.hosts)


def test_the_check_of_skypilot_tasks_can_fail():
    content = yaml.safe_load(skypilot(RUNS[0], 'x.yaml'))
    with pytest.raises(jsonschema.ValidationError, match='num_node'):
        jsonschema.Draft7Validator(SKYPILOT['task']).validate(content | {'num_node': 2})
    with pytest.raises(jsonschema.ValidationError, match='many'):
        jsonschema.Draft7Validator(SKYPILOT['resources']).validate(
            content['resources'] | {'accelerators': {'x': 'many'}}
        )


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts a shell script of that name first on the path."""
    folder = tmp_path / 'programs'
    folder.mkdir()

    def programs(name, lines):
        (folder / name).write_text(f'#!/bin/bash\n{lines}\n')
        (folder / name).chmod(0o755)

    monkeypatch.setenv('PATH', f'{folder}{os.pathsep}{os.environ["PATH"]}')
    return programs


def bash(script, **environment):
    return subprocess.run(
        ['bash', '-c', script], env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_skypilots_script_says_who_is_who(programs):
    programs('python', 'env | grep ^JAX_ | sort; printf "<%s>" "$@"')
    script = yaml.safe_load(skypilot(cluster_run('h100', setup='export JAX_A=1'), 'x.yaml'))['run']
    done = bash(script, SKYPILOT_NODE_IPS='10.0.0.7\n10.0.0.8\n', SKYPILOT_NUM_NODES='3', SKYPILOT_NODE_RANK='2')
    wanted = ['JAX_A=1', 'JAX_COORDINATOR_ADDRESS=10.0.0.7:8476', 'JAX_NUM_PROCESSES=3', 'JAX_PROCESS_ID=2']
    assert [line for line in done.stdout.splitlines() if line in wanted] == wanted
    assert done.stdout.endswith('<-m><llm.main><--gin_file=a b.gin><--heartbeat_timeout_seconds=100>')


SLURM = {'SLURM_JOB_ID': '77', 'SLURM_CPUS_PER_TASK': '2'}


@pytest.mark.parametrize(
    ('code', 'before', 'requeued'), [(0, 0, 0), (1, 0, 0), (2, 0, 0), (75, 0, 1), (137, 19, 1), (75, 20, 0)]
)
def test_slurm_starts_again_what_can_go_on(programs, code, before, requeued):
    programs('srun', f'exit {code}')
    programs('scontrol', 'echo "$@"')
    done = bash(slurm(cluster_run('cpu'), 'x.yaml'), SLURM_RESTART_COUNT=str(before), **SLURM)
    assert (done.returncode, done.stdout) == (code, 'requeue 77\n' * requeued)


# What Slurm's srun does for a step of tasks on one node: starts them, each told who it is, and returns the worst code.
SRUN = """
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost "$@" 2>>{folder}/log.$task &
    pids+=($!)
done
worst=0
for pid in "${{pids[@]}}"; do wait "$pid"; code=$?; (( code > worst )) && worst=$code; done
exit $worst
"""


@pytest.mark.slow
def test_slurms_script_runs_a_run_of_two_tasks(programs, tmp_path):
    tiny = TinyRun(tmp_path)
    programs('srun', SRUN.format(folder=tmp_path))
    programs('python', f'exec {sys.executable} "$@"')
    arguments = (*tiny.arguments, '--gin_bindings=mesh.MeshConfig.data = 2')
    # JAX takes the port from the number of the job.
    with free_port() as port:
        job = {'SLURM_JOB_ID': str(port), 'JAX_COORDINATOR_PORT': str(port)}
    script = slurm(cluster_run('cpu', hosts=1, arguments=arguments, shared=str(tmp_path)), 'x.yaml')
    done = bash(f'cd {ROOT}\n{script}', **(variables() | SLURM | job))
    logs = [(tmp_path / f'log.{task}').read_text() for task in (0, 1)]
    assert done.returncode == 0, logs
    assert f'{tiny.directory}: complete' in done.stdout
    assert json.loads((tiny.directory / 'environment.json').read_text())['process_count'] == 2
    assert (tmp_path / 'tokens').is_dir()


@pytest.mark.parametrize('run', RUNS, ids=lambda run: f'{run.chip}-{run.slices}')
def test_slurms_options(run):
    script = slurm(run, 'x.yaml')
    assert (script is None) == run.is_tpu
    if script is None:
        return
    assert subprocess.run(['bash', '-n'], input=script, text=True, check=False).returncode == 0
    found = [line.removeprefix('#SBATCH ').partition('=')[::2] for line in script.splitlines() if '#SBATCH' in line]
    options = dict(found)
    assert len(options) == len(found)
    assert options['--nodes'] == str(run.hosts)
    assert int(options['--ntasks-per-node']) == max(1, CHIPS[run.chip].per_host)
    assert options.get('--gpus-per-node') == (None if run.chip == 'cpu' else '8')
    assert options['--signal'] == 'TERM@120'
    assert '--requeue' in options
    # sbatch reads options up to the first command.
    lines = script.splitlines()
    assert all(line.startswith('#') for line in lines[: max(i for i, line in enumerate(lines) if '#SBATCH' in line)])


GOOD = """
name: a-run
chip: h100
hosts: 2
image: x
arguments: [--gin_file=a.gin]
"""


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ('name: a-run', 'name: A_run', "name 'A_run' is not one that Kubernetes takes"),
        ('chip: h100', 'chip: h200', "chip 'h200' is not known. Use one of v4, v5e"),
        ('hosts: 2', 'hosts: two', "hosts = 'two' is not of type"),
        ('hosts: 2', 'hosts: true', 'hosts = True is not of type'),
        ('hosts: 2', 'hosts: 0', 'is too small'),
        ('hosts: 2', 'hosts: 2\nhours: 0', 'hours is too small'),
        ('hosts: 2', 'host: 2', 'unknown: host. There are name, arguments'),
        ('hosts: 2', 'topology: 4x4', 'h100 needs hosts, and neither topology nor slices'),
        ('chip: h100', 'chip: v5e', 'topology None of v5e has not 2 dimensions. Like 4x4'),
        ('chip: h100', 'chip: v5e\ntopology: 4x4', 'hosts = 2 beside a topology'),
        ('chip: h100\nhosts: 2', 'chip: v5p\ntopology: 4x4', "topology '4x4' of v5p has not 3 dimensions"),
        ('chip: h100\nhosts: 2', 'chip: v5e\ntopology: 3x3', 'topology 3x3 is not whole hosts of 4 chips'),
        ('image: x\n', '', 'missing: image'),
        ('[--gin_file=a.gin]', '[--dry_run]', 'arguments name no --gin_file'),
        ('[--gin_file=a.gin]', '[1]', r'arguments = \(1,\) is not of type'),
        ('name: a-run', '[', 'cannot be read'),
    ],
)
def test_mistakes_in_a_description(tmp_path, capsys, old, new, message):
    path = tmp_path / 'run.yaml'
    path.write_text(GOOD)
    assert read_description(path) == ClusterRun('a-run', ('--gin_file=a.gin',), 'h100', 'x', hosts=2)
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        read_description(path)
    assert str(path) in str(caught.value)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == f'error: {caught.value}\n'


def test_a_slice_that_is_a_part_of_a_host():
    run = cluster_run('v6e', topology='1x1')
    assert (run.hosts_per_slice, run.chips_per_host) == (1, 1)
    assert dataclasses.replace(run, topology='2x2').hosts_per_slice == 1
