"""One description of a run on a cluster, from which the manifests for every scheduler are made."""

import dataclasses
import math
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of accelerator as schedulers know it.

    Attributes:
        gke: the value of GKE's node label for it. resource: what a container asks Kubernetes for.
        per_host: chips of one host. skypilot: its name there; {} is where a TPU's size goes.
        size_factor: SkyPilot sizes a TPU in chips (1) or in TensorCores (2). tpu_dimensions: of a topology, 0: no TPU.
    """

    gke: str
    resource: str
    per_host: int
    skypilot: str
    size_factor: int = 1
    tpu_dimensions: int = 0


_TPU, _GPU = 'google.com/tpu', 'nvidia.com/gpu'
CHIPS = {
    'v4': Chip('tpu-v4-podslice', _TPU, 4, 'tpu-v4-{}', 2, 3),
    'v5e': Chip('tpu-v5-lite-podslice', _TPU, 4, 'tpu-v5litepod-{}', 1, 2),
    'v5p': Chip('tpu-v5p-slice', _TPU, 4, 'tpu-v5p-{}', 2, 3),
    'v6e': Chip('tpu-v6e-slice', _TPU, 4, 'tpu-v6e-{}', 1, 2),
    'a100': Chip('nvidia-a100-80gb', _GPU, 8, 'A100-80GB:8'),
    'h100': Chip('nvidia-h100-80gb', _GPU, 8, 'H100:8'),
    'cpu': Chip('', '', 0, ''),
}


@dataclasses.dataclass(frozen=True)
class ClusterRun:
    """A run on a cluster.

    Attributes:
        name: of the run for the scheduler: lower-case letters, digits and hyphens.
        arguments: of `python -m llm.main`. The run directory they name, and LLM_CACHE, must be on `shared`.
        chip: one of CHIPS.
        topology: of a TPU slice, as '4x4' or '4x4x8'. slices: how many of them.
        hosts: how many, where the chip is no TPU.
        shared: where the file system that all hosts share is mounted. claim: its PersistentVolumeClaim.
        image: of the container (Kubernetes, SkyPilot).
        setup: shell lines before the run, to make `python` the one that has llm (Slurm, SkyPilot).
        cpus, memory_gb: that each host gives the run (GPUs and CPU); TPU hosts give all.
        hours: after which Slurm ends the job; it starts again where it was.
        partition: Slurm's; None for the default.
        spot: whether SkyPilot takes machines that may be taken away.
        restarts: after the loss of a host, before somebody has to look.
        grace_seconds: between the warning and the end, to save what was done.
        heartbeat_timeout_seconds: after which a silent process counts as lost.
    """

    name: str
    arguments: tuple[str, ...]
    chip: str
    image: str
    topology: str | None = None
    slices: int = 1
    hosts: int | None = None
    shared: str = '/shared'
    claim: str = 'llm-shared'
    setup: str = ''
    cpus: int = 8
    memory_gb: int = 64
    hours: int = 24
    partition: str | None = None
    spot: bool = False
    restarts: int = 20
    grace_seconds: int = 120
    heartbeat_timeout_seconds: int = 100

    def __post_init__(self) -> None:
        if not re.fullmatch(r'[a-z]([a-z0-9-]{0,38}[a-z0-9])?', self.name):
            raise UserError(
                f'name {self.name!r} is not one that Kubernetes takes',
                fix='Use up to 40 lower-case letters, digits and hyphens, a letter first.',
            )
        if self.chip not in CHIPS:
            raise UserError(f'chip {self.chip!r} is not known', fix=f'Use one of {", ".join(CHIPS)}.')
        dimensions = CHIPS[self.chip].tpu_dimensions
        if dimensions:
            pattern = 'x'.join([r'[1-9]\d*'] * dimensions)
            if self.topology is None or not re.fullmatch(pattern, self.topology):
                raise UserError(
                    f'topology {self.topology!r} of {self.chip} has not {dimensions} dimensions',
                    fix=f'Like {"x".join(["4"] * dimensions)}.',
                )
            if self.hosts is not None:
                raise UserError(
                    f'hosts = {self.hosts} beside a topology', fix='The topology says how many: leave it out.'
                )
            if self.num_chips % self.chips_per_host:
                raise UserError(f'topology {self.topology} is not whole hosts of {self.chips_per_host} chips')
        elif self.hosts is None or self.topology is not None or self.slices != 1:
            raise UserError(
                f'{self.chip} needs hosts, and neither topology nor slices', fix='Those are for TPUs: set hosts.'
            )
        numbers = ('slices', 'cpus', 'memory_gb', 'hours', 'grace_seconds', 'heartbeat_timeout_seconds')
        low = [name for name in numbers if getattr(self, name) < 1]
        if low or self.restarts < 0 or (self.hosts is not None and self.hosts < 1):
            raise UserError(f'{", ".join(low) or "restarts or hosts"} is too small', fix='Use at least 1.')
        if not any(argument.startswith('--gin_file=') for argument in self.arguments):
            raise UserError('arguments name no --gin_file')

    @property
    def is_tpu(self) -> bool:
        """Whether JAX finds out by itself which processes there are."""
        return CHIPS[self.chip].tpu_dimensions > 0

    @property
    def num_chips(self) -> int:
        """Of one slice."""
        return math.prod(int(size) for size in (self.topology or '0').split('x'))

    @property
    def chips_per_host(self) -> int:
        """Fewer than the machine has where the slice is a part of one host."""
        per_host = CHIPS[self.chip].per_host
        return min(per_host, self.num_chips) if self.is_tpu else per_host

    @property
    def hosts_per_slice(self) -> int:
        """Hosts of one slice; all hosts where the chip is no TPU."""
        return self.num_chips // self.chips_per_host if self.is_tpu else self.hosts or 1

    def command(self) -> list[str]:
        """What each process runs."""
        timeout = f'--heartbeat_timeout_seconds={self.heartbeat_timeout_seconds}'
        return ['python', '-m', 'llm.main', *self.arguments, timeout]


def read_description(path: Path) -> ClusterRun:
    """The ClusterRun in a YAML file.

    Raises:
        UserError: the file cannot be read, or a field is unknown, missing, or of the wrong type.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f'cannot be read ({" ".join(str(error).split())})', where=str(path)) from error
    fields = {field.name: field for field in dataclasses.fields(ClusterRun)}
    hints = typing.get_type_hints(ClusterRun)
    if not isinstance(content, dict):
        raise UserError('is not a mapping of names to values', where=str(path))
    unknown = sorted(map(str, content.keys() - fields.keys()))
    if unknown:
        raise UserError(f'unknown: {", ".join(unknown)}', where=str(path), fix=f'There are {", ".join(fields)}.')
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in content]
    if missing:
        raise UserError(f'missing: {", ".join(missing)}', where=str(path))
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    for name, value in values.items():
        if not _is_a(value, hints[name]):
            raise UserError(f'{name} = {value!r} is not of type {fields[name].type}', where=str(path))
    try:
        return ClusterRun(**values)
    except UserError as error:
        raise UserError(error.what, where=str(path), fix=error.fix) from error


def _is_a(value: Any, wanted: Any) -> bool:
    if typing.get_origin(wanted) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if typing.get_origin(wanted) in (typing.Union, types.UnionType):
        return any(_is_a(value, choice) for choice in typing.get_args(wanted))
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
