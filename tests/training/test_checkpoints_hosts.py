"""Two processes that save and restore together: each answers for its own files, and they agree on what is whole."""

import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llm.training.checkpoints import CheckpointConfig, Checkpointer
from llm.training.checkpoints.manifest import find_damage

PROGRAM = """
import json, resource, sys
from pathlib import Path

import jax
import numpy as np

process, port, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=process)

from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from llm.errors import UserError
from llm.training.checkpoints import CheckpointConfig, Checkpointer
from llm.training.checkpoints.manifest import find_damage

mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))

def state(step):
    def place(x, *spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*spec)), lambda index: x[index])
    w = np.arange(64, dtype=np.float32).reshape(16, 4) * step
    return {'parameters': {'w': place(w, 'data')}, 'step': place(np.int32(step))}

def same(a, b):
    pairs = zip(a.addressable_shards, b.addressable_shards, strict=True)
    return all(np.array_equal(x.data, y.data) for x, y in pairs)

abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
result = {}
with Checkpointer(directory, CheckpointConfig(keep_last=3)) as checkpointer:
    for step in (1, 2, 3, 4):
        checkpointer.save(step, state(step), {'position': step})
    checkpointer.wait()
    result['steps'] = checkpointer.steps()

newest = directory / 'step_000000004'
sync_global_devices('saved')
if process == 0:
    for name in ('state/ocdbt.process_1/manifest.ocdbt', 'state/_METADATA'):
        (newest / name).write_bytes((newest / name).read_bytes()[:-1] + b'?')
sync_global_devices('damaged')
result['found'] = [line.split()[0] for line in find_damage(newest, 4, process, 2)]
with Checkpointer(directory, CheckpointConfig(keep_last=2)) as checkpointer:
    restored = checkpointer.restore(abstract)
    result |= {'step': restored.step, 'rejected': restored.rejected, 'position': restored.metadata['position']}
    result['same'] = all(jax.tree.leaves(jax.tree.map(same, restored.state, state(3))))
    # Process 1 has no space for its manifest: neither commits, both hear of it, and the next save works.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if process == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        checkpointer.save(4, state(4), {'position': 4})
        checkpointer.wait()
    except UserError as error:
        result['failure'] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    result['after_failure'] = checkpointer.steps()
    checkpointer.save(5, state(5), {'position': 5})
    checkpointer.wait()
    result['in_the_end'] = checkpointer.steps()
(directory.parent / f'result_{process}.json').write_text(json.dumps(result))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def test_two_processes(tmp_path):
    variables = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
    port, directory = str(free_port()), tmp_path / 'checkpoints'
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PROGRAM, str(process), port, str(directory)],
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    first, second = (json.loads((tmp_path / f'result_{process}.json').read_text()) for process in range(2))

    # Each process checks its own files and hears of all the damage.
    assert first.pop('found') == ['state/_METADATA']
    assert second.pop('found') == ['state/ocdbt.process_1/manifest.ocdbt']
    assert [line.split()[0] for line in first['rejected']] == [
        'step_000000004/state/_METADATA',
        'step_000000004/state/ocdbt.process_1/manifest.ocdbt',
    ]
    # Said once, by process 0.
    assert 'state/ocdbt.process_1/manifest.ocdbt is damaged' in errors[0]
    assert 'damaged' not in errors[1]
    assert 'processes [1] did not write their part' in first.pop('failure')
    assert 'the disk is full' in second.pop('failure')
    assert first == second
    assert first['steps'] == [2, 3, 4]
    assert (first['step'], first['position'], first['same']) == (3, 3, True)
    assert first['after_failure'] == [2, 3]
    assert first['in_the_end'] == [3, 5]

    # One process reads, on eight devices, what two wrote on four.
    files = json.loads((directory / 'step_000000005' / 'manifest_00001.json').read_text())['files']
    assert all('process_1' in name for name in files)
    assert find_damage(directory / 'step_000000005', 5) == []
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    abstract = {
        'parameters': {
            'w': jax.ShapeDtypeStruct((16, 4), np.float32, sharding=NamedSharding(mesh, PartitionSpec('data')))
        },
        'step': jax.ShapeDtypeStruct((), np.int32),
    }
    with Checkpointer(directory, CheckpointConfig()) as checkpointer:
        restored = checkpointer.restore(abstract)
    assert restored.step == 5
    assert (restored.environment['process_count'], restored.environment['collectives']) == (2, 'gloo')
    np.testing.assert_array_equal(restored.state['parameters']['w'], np.arange(64.0).reshape(16, 4) * 5)
