"""A plan as plain data, for JSON and for the reports that are made from it."""

import dataclasses
import json
from typing import Any

from llm.parallel.mesh import MESH_AXES
from llm.scaling.planner.advice import Advice
from llm.scaling.planner.compiling import CompiledStep, OutOfMemory
from llm.scaling.planner.planning import Plan
from llm.scaling.planner.search import Candidate
from llm.scaling.planner.stacks import remat_of

Record = dict[str, Any]


def plan_record(plan: Plan, advice: Advice | None = None) -> Record:
    """Everything that the reports show; bytes are of one device, seconds of one step."""
    run, topology, roof = plan.run, plan.topology, plan.roofline
    record: Record = {
        'topology': {
            'name': topology.name,
            'chips': topology.num_chips,
            'devices': topology.num_devices,
            'slices': topology.num_slices,
            'memory_per_device': topology.memory_per_device,
            'peak_flops_per_device': topology.peak_flops_per_device,
            'hbm_bandwidth_per_device': topology.hbm_bandwidth_per_device,
            'source': topology.chip.source,
        },
        'run': {
            'parameters': plan.parameters,
            'mesh': {axis: plan.sizes[axis] for axis in MESH_AXES},
            'batch_size': run.step.batch_size,
            'sequence_length': run.step.sequence_length,
            'microbatches': run.step.gradient_accumulation,
            'remat': ' and '.join(dict.fromkeys(kind for kind, _ in remat_of(run.model))),
            'tokens_per_step': run.tokens_per_step,
            'tokens_per_device': plan.tokens_per_device,
        },
        'memory': {
            'needed': plan.needed,
            'available': plan.available,
            'fits': plan.fits,
            'over': max(0.0, plan.needed - plan.available),
            'estimate': {**dataclasses.asdict(plan.estimate), 'temporaries': plan.estimate.temporaries},
        },
        'flops': dataclasses.asdict(plan.flops),
        'roofline': {
            'compute': roof.compute,
            'hbm': roof.hbm,
            'hbm_bytes': plan.hbm_bytes,
            'host': roof.host,
            'host_bytes': plan.host_bytes,
            'asynchronous_links': roof.asynchronous,
            'synchronous_links': roof.exposed,
            'bubble': roof.bubble,
            'step': roof.step,
            'tokens_per_second': plan.tokens_per_second,
            'mfu': roof.mfu,
            'mfu_causal': roof.mfu_causal,
            'bottleneck': roof.bottleneck,
        },
        'collectives': [
            {**dataclasses.asdict(each.traffic), 'seconds': each.seconds, 'exposed_seconds': each.exposed}
            for each in roof.links
        ],
    }
    compiled = plan.compiled
    if isinstance(compiled, CompiledStep):
        record['compiler'] = {
            'memory': {**dataclasses.asdict(compiled.memory), 'total': compiled.memory.total},
            'seconds': compiled.seconds,
            'estimate_error': plan.estimate.peak / compiled.memory.total - 1,
            'weights': {**dataclasses.asdict(compiled.weights), 'ratio': compiled.weights.ratio},
            'loops_of_unknown_length': list(compiled.program.unknown_loops),
        }
    elif isinstance(compiled, OutOfMemory):
        record['compiler'] = {'refused': compiled.message, 'seconds': compiled.seconds}
    if advice is not None:
        record['advice'] = {
            'change': advice.change,
            'needed': advice.needed,
            'slower': advice.slower,
            'run': advice.run.describe(),
        }
    return record


def candidate_record(candidate: Candidate) -> Record:
    """One row of a search."""
    record: Record = {'run': candidate.run.describe(), 'compiled': candidate.is_compiled, 'reason': candidate.reason}
    if candidate.plan is not None:
        roof = candidate.plan.roofline
        record |= {
            'needed': candidate.plan.needed,
            'step': roof.step,
            'mfu_causal': roof.mfu_causal,
            'bottleneck': roof.bottleneck,
        }
    return record


def to_json(plan: Record, candidates: list[Record]) -> str:
    """Both as one JSON object; infinite bandwidths, which JSON has no word for, do not occur in it."""
    return json.dumps({**plan, 'search': candidates}, indent=1, allow_nan=False) + '\n'
