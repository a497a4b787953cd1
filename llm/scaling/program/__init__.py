"""What a compiled program does, read from its optimized HLO text: collectives, their bytes and mesh axes, loops."""

from llm.scaling.program.collectives import Collective, Program, Traffic, read_program
from llm.scaling.program.hbm_traffic import hbm_bytes
from llm.scaling.program.weight_traffic import WeightTraffic, weight_traffic

__all__ = ['Collective', 'Program', 'Traffic', 'WeightTraffic', 'hbm_bytes', 'read_program', 'weight_traffic']
