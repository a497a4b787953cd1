"""What a run's bits depend on besides its config: recorded with the run, compared when it is resumed."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
# What XLA's CPU thread pool and linear algebra libraries read.
_THREAD_VARIABLES = ('NPROC', 'PJRT_NPROC', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')
# Same values here, same bits; the rest is recorded for people. One mesh gives the same on any number of processes.
_DECIDES_BITS = (
    *('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'numpy'),
    *('platform', 'device_kind', 'device_count', 'cpu_model', 'threads', 'thread_variables'),
    *('collectives', 'mesh', 'xla_flags', 'x64', 'matmul_precision', 'git_commit', 'git_dirty'),
)


def environment(mesh: Mapping[str, int] | None = None) -> dict[str, Any]:
    """What this process runs on, as JSON values.

    Args:
        mesh: size of each mesh axis, as in `jax.sharding.Mesh.shape`.

    Returns:
        Versions of Python and the packages that compute (None: not installed), platform, kind and number of devices,
        number of processes, CPU model, number of threads and the variables that set it, collectives backend of CPU
        meshes, mesh, XLA flags, x64 mode and matmul precision, commit of the code and whether it was changed since.
    """
    device = jax.devices()[0]
    settings: Any = jax.config  # its attributes are made at run time
    return {
        'python': platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        'platform': device.platform,
        'device_kind': device.device_kind,
        'device_count': jax.device_count(),
        'process_count': jax.process_count(),
        'cpu_model': cpu_model(),
        'threads': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'thread_variables': {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ},
        'collectives': _collectives(settings),
        'mesh': dict(mesh or {}),
        'xla_flags': sorted(os.environ.get('XLA_FLAGS', '').split()),
        'x64': bool(settings.jax_enable_x64),
        'matmul_precision': settings.jax_default_matmul_precision,
        **dict(zip(('git_commit', 'git_dirty'), _git(Path(__file__).resolve().parents[1]), strict=True)),
    }


def warn_about_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each difference between two environments after which a resumed run may not give the same bits.

    Empty when the promise holds: same jaxlib, CPU type, thread count, mesh and collectives backend, and the same code.
    """
    return [
        f'{name} was {old.get(name)!r}, is {new.get(name)!r}'
        for name in _DECIDES_BITS
        # What an older version of this file did not record is not known to have changed.
        if name in old and old[name] != new.get(name)
    ]


@functools.cache
def cpu_model() -> str:
    """The processor's name, as /proc/cpuinfo or the platform gives it, with the architecture."""
    fields: dict[str, str] = {}
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            for line in file:
                key, _, value = line.partition(':')
                fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    # ARM has no 'model name'; implementer and part are what tell the cores apart.
    arm = ' '.join(fields[key] for key in ('CPU implementer', 'CPU part') if key in fields)
    return f'{fields.get("model name") or arm or platform.processor()} ({platform.machine()})'.strip()


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _collectives(settings: Any) -> str:
    if jax.default_backend() != 'cpu':
        return jax.default_backend()
    # CPU devices of a process that started alone exchange through memory; those of joined ones, be it only one, through
    # this library.
    return str(settings.jax_cpu_collectives_implementation) if jax.distributed.is_initialized() else 'in-process'


@functools.cache
def _git(directory: Path) -> tuple[str | None, bool | None]:
    """The commit that `directory` is at and whether tracked files differ from it; None where it is not in git."""

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(directory), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout

    try:
        # An installed copy inside somebody's unrelated repository (site-packages in .venv) is not in git.
        if not git('ls-files', str(Path(__file__).resolve())).strip():
            return None, None
        return git('rev-parse', 'HEAD').strip(), bool(git('status', '--porcelain', '--untracked-files=no').strip())
    except (OSError, subprocess.SubprocessError):
        return None, None
