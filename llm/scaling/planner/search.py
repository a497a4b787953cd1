"""Meshes, schedules, microbatches and remat policies tried by the analytic models, the best compiled, all ranked."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import get_args

import jax

from llm.errors import UserError
from llm.models.remat import LAYER_INPUT, RematKind
from llm.parallel.mesh import MESH_AXES
from llm.parallel.pipeline.schedules import PipelineConfig, ScheduleKind
from llm.scaling.planner.compiling import CompiledStep
from llm.scaling.planner.planning import Plan, estimate, plan
from llm.scaling.planner.quantities import byte_size
from llm.scaling.planner.run_config import RunConfig
from llm.scaling.planner.stacks import with_remat
from llm.scaling.planner.topology import Topology


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What is tried.

    Attributes:
        axes: mesh axes whose sizes are tried; the others stay as the run has them.
        remats: policies of llm.models.remat; what 'offload' moves is the inputs of layers. microbatches: values of
            gradient_accumulation.
        schedules: of pipelines, tried where `pipeline` is among the axes and is more than 1. chunks: of 'interleaved'.
        compile_best: how many of the fastest that should fit are compiled; 0 for none.
        margin: part of the memory that the analytic model must leave free for a candidate to be compiled.
    """

    axes: tuple[str, ...] = ('data', 'fsdp', 'tensor')
    remats: tuple[RematKind, ...] = ('none', 'dots_no_batch', 'full')
    microbatches: tuple[int, ...] = (1, 2, 4, 8)
    schedules: tuple[ScheduleKind, ...] = get_args(ScheduleKind)
    chunks: tuple[int, ...] = (2,)
    compile_best: int = 3
    margin: float = 0.0

    def __post_init__(self) -> None:
        if unknown := set(self.axes) - set(MESH_AXES):
            raise UserError(
                f'axes has {sorted(unknown)}', where='SearchConfig', fix=f'Use some of {", ".join(MESH_AXES)}.'
            )
        for name in ('axes', 'remats', 'microbatches', 'schedules', 'chunks'):
            if not getattr(self, name):
                raise UserError(f'{name} is empty', where='SearchConfig', fix='Give at least one.')
        self.pipelines()  # says what is wrong with a schedule or a number of chunks
        if min(self.microbatches) < 1:
            raise UserError('microbatches has a value below 1', where='SearchConfig', fix='Use at least 1.')
        if self.compile_best < 0 or not 0 <= self.margin < 1:
            raise UserError(
                f'compile_best is {self.compile_best} and margin is {self.margin}',
                where='SearchConfig',
                fix='Use at least 0, and a margin in [0, 1).',
            )

    def pipelines(self) -> list[PipelineConfig]:
        """Every schedule, with every number of chunks if it has some.

        Raises:
            UserError: there is no such schedule, or none with so many chunks.
        """
        return [
            PipelineConfig(schedule, chunks)
            for schedule in self.schedules
            for chunks in (self.chunks if schedule == 'interleaved' else (1,))
        ]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run, and what became of it.

    Attributes:
        run: the config, with every size of its mesh. plan: None if it is impossible.
        reason: why it did not win; '' for the winner.
    """

    run: RunConfig
    plan: Plan | None
    reason: str

    @property
    def is_compiled(self) -> bool:
        """Whether the figures are the compiler's."""
        return self.plan is not None and self.plan.compiled is not None


