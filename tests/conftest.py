"""Every test runs on CPU with eight simulated devices; set before anything imports jax."""

import collections
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.compiling import QUICKLY

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Tests compile many small programs and run each once: the compiler's optimisation of machine code does not pay.
os.environ['XLA_FLAGS'] = ' '.join(
    (os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8', '--xla_backend_optimization_level=0')
)
# libtpu is used to compile only; without these it looks for a TPU host, prints noise and lets one process load it.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

# What a property test says does not depend on a clock: a machine with other work draws and runs examples slowly.
hypothesis.settings.register_profile(
    'without a clock', deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile('without a clock')

# PyPI's build of torch brings triton (the CPU build does not). Loaded after TensorFlow its library crashes the process.
if importlib.util.find_spec('triton') is not None:
    importlib.import_module('triton.knobs')


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: a long file that starts last leaves the other processes idle."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker('slow'))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope='session')
def dev_data() -> Path:
    """The folder of real data for development: the environment variable LLM_DEV_DATA, or ../shared/data of the repo."""
    folder = Path(os.environ.get('LLM_DEV_DATA', Path(__file__).parents[2] / 'shared' / 'data'))
    assert folder.is_dir(), f'{folder} is missing: set LLM_DEV_DATA to the folder of real data'
    return folder


@pytest.fixture(scope='module', autouse=True)
def _forget_compiled_programs() -> Iterator[None]:
    """A file's programs are of no use to the next; kept, they fill gigabytes of memory."""
    yield
    if 'jax' in sys.modules:
        sys.modules['jax'].clear_caches()


@pytest.fixture(scope='module')
def compiled_quickly() -> Iterator[None]:
    """Programs of a file that `llm` compiles itself, compiled for the CPU as tests/compiling.py says.

    For files that compare numbers within a tolerance: not for those that hold equal bits on every mesh.
    """
    if 'xla_cpu_use_fusion_emitters' not in QUICKLY:  # this version has no choice
        yield
        return
    from jax._src import compiler

    as_usual = compiler.get_compile_options  # where every program's options are made; JAX has no setting for them

    def get_compile_options(*args: Any, env_options_overrides: Any = None, backend: Any = None, **others: Any) -> Any:
        if backend is not None and backend.platform == 'cpu':
            env_options_overrides = {**QUICKLY, **(env_options_overrides or {})}
        return as_usual(*args, env_options_overrides=env_options_overrides, backend=backend, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, 'get_compile_options', get_compile_options)
        yield
