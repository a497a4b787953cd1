"""What schedulers are given: a JobSet for Kubernetes, a batch script for Slurm, a task for SkyPilot.

    python -m tools.cluster.generate tools/cluster/v5e/run.yaml

All three start one process a host (Slurm: a GPU), give them time to save when they are to stop, start the run again
when it was stopped or a host was lost (exit code 75 and above), and not when it failed by itself (1 and 2).
"""

import shlex
from typing import Any

import yaml

from llm.errors import TRY_AGAIN
from tools.cluster.description import CHIPS, ClusterRun

_PORT = 8476
_KILLED = 137  # a process that the system killed, often for want of memory
_JOB = 'hosts'  # the name of the replicated job
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_HEADER = '# Made by tools/cluster/generate.py from {}: change that.\n'


def _port(number: int) -> dict[str, Any]:
    return {'containerPort': number, 'protocol': 'TCP'}


def jobset(run: ClusterRun, source: str) -> str:
    """A JobSet (jobset.x-k8s.io/v1alpha2) for GKE; without TPUs, for any Kubernetes that has JobSet installed."""
    chip = CHIPS[run.chip]
    container: dict[str, Any] = {
        'name': 'llm',
        'image': run.image,
        'command': run.command(),
        'env': [{'name': 'LLM_CACHE', 'value': f'{run.shared}/tokens'}],
        'volumeMounts': [{'name': 'shared', 'mountPath': run.shared}],
    }
    pod: dict[str, Any] = {
        'restartPolicy': 'Never',
        'terminationGracePeriodSeconds': run.grace_seconds,
        'containers': [container],
        'volumes': [{'name': 'shared', 'persistentVolumeClaim': {'claimName': run.claim}}],
    }
    metadata: dict[str, Any] = {'name': run.name}
    if run.is_tpu:
        pod['nodeSelector'] = {
            'cloud.google.com/gke-tpu-accelerator': chip.gke,
            'cloud.google.com/gke-tpu-topology': run.topology,
        }
        # One slice to a node pool: GKE's pools are slices.
        metadata['annotations'] = {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
        container['resources'] = {'limits': {chip.resource: run.chips_per_host}}
        container['ports'] = [_port(8471), _port(8080)]  # between hosts, between slices
    else:
        resources: dict[str, Any] = {'cpu': run.cpus, 'memory': f'{run.memory_gb}Gi'}
        if chip.resource:
            pod['nodeSelector'] = {'cloud.google.com/gke-accelerator': chip.gke}
            resources[chip.resource] = run.chips_per_host
        container['resources'] = {'limits': resources}
        container['ports'] = [_port(_PORT)]
        # JobSet's names of pods: <jobset>-<job>-<replica>-<index>.<jobset>.
        container['env'] += [
            {'name': 'JAX_COORDINATOR_ADDRESS', 'value': f'{run.name}-{_JOB}-0-0.{run.name}:{_PORT}'},
            {'name': 'JAX_NUM_PROCESSES', 'value': str(run.hosts_per_slice)},
            {'name': 'JAX_PROCESS_ID', 'valueFrom': {'fieldRef': {'fieldPath': _INDEX}}},
        ]
    job = {
        'completionMode': 'Indexed',
        'completions': run.hosts_per_slice,
        'parallelism': run.hosts_per_slice,
        'backoffLimit': 0,  # no pod can come back alone
        'podFailurePolicy': {
            'rules': [{'action': 'FailJob', 'onExitCodes': {'operator': 'In', 'values': [1, 2]}}],
        },
        'template': {'spec': pod},
    }
    content = {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        'metadata': metadata,
        'spec': {
            'failurePolicy': {
                'maxRestarts': run.restarts,
                'rules': [
                    {'name': 'mistakes', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']},
                ],
            },
            'replicatedJobs': [{'name': _JOB, 'replicas': run.slices, 'template': {'spec': job}}],
        },
    }
    return _HEADER.format(source) + '# kubectl apply -f jobset.yaml\n' + _yaml(content)


def slurm(run: ClusterRun, source: str) -> str | None:
    """A script for sbatch, None for TPUs. JAX reads who is who from what srun sets: on GPUs a process for each."""
    if run.is_tpu:
        return None
    tasks = max(1, run.chips_per_host)
    options = {
        'job-name': run.name,
        'partition': run.partition,
        'nodes': run.hosts_per_slice,
        'ntasks-per-node': tasks,
        'gpus-per-node': run.chips_per_host or None,
        'cpus-per-task': max(1, run.cpus // tasks),
        'mem': f'{run.memory_gb}G',
        'time': f'{run.hours}:00:00',
        # To the processes, not to this script, when the time is nearly up.
        'signal': f'TERM@{run.grace_seconds}',
        'output': '%x-%j.log',
        'open-mode': 'append',
    }
    lines = [f'#SBATCH --{name}={value}' for name, value in options.items() if value is not None]
    return '\n'.join(
        [
            '#!/bin/bash',
            _HEADER.format(source) + '# sbatch slurm.sh',
            *lines,
            '#SBATCH --requeue',
            'set -u',
            # srun does not take this over by itself.
            'export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
            f'export LLM_CACHE={shlex.quote(run.shared + "/tokens")}',
            *run.setup.splitlines(),
            '# The others must live to say what happened to the one that is lost.',
            f'srun --kill-on-bad-exit=0 {shlex.join(run.command())}',
            'code=$?',
            f'if [ "$code" -ge {TRY_AGAIN} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {run.restarts} ]; then',
            '    scontrol requeue "$SLURM_JOB_ID"',
            'fi',
            'exit "$code"',
            '',
        ]
    )


def skypilot(run: ClusterRun, source: str) -> str:
    """A task for `sky jobs launch`."""
    chip = CHIPS[run.chip]
    resources: dict[str, Any] = {
        'image_id': f'docker:{run.image}',
        'use_spot': run.spot,
        'job_recovery': {'max_restarts_on_errors': 0, 'recover_on_exit_codes': [TRY_AGAIN, _KILLED]},
    }
    who: tuple[str, ...] = (
        f'export JAX_COORDINATOR_ADDRESS="$(head -n1 <<< "$SKYPILOT_NODE_IPS"):{_PORT}"',
        'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
    )
    if run.is_tpu:
        resources['accelerators'] = chip.skypilot.format(run.num_chips * chip.size_factor)
        resources['infra'] = 'gcp'
        who = ()  # JAX asks the TPU
    else:
        resources |= {'cpus': f'{run.cpus}+', 'memory': f'{run.memory_gb}+'}
        if chip.skypilot:
            resources['accelerators'] = chip.skypilot
    content = {
        'name': run.name,
        'num_nodes': run.slices if run.is_tpu else run.hosts_per_slice,
        'resources': resources,
        'volumes': {run.shared: run.claim},
        'envs': {'LLM_CACHE': f'{run.shared}/tokens'},
        'run': ''.join(f'{line}\n' for line in (*run.setup.splitlines(), *who, shlex.join(run.command()))),
    }
    return _HEADER.format(source) + '# sky jobs launch skypilot.yaml\n' + _yaml(content)


class _Dumper(yaml.SafeDumper):
    """Shows texts of several lines as such, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar('tag:yaml.org,2002:str', text, style='|' if '\n' in text else None),
)


def _yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000)
