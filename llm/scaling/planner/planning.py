"""One run on one topology: memory, work and time, from the compiler where there is one, else from the models."""

import dataclasses

from llm.errors import UserError
from llm.scaling.accounting import TrainingMemory, count
from llm.scaling.planner.abstract import Placement, model_specs, state_bytes
from llm.scaling.planner.compiling import CompiledStep, OutOfMemory, compile_step
from llm.scaling.planner.memory import MemoryEstimate, estimate_memory
from llm.scaling.planner.pipelines import idle_share
from llm.scaling.planner.roofline import Roofline, on_network, roofline
from llm.scaling.planner.run_config import RunConfig
from llm.scaling.planner.topology import Topology
from llm.scaling.planner.work import StepFlops, step_flops, step_hbm_bytes, step_host_bytes, step_traffic


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run before it is started.

    Attributes:
        run: with every size of its mesh written out. parameters: of the model.
        state: bytes of the train state on one device. estimate: the analytic model of memory.
        compiled: what the compiler says; None where nothing was compiled.
        hbm_bytes: to and from HBM in a step on one device. host_bytes: to and from the memory of the host.
        flops, roofline: of one step.
    """

    run: RunConfig
    topology: Topology
    sizes: dict[str, int]
    parameters: int
    state: TrainingMemory
    estimate: MemoryEstimate
    compiled: CompiledStep | OutOfMemory | None
    flops: StepFlops
    hbm_bytes: float
    host_bytes: float
    roofline: Roofline

    @property
    def needed(self) -> float:
        """Bytes on one device at the peak: the compiler's figure, else the estimate."""
        if isinstance(self.compiled, CompiledStep):
            return self.compiled.memory.total
        if isinstance(self.compiled, OutOfMemory):
            # Some of its messages leave out the arguments.
            return max(self.compiled.needed, self.estimate.peak if self.compiled.partial else 0.0)
        return self.estimate.peak

    @property
    def available(self) -> float:
        """Bytes that a program may use on one device."""
        return self.topology.memory_per_device

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return not isinstance(self.compiled, OutOfMemory) and self.needed <= self.available

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, as predicted."""
        return self.run.tokens_per_step / self.roofline.step

    @property
    def tokens_per_device(self) -> float:
        """Of one step."""
        return self.run.tokens_per_step / self.topology.num_devices


def estimate(run: RunConfig, topology: Topology) -> Plan:
    """A plan by the analytic models alone.

    Raises:
        UserError: mesh, model, batch and topology do not go together.
    """
    return _plan(run, topology, None)


def plan(run: RunConfig, topology: Topology) -> Plan:
    """A plan by the compiler, or by the analytic models where there is none for this topology.

    Raises:
        UserError: mesh, model, batch and topology do not go together.
    """
    return _plan(run, topology, compile_step(run, topology) if topology.compiles else None)


def _plan(run: RunConfig, topology: Topology, compiled: CompiledStep | OutOfMemory | None) -> Plan:
    sizes = topology.sizes(run.mesh)
    run = run.fixed(sizes)
    placement = Placement.of(sizes, run.rules)
    _check_batch(run, placement)
    flops = step_flops(run, sizes, topology.platform)
    links = topology.links(run.mesh)
    traffic = on_network(step_traffic(run, sizes, topology.platform), links)
    hbm = step_hbm_bytes(run, sizes, topology.platform)
    host = step_host_bytes(run, sizes, topology.platform)
    if isinstance(compiled, CompiledStep):
        traffic, hbm = compiled.program.traffic(), compiled.hbm_bytes
    return Plan(
        run=run,
        topology=topology,
        sizes=sizes,
        parameters=count(run.model, model_specs(run.model)).total,
        state=state_bytes(run.model, run.optimizer, placement, topology.platform),
        estimate=estimate_memory(run, sizes, topology.platform, topology.on_chip_memory),
        compiled=compiled,
        flops=flops,
        hbm_bytes=hbm,
        host_bytes=host,
        roofline=roofline(
            flops,
            hbm,
            traffic,
            topology,
            links,
            host_bytes=host,
            idle=idle_share(run, placement),
        ),
    )


def _check_batch(run: RunConfig, placement: Placement) -> None:
    rows, ways = run.step.batch_size // run.step.gradient_accumulation, placement.ways('batch')
    if rows % ways:
        raise UserError(
            f'{rows} rows (batch_size / gradient_accumulation) cannot be divided over {ways} devices',
            where='StepConfig.batch_size',
            fix=f'Make it a multiple of {ways} times gradient_accumulation, or change the mesh.',
        )