def search(
    run: RunConfig, topology: Topology, config: SearchConfig, *, say: Callable[[str], None] = lambda text: None
) -> list[Candidate]:
    """Candidates from best to worst; the first is the winner if it fits.

    Args:
        say: is told what is being compiled.

    Raises:
        UserError: nothing that is tried is possible.
    """
    found: list[tuple[RunConfig, Plan | None, str]] = []
    for candidate in candidates(run, topology, config):
        try:
            found.append((candidate, estimate(candidate, topology), ''))
        except UserError as error:
            found.append((candidate, None, error.what))
    possible = [each for _, each, _ in found if each is not None]
    if not possible:
        raise UserError(
            f'no mesh of {topology.name} suits this run: {found[0][2] if found else "nothing is tried"}',
            where='SearchConfig',
            fix='Change batch_size so that more devices divide it, or try more axes and microbatches.',
        )
    promising = sorted(
        (each for each in possible if each.needed <= (1 - config.margin) * each.available),
        key=lambda each: each.roofline.step,
    )
    if not promising:  # then what comes nearest, to see by how much it misses
        promising = sorted(possible, key=lambda each: each.needed)
    compiled: dict[RunConfig, Plan] = {}
    failed: dict[RunConfig, str] = {}
    if topology.compiles:
        for number, each in enumerate(promising[: config.compile_best]):
            say(f'compiling {number + 1} of {min(len(promising), config.compile_best)}: {each.run.describe()}')
            try:
                compiled[each.run] = plan(each.run, topology)
            except UserError as error:
                failed[each.run] = error.what
            except jax.errors.JaxRuntimeError as error:
                failed[each.run] = f'the compiler fails: {" ".join(str(error).split())[:200]}'
    final = [compiled.get(each.run, each) for each in possible if each.run not in failed]
    if not final:
        raise UserError(
            f'nothing that should run compiles: {next(iter(failed.values()))}',
            where='SearchConfig',
            fix='Plan the run as it is, with search = None, to see all of the message.',
        )
    ranked = sorted(final, key=lambda each: (not each.fits, bool(compiled) and each.compiled is None, _order(each)))
    best = ranked[0]
    estimated = {each.run: each for each in possible}  # like is compared with like
    rows = [
        Candidate(
            each.run,
            each,
            '' if each is best and each.fits else _reason(each, best if each.compiled else estimated[best.run]),
        )
        for each in ranked
    ]
    rows += [Candidate(candidate, None, reason) for candidate, reason in failed.items()]
    return rows + [Candidate(candidate, None, reason) for candidate, each, reason in found if each is None]


def candidates(run: RunConfig, topology: Topology, config: SearchConfig) -> Iterator[RunConfig]:
    """Every combination of sizes of `axes` that uses all devices, schedule, remat policy and number of microbatches."""
    others = {axis: getattr(run.mesh, axis) for axis in MESH_AXES if axis not in config.axes}
    fixed = 1
    for size in others.values():
        fixed *= max(1, size)
    others = {axis: max(1, size) for axis, size in others.items()}
    for sizes in _factorizations(topology.num_devices // fixed, len(config.axes)):
        mesh = {**others, **dict(zip(config.axes, sizes, strict=True))}
        tried = config.pipelines() if 'pipeline' in config.axes and mesh['pipeline'] > 1 else [run.pipeline]
        for remat, microbatches, pipeline in itertools.product(config.remats, config.microbatches, tried):
            if run.step.batch_size % microbatches:
                continue
            names = (LAYER_INPUT,) if remat == 'offload' else ()
            model = with_remat(run.model, remat, names)
            step = dataclasses.replace(run.step, gradient_accumulation=microbatches)
            yield dataclasses.replace(run, model=model, step=step, pipeline=pipeline).fixed(mesh)


def _factorizations(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factorizations(number // first, parts - 1):
                yield (first, *rest)


def _order(each: Plan) -> float:
    return each.roofline.step if each.fits else each.needed


def _reason(each: Plan, best: Plan) -> str:
    source = 'compiled' if isinstance(each.compiled, CompiledStep) else 'by the analytic model'
    if not each.fits:
        if each.compiled is not None and not isinstance(each.compiled, CompiledStep):
            source = 'the compiler refuses it'
        return f'needs {byte_size(each.needed)} of {byte_size(each.available)} ({source})'
    slower = each.roofline.step / best.roofline.step - 1
    if slower < 0:
        return f'{-100 * slower:.1f}% faster by the analytic model, not among those compiled'
    waiting = ''
    if each.roofline.bubble:
        waiting = f', {100 * each.roofline.bubble / each.roofline.step:.0f}% of it waiting for other stages'
    return f'{100 * slower:.1f}% slower, bound by {each.roofline.bottleneck}{waiting} ({source})'
