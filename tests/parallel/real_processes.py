"""Real processes on this machine, each under its supervisor, as `llm.main` starts them."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What llm.main does, around a few lines instead of a job.
PROGRAM = """
import os, sys, time
from pathlib import Path
from llm.errors import UserError
from llm.parallel import processes, supervision

found = processes.find_processes(heartbeat_timeout_seconds={heartbeat}, initialization_timeout_seconds={start})
if not supervision.is_supervised():
    sys.exit(supervision.supervise([sys.executable, *sys.orig_argv[1:]], found))
try:
    exec(compile({lines!r}, 'lines', 'exec'))
    code = 0
except UserError as error:
    print(f'error: {{error}}', file=sys.stderr)
    code = 2
except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    code = 130
if code:
    processes.leave_at_once(code)
sys.exit(code)
"""


@contextlib.contextmanager
def free_port(*, keep: bool = False) -> Iterator[int]:
    """A port that is free when this begins; `keep` listens on it, so that nobody else can."""
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(('::', 0))
        port = listener.getsockname()[1]
        if keep:
            listener.listen()
            yield port
            return
    yield port


def variables(devices: int = 1) -> dict[str, str]:
    """The environment of a process with so many simulated devices and few threads."""
    flags = f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0'
    return os.environ | {'XLA_FLAGS': flags, 'NPROC': '2', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}


def run_processes(
    count: int,
    lines: str,
    *arguments: str,
    codes: list[int | None],
    heartbeat: int = 60,
    start: int = 120,
    port: int = 0,
) -> list[str]:
    """Run `lines`, which find `found`, `processes` and `UserError`, in `count` processes of one device each.

    Returns:
        What each wrote on standard error, after its exit code was found to be that in `codes` (None: any).
    """
    with free_port() as free:
        program = PROGRAM.format(lines=lines, heartbeat=heartbeat, start=start)
        children = [
            subprocess.Popen(
                [sys.executable, '-c', program, *arguments],
                env=variables()
                | {
                    'JAX_COORDINATOR_ADDRESS': f'localhost:{port or free}',
                    'JAX_NUM_PROCESSES': str(count),
                    'JAX_PROCESS_ID': str(process),
                },
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(count)
        ]
        outputs = [child.communicate(timeout=300)[1] for child in children]
    for child, code, output in zip(children, codes, outputs, strict=True):
        assert code is None or child.returncode == code, (child.returncode, output)
    return outputs
