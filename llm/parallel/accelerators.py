"""What JAX need not look for, decided before it starts."""

import importlib.util
import os
from pathlib import Path

_GOOGLE = '0x1ae0'  # vendor of a TPU on the PCI bus
_GPUS = ('nvidia0', 'nvidiactl', 'dxg', 'kfd')  # under /dev: NVIDIA's, also in containers and WSL 2; AMD's


def has_tpu(devices: Path = Path('/sys/bus/pci/devices')) -> bool:
    """Whether a TPU is on the PCI bus, whose devices each have a file `vendor`."""
    return any(path.read_text().strip() == _GOOGLE for path in devices.glob('*/vendor'))


def skip_absent_tpu(devices: Path = Path('/sys/bus/pci/devices'), dev: Path = Path('/dev')) -> None:
    """Keep JAX to the CPU where libtpu is installed without a TPU or GPU; JAX_PLATFORMS, if set, has the last word.

    The test extra brings libtpu, to compile for TPUs. JAX would load it, find no TPU, and print
    errors about that. The signs are the ones that JAX itself goes by. To be called before JAX is imported.

    Args:
        devices: of the PCI bus, each with a file `vendor`. dev: where device files are.
    """
    if 'JAX_PLATFORMS' in os.environ or importlib.util.find_spec('libtpu') is None:
        return
    if has_tpu(devices):
        return
    if not any((dev / name).exists() for name in _GPUS):
        os.environ['JAX_PLATFORMS'] = 'cpu'
