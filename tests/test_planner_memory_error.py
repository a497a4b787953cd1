"""What docs/planner.md promises of the memory model, of presets of every kind that docs/planner_memory.csv has."""

import pytest

from llm.scaling.planner.planning import estimate
from llm.scaling.planner.topology import find_topology
from tools import planner_memory_error

COMPILED = planner_memory_error.read(planner_memory_error.COMPILED)


@pytest.mark.tpu_compile  # which only names the topology here, and compiles nothing
@pytest.mark.parametrize('preset', planner_memory_error.PRESETS, ids=lambda preset: preset.name)
def test_estimates_are_near_what_was_compiled(preset):
    compiled = COMPILED[preset.name]
    found = estimate(preset.run(), find_topology(preset.topology)).estimate
    assert found.arguments == pytest.approx(compiled['arguments'], rel=0.01)
    assert found.peak == pytest.approx(compiled['total'], rel=0.12)
