"""A run's own training step, compiled for a topology on this machine's CPU, and what the compiler says of it."""

import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from llm.scaling.planner.run_config import RunConfig
from llm.scaling.planner.topology import Topology
from llm.scaling.program import Program, WeightTraffic, hbm_bytes, read_program, weight_traffic
from llm.training.trainer import Trainer

_SIZES = {'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40, '': 1}
# Both forms of the TPU compiler's complaint; the second leaves out arguments.
_USED = re.compile(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm')
_TEMPORARIES = re.compile(r'HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)')


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
    """Bytes on one device, as the compiler lays them out.

    Attributes:
        arguments: train state and batch. outputs: new train state and metrics. aliased: outputs in the place of
            arguments. temporaries: the most of everything in between that is there at once. code: the program. host:
            temporaries in the memory of the host, no part of the others.
        temp_size: what `memory_analysis()` calls temporaries. The TPU compiler adds to the space that they take part of
            it again, as lost to fragmentation: it makes programs whose temp_size no chip has.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    code: int
    host: int
    temp_size: int

    @property
    def total(self) -> int:
        """What the program holds at its peak."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A training step that compiled.

    Attributes:
        program: its collectives. weights: what it moves of sharded parameters, against the least.
        hbm_bytes: to and from HBM on one device; counted as on a TPU.
        has_kernels: whether it calls hand-written kernels. seconds: that lowering and compiling took.
    """

    memory: CompiledMemory
    program: Program
    weights: WeightTraffic
    hbm_bytes: float
    has_kernels: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """A training step that the compiler refused.

    Attributes:
        needed: bytes on one device that it says the program needs. partial: whether that leaves out the arguments.
        available: that it says there are. seconds: it took. message: its own words.
    """

    needed: float
    partial: bool
    available: float
    seconds: float
    message: str


def abstract_batch(trainer: Trainer, run: RunConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes, types and shardings of a batch of this run."""
    return {
        name: jax.ShapeDtypeStruct(
            (run.step.batch_size, length),
            jnp.float32 if name == 'loss_weights' else jnp.int32,
            sharding=trainer.batch_sharding,
        )
        for name, length in run.row_arrays.items()
    }


def compile_step(run: RunConfig, topology: Topology) -> CompiledStep | OutOfMemory:
    """Compile the training step of `run` for `topology`, which must have devices.

    Raises:
        UserError: mesh, model and batch do not go together.
    """
    trainer = run.trainer(topology)
    start = time.perf_counter()
    lowered = trainer.train_step.lower(trainer.abstract_state, abstract_batch(trainer, run))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        refused = read_refusal(str(error), time.perf_counter() - start)
        if refused is None:
            raise
        return refused
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    program = read_program(text, trainer.mesh)
    return CompiledStep(
        memory=compiled_memory(compiled, topology.platform),
        program=program,
        weights=weight_traffic(
            program,
            trainer.specs,
            trainer.mesh,
            run.rules,
            compute_dtype=run.model.compute_dtype,
            microbatches=run.step.gradient_accumulation,
        ),
        hbm_bytes=hbm_bytes(text),
        has_kernels='custom_call_target="tpu_custom_call"' in text,
        seconds=seconds,
    )


def compiled_memory(compiled: Any, platform: str) -> CompiledMemory:
    """The memory of a `jax.stages.Compiled` on each device of `platform`."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    temporaries = sizes.temp_size_in_bytes
    if platform == 'tpu':  # elsewhere the compiler's peak leaves temporaries out
        temporaries = sizes.peak_memory_in_bytes - sizes.argument_size_in_bytes - results
    return CompiledMemory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        temporaries=temporaries,
        aliased=sizes.alias_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        host=sizes.host_temp_size_in_bytes,
        temp_size=sizes.temp_size_in_bytes,
    )


def read_refusal(message: str, seconds: float) -> OutOfMemory | None:
    """The sizes in a compiler's complaint about memory; None if it complains of something else."""
    if 'RESOURCE_EXHAUSTED' not in message:
        return None
    found = _USED.search(message) or _TEMPORARIES.search(message)
    if found is None:
        return None
    needed, available = (float(found[i]) * _SIZES[found[i + 1]] for i in (1, 3))
    partial = _USED.search(message) is None
    return OutOfMemory(needed, partial, available, seconds, ' '.join(message.split())[:500])
