"""What docs/planner.md promises of the memory model, of presets of every kind that docs/planner_memory.csv has."""

import pytest

from llm.scaling.planner.planning import estimate
from llm.scaling.planner.topology import find_topology
from tools import planner_memory_error

COMPILED = planner_memory_error.read(planner_memory_error.COMPILED)
PRESETS = {preset.name: preset for preset in planner_memory_error.PRESETS}


@pytest.mark.tpu_compile  # libtpu describes the topology, and compiles nothing
@pytest.mark.parametrize('name', COMPILED)
def test_estimates_are_near_what_was_compiled(name):
    preset, compiled = PRESETS[name], COMPILED[name]
    found = estimate(preset.run(), find_topology(preset.topology)).estimate
    assert found.arguments == pytest.approx(compiled['arguments'], rel=0.01)
    assert found.peak == pytest.approx(compiled['total'], rel=0.1)
