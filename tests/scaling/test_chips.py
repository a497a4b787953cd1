import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from llm.scaling.chips import CHIPS, device_peak_flops
from llm.scaling.planner.compiling import read_refusal
from llm.scaling.planner.topology import find_topology


def test_every_chip_says_where_its_figures_are_from():
    assert all(len(chip.source) > 20 for chip in CHIPS.values())
    assert all(name == chip.name for name, chip in CHIPS.items())


def test_half_a_chip_has_half_the_peak():
    assert device_peak_flops('TPU v4', 1) == CHIPS['v4'].peak_flops / 2
    assert device_peak_flops('TPU v4', 2) == CHIPS['v4'].peak_flops
    assert device_peak_flops('TPU v99', 1) == 0.0


@pytest.mark.parametrize('chip', [chip for chip in CHIPS.values() if chip.torus_dimensions], ids=lambda chip: chip.name)
def test_links_add_up_to_the_published_figure(chip):
    """In both directions over two ports on each side of the torus, GB/s; v4's page has none."""
    published = {'v5e': 400e9, 'v5p': 1200e9, 'v6e': 800e9, 'tpu7x': 1200e9}
    assert 2 * 2 * chip.torus_dimensions * chip.link_bandwidth == published.get(chip.name, 600e9)


@pytest.mark.tpu_compile
@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_memory_that_a_program_may_use_is_what_the_compiler_says(name):
    topology = find_topology(name)
    x = jax.ShapeDtypeStruct((180_000, 180_000), jnp.float32, sharding=SingleDeviceSharding(topology.devices[0]))
    with pytest.raises(jax.errors.JaxRuntimeError) as refused:
        jax.jit(lambda x: (x @ x).sum()).lower(x).compile()
    found = read_refusal(str(refused.value), seconds=0.0)
    assert found.available == pytest.approx(topology.memory_per_device, rel=1e-3)
    assert found.needed > 4 * 180_000**2 > found.available
