"""Published figures of the chips that runs are planned for and measured against.

A figure is of a whole chip, as its maker states it. A jax device may be a part of a chip: see `Chip.share`.
"""

import dataclasses
import re

_MIB, _GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        name: as in topology names, 'v5e'. device_kind: jax's name of it, '' for what is planned by figures alone.
        cores: of a chip; a jax device has `num_cores` of them.
        peak_flops: dense bf16 FLOP/s.
        hbm_bytes: capacity. reserved_bytes: of a device, what XLA keeps for itself: the capacity less what its compiler
            says is available.
        hbm_bandwidth: bytes/s.
        vmem_bytes: of on-chip memory that XLA places arrays in (figures of jax.experimental.pallas.tpu.get_tpu_info).
        link_bandwidth: bytes/s of one link in one direction; a TPU has one link each way in every direction of its
            torus, a GPU one to the switch of its node.
        torus_dimensions: of the links between chips; 0 for a switch. wraps: multiple of which a side of the torus must
            be for its ends to be joined.
        host_bandwidth: bytes/s of a chip to the memory of its host, or from it.
        network_bandwidth: bytes/s and chip over the data-center network, between slices or nodes.
        pod_chips: of the largest slice; 0 for GPUs, whose nodes are not counted.
        source: where the figures are from.
    """

    name: str
    device_kind: str
    cores: int
    peak_flops: float
    hbm_bytes: float
    reserved_bytes: float
    hbm_bandwidth: float
    vmem_bytes: int
    link_bandwidth: float
    torus_dimensions: int
    wraps: int
    host_bandwidth: float
    network_bandwidth: float
    pod_chips: int
    source: str

    def share(self, num_cores: int) -> float:
        """Part of the chip that a device of `num_cores` cores is: 0.5 on tpu7x, where libtpu has two devices a chip."""
        return num_cores / self.cores


# Where a page gives the bidirectional bandwidth of all links of a chip, a link's is that over twice the ports.
_DOCS = 'https://cloud.google.com/tpu/docs'
# PCIe of a v4, each way: Austin et al. 2025, "How to Scale Your Model", chapter 2. None is published for later TPUs,
# and the same is assumed.
_TPU_HOST_BANDWIDTH = 16e9
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name='v4',
            device_kind='TPU v4',
            cores=2,
            peak_flops=275e12,
            hbm_bytes=32 * _GIB,
            reserved_bytes=1.25 * _GIB,
            hbm_bandwidth=1200e9,
            vmem_bytes=160 * _MIB,  # 128 of them the CMEM of Jouppi et al. 2023
            link_bandwidth=50e9,
            torus_dimensions=3,
            wraps=4,
            host_bandwidth=_TPU_HOST_BANDWIDTH,
            network_bandwidth=6.25e9,
            pod_chips=4096,
            source=f'{_DOCS}/v4; links: Jouppi et al. 2023, "TPU v4", table 4; network: as v5p, none is published',
        ),
        Chip(
            name='v5e',
            device_kind='TPU v5 lite',
            cores=1,
            peak_flops=197e12,
            hbm_bytes=16 * _GIB,
            reserved_bytes=0.25 * _GIB,
            hbm_bandwidth=819e9,
            vmem_bytes=128 * _MIB,
            link_bandwidth=50e9,
            torus_dimensions=2,
            wraps=16,
            host_bandwidth=_TPU_HOST_BANDWIDTH,
            network_bandwidth=3.125e9,
            pod_chips=256,
            source=f'{_DOCS}/v5e: 400 GB/s both ways over 4 ports, 6.4 Tb/s of network for 256 chips',
        ),
        Chip(
            name='v5p',
            device_kind='TPU v5',
            cores=2,
            peak_flops=459e12,
            hbm_bytes=95.74 * _GIB,  # what the compiler says; the page has 95
            reserved_bytes=0.0,
            hbm_bandwidth=2765e9,
            vmem_bytes=128 * _MIB,
            link_bandwidth=100e9,
            torus_dimensions=3,
            wraps=4,
            host_bandwidth=_TPU_HOST_BANDWIDTH,
            network_bandwidth=6.25e9,
            pod_chips=6144,
            source=f'{_DOCS}/v5p: 1,200 GB/s both ways over 6 ports, 50 Gb/s of network a chip',
        ),
        Chip(
            name='v6e',
            device_kind='TPU v6 lite',
            cores=1,
            peak_flops=918e12,
            hbm_bytes=32 * _GIB,
            reserved_bytes=0.75 * _GIB,
            hbm_bandwidth=1638e9,
            vmem_bytes=128 * _MIB,
            link_bandwidth=100e9,
            torus_dimensions=2,
            wraps=16,
            host_bandwidth=_TPU_HOST_BANDWIDTH,
            network_bandwidth=12.5e9,
            pod_chips=256,
            source=f'{_DOCS}/v6e and {_DOCS}/tpu7x: 800 GB/s both ways over 4 ports, 100 Gb/s of network a chip',
        ),
        Chip(
            name='tpu7x',
            device_kind='TPU7x',
            cores=2,
            peak_flops=2307e12,
            hbm_bytes=192 * _GIB,
            reserved_bytes=1.25 * _GIB,
            hbm_bandwidth=7380e9,
            vmem_bytes=128 * _MIB,
            link_bandwidth=100e9,
            torus_dimensions=3,
            wraps=4,
            host_bandwidth=_TPU_HOST_BANDWIDTH,
            network_bandwidth=12.5e9,
            pod_chips=9216,
            source=f'{_DOCS}/tpu7x: 1,200 GB/s both ways over 6 ports, 100 Gb/s of network a chip',
        ),
        Chip(
            name='a100',
            device_kind='',
            cores=1,
            peak_flops=312e12,
            hbm_bytes=80e9,
            reserved_bytes=0.0,
            hbm_bandwidth=2039e9,
            vmem_bytes=0,
            link_bandwidth=300e9,
            torus_dimensions=0,
            wraps=0,
            host_bandwidth=32e9,
            network_bandwidth=25e9,
            pod_chips=0,
            source='NVIDIA A100 80GB SXM data sheet: 600 GB/s of NVLink, 64 of PCIe both ways; DGX A100: 200 Gb/s',
        ),
        Chip(
            name='h100',
            device_kind='',
            cores=1,
            peak_flops=989e12,
            hbm_bytes=80e9,
            reserved_bytes=0.0,
            hbm_bandwidth=3350e9,
            vmem_bytes=0,
            link_bandwidth=450e9,
            torus_dimensions=0,
            wraps=0,
            host_bandwidth=64e9,
            network_bandwidth=50e9,
            pod_chips=0,
            source="NVIDIA H100 SXM data sheet: 900 GB/s of NVLink, 128 of PCIe both ways; DGX H100's 400 Gb/s port",
        ),
        Chip(
            name='h200',
            device_kind='',
            cores=1,
            peak_flops=989e12,
            hbm_bytes=141e9,
            reserved_bytes=0.0,
            hbm_bandwidth=4800e9,
            vmem_bytes=0,
            link_bandwidth=450e9,
            torus_dimensions=0,
            wraps=0,
            host_bandwidth=64e9,
            network_bandwidth=50e9,
            pod_chips=0,
            source="NVIDIA H200 SXM data sheet: 900 GB/s of NVLink, 128 of PCIe both ways; DGX H200's 400 Gb/s port",
        ),
    )
}

# Peak dense bf16 FLOP/s and cores of TPU chips that nothing is planned for. Source: cloud.google.com/tpu/docs/v2, v3.
_OLDER_TPUS = {'TPU v2': (45e12, 2), 'TPU v3': (123e12, 2)}

# Peak dense bf16 FLOP/s of a GPU; the first pattern found in device_kind counts. Source: NVIDIA's data sheets of A100,
# H100 and H200, whose figures for the Hopper cards are with sparsity, twice the dense ones.
_GPU_KINDS = (
    (r'\bMIG\b', 0.0),  # a slice of a card
    (r'\bA100\b', CHIPS['a100'].peak_flops),
    (r'\bH100 PCIe\b', 756e12),
    (r'\bH[12]00 NVL\b', 835e12),
    (r'\bG?H[12]00\b', CHIPS['h100'].peak_flops),
)


def device_peak_flops(device_kind: str, num_cores: int) -> float:
    """Peak dense bf16 FLOP/s of a jax device; 0.0 if its kind is not known.

    Args:
        num_cores: of the device, read for TPUs only.
    """
    for chip in CHIPS.values():
        if device_kind == chip.device_kind:
            return chip.peak_flops * chip.share(num_cores)
    if device_kind in _OLDER_TPUS:
        peak, cores = _OLDER_TPUS[device_kind]
        return peak * num_cores / cores
    return next((peak for pattern, peak in _GPU_KINDS if re.search(pattern, device_kind)), 0.0)
