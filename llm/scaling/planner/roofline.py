"""How long a step takes at the least: compute, HBM and links, each at its published rate (Williams et al. 2009).

Compute, HBM traffic and asynchronous collectives run beside each other, so the longest of them counts; synchronous
collectives stop everything and are added. No kernel reaches a chip's peak: what is predicted is a bound, and the share
of the peak that is predicted (MFU) is the most that the run's layout allows.
"""

import dataclasses
from collections.abc import Sequence

from llm.scaling.planner.topology import Links, Topology
from llm.scaling.planner.work import StepFlops
from llm.scaling.program import Traffic
from llm.scaling.program.collectives import RING_FACTORS


@dataclasses.dataclass(frozen=True)
class LinkTime:
    """Collectives of one kind along the same axes, and the seconds they take.

    Attributes:
        bandwidth: bytes/s of a device along these axes. seconds: of all. exposed: of the synchronous ones.
    """

    traffic: Traffic
    bandwidth: float
    seconds: float
    exposed: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step on one device.

    Attributes:
        compute: of hardware FLOPs at the peak. hbm: of bytes at the peak bandwidth. host: of bytes to and from the
            host. links: of each row of traffic.
        bubble: of waiting for other stages of a pipeline.
        step: predicted. mfu, mfu_causal: of the step, in both conventions for attention.
        bottleneck: what a faster step needs first: 'compute', 'HBM', 'the host', 'all-gather over fsdp' and so on.
    """

    compute: float
    hbm: float
    host: float
    links: tuple[LinkTime, ...]
    bubble: float
    step: float
    mfu: float
    mfu_causal: float
    bottleneck: str

    @property
    def asynchronous(self) -> float:
        """Seconds of collectives that run beside other work."""
        return sum(each.seconds - each.exposed for each in self.links)

    @property
    def exposed(self) -> float:
        """Seconds of collectives that other work waits for."""
        return sum(each.exposed for each in self.links)


def roofline(
    flops: StepFlops,
    hbm_bytes: float,
    traffic: Sequence[Traffic],
    topology: Topology,
    links: Links,
    *,
    host_bytes: float = 0.0,
    idle: float = 0.0,
) -> Roofline:
    """Times of a step whose work on one device is given.

    Args:
        hbm_bytes: to and from HBM. traffic: what the device sends. host_bytes: to and from the memory of the host, one
            way after the other: forward, then backward.
        idle: share of the step in which a stage of the pipeline waits for others.
    """
    compute = flops.hardware / topology.peak_flops_per_device
    hbm = hbm_bytes / topology.hbm_bandwidth_per_device
    host = host_bytes / topology.host_bandwidth_per_device
    times = tuple(_link_time(row, links) for row in traffic)
    beside = sum(each.seconds - each.exposed for each in times)
    exposed = sum(each.exposed for each in times)
    busy = max(compute, hbm, host, beside) + exposed
    step = busy / (1 - idle)
    peak = topology.peak_flops_per_device * topology.num_devices
    return Roofline(
        compute=compute,
        hbm=hbm,
        host=host,
        links=times,
        bubble=step - busy,
        step=step,
        mfu=flops.model / step / peak,
        mfu_causal=flops.model_causal / step / peak,
        bottleneck=_bottleneck(compute, hbm, host, times, step - busy),
    )


def on_network(traffic: Sequence[Traffic], links: Links) -> tuple[Traffic, ...]:
    """Rows of an analytic model with their part between slices or nodes apart.

    A collective that leaves a slice first runs within it, and what then goes over the network is a device's share.
    """
    rows = []
    for row in traffic:
        outer = links.network_ways(row.axes)
        inner = links.ways(row.axes) // outer
        parts = [(inner, row.payload, False), (outer, row.payload / inner, True)]
        for ways, payload, across in parts:
            if ways > 1:
                sent = payload * RING_FACTORS[row.kind](ways)
                beside = sent * row.asynchronous_link_bytes / row.link_bytes
                rows.append(
                    dataclasses.replace(
                        row, across_slices=across, payload=payload, link_bytes=sent, asynchronous_link_bytes=beside
                    )
                )
    return tuple(rows)


def _link_time(row: Traffic, links: Links) -> LinkTime:
    bandwidth = links.along(row.axes, across_slices=row.across_slices)
    seconds = row.link_bytes / bandwidth
    if row.kind == 'all-to-all':
        # On a ring of n what a device sends travels n / 4 links on average.
        seconds *= max(1.0, links.ways(row.axes) / 4)
    share = row.asynchronous_link_bytes / row.link_bytes if row.link_bytes else 0.0
    return LinkTime(row, bandwidth, seconds, seconds * (1 - share))


def _bottleneck(compute: float, hbm: float, host: float, times: Sequence[LinkTime], bubble: float) -> str:
    parts = {'compute': compute, 'HBM': hbm, 'the host': host, 'the pipeline bubble': bubble}
    for each in times:
        where = 'between slices' if each.traffic.across_slices else 'over ' + ', '.join(each.traffic.axes)
        name = f'{each.traffic.kind} {where}'
        parts[name] = parts.get(name, 0.0) + each.seconds
    return max(parts, key=lambda name: parts[name])
