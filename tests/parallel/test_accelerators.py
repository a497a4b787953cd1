import os
import subprocess
import sys

import pytest

from llm.parallel.accelerators import skip_absent_tpu


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a machine of these PCI vendors and device files, and gives JAX_PLATFORMS as it is left there."""
    monkeypatch.delenv('JAX_PLATFORMS', raising=False)

    def machine(vendors=(), files=()):
        for number, vendor in enumerate(vendors):
            (tmp_path / 'pci' / str(number)).mkdir(parents=True)
            (tmp_path / 'pci' / str(number) / 'vendor').write_text(vendor + '\n')
        for name in files:
            (tmp_path / name).touch()
        skip_absent_tpu(tmp_path / 'pci', tmp_path)
        return os.environ.get('JAX_PLATFORMS')

    yield machine
    os.environ.pop('JAX_PLATFORMS', None)


@pytest.mark.parametrize(
    ('vendors', 'files', 'expected'),
    [
        ((), (), 'cpu'),
        (('0x8086', '0x10de'), (), 'cpu'),
        (('0x8086', '0x1ae0'), (), None),
        ((), ('nvidia0',), None),
        ((), ('kfd',), None),
    ],
)
def test_the_cpu_is_chosen_where_there_is_nothing_else(machine, vendors, files, expected):
    assert machine(vendors, files) == expected


def test_what_the_user_says_stays(machine, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
    assert machine() == 'tpu'


def test_jax_starts_in_silence_beside_libtpu(tmp_path):
    code = (
        'import pathlib; from llm.parallel.accelerators import skip_absent_tpu; '
        'skip_absent_tpu(pathlib.Path("none"), pathlib.Path("none")); import jax; print(jax.devices()[0].platform)'
    )
    environment = {name: value for name, value in os.environ.items() if name not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment)
    assert (run.stdout, run.stderr) == ('cpu\n', '')
