import dataclasses

import pytest

from llm.parallel.mesh import MeshConfig
from llm.scaling.planner.roofline import on_network, roofline
from llm.scaling.planner.topology import find_topology
from llm.scaling.planner.work import StepFlops
from llm.scaling.program import Traffic

H100 = find_topology('h100:8x4')  # 32 of 989e12 FLOP/s, 3350e9 B/s of HBM, 450e9 and 50e9 B/s of links
FLOPS = StepFlops(model=32 * 0.5 * 989e12, model_causal=32 * 0.4 * 989e12, hardware=989e12, recomputed=0.0)


def times(*traffic, flops=FLOPS, hbm=0.0, mesh=MeshConfig(data=1, fsdp=4, tensor=8), **options):
    return roofline(flops, hbm, traffic, H100, H100.links(mesh), **options)


def row(kind, axes, link_bytes, beside=0.0, across=False):
    return Traffic(kind, axes, across, 1, link_bytes, link_bytes, beside)


def test_compute_alone():
    found = times()
    assert (found.compute, found.step, found.bottleneck) == (1.0, 1.0, 'compute')
    assert (found.mfu, found.mfu_causal) == (pytest.approx(0.5), pytest.approx(0.4))


def test_the_longer_of_compute_and_hbm_counts():
    found = times(hbm=2 * 3350e9)
    assert (found.hbm, found.step, found.bottleneck) == (2.0, 2.0, 'HBM')
    assert found.mfu == pytest.approx(0.25)


def test_transfers_to_the_host_run_beside_other_work():
    hidden, slow = times(host_bytes=32e9), times(host_bytes=128e9)
    assert (hidden.host, hidden.step, hidden.bottleneck) == (0.5, 1.0, 'compute')
    assert (slow.host, slow.step, slow.bottleneck) == (2.0, 2.0, 'the host')


def test_asynchronous_links_hide_behind_compute_and_others_add_up():
    hidden = times(row('all-gather', ('tensor',), 450e9 / 2, beside=450e9 / 2))
    assert (hidden.asynchronous, hidden.exposed, hidden.step) == (0.5, 0.0, 1.0)
    exposed = times(row('all-reduce', ('tensor',), 450e9 / 2))
    assert (exposed.exposed, exposed.step) == (0.5, 1.5)
    longer = times(row('all-gather', ('fsdp',), 3 * 50e9, beside=3 * 50e9, across=True))
    assert (longer.step, longer.bottleneck) == (3.0, 'all-gather between slices')


def test_all_to_all_travels_through_others():
    near = times(row('all-to-all', ('fsdp',), 450e9))
    far = times(row('all-to-all', ('tensor',), 450e9))
    assert (near.exposed, far.exposed) == (1.0, 2.0)  # rings of 4 and of 8


def test_bubble_of_a_pipeline():
    found = times(mesh=MeshConfig(data=1, fsdp=8, pipeline=4), idle=0.2)
    assert found.step == pytest.approx(1.25) and found.bubble == pytest.approx(0.25)


def test_a_sum_over_nodes_is_within_them_first():
    links = H100.links(MeshConfig(data=32))
    within, between = on_network([Traffic('all-reduce', ('data',), False, 1, 800.0, 1550.0, 0.0)], links)
    assert (within.across_slices, within.payload, within.link_bytes) == (False, 800.0, 2 * 7 / 8 * 800)
    assert (between.across_slices, between.payload, between.link_bytes) == (True, 100.0, 2 * 3 / 4 * 100)


def test_all_axes_within_a_node_stay_as_they_are():
    links = H100.links(MeshConfig(data=1, fsdp=4, tensor=8))
    given = Traffic('all-reduce', ('tensor',), False, 1, 800.0, 1400.0, 0.0)
    assert on_network([given], links) == (dataclasses.replace(given),)
