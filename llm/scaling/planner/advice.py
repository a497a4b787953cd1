"""What to change when a run does not fit: single changes and pairs of them, the one that costs least time first."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator

from llm.errors import UserError
from llm.models.remat import LAYER_INPUT, RematKind
from llm.scaling.planner.compiling import CompiledStep, OutOfMemory
from llm.scaling.planner.planning import Plan, estimate
from llm.scaling.planner.run_config import RunConfig
from llm.scaling.planner.stacks import remat_of, with_remat

Change = Callable[[RunConfig], Iterator[tuple[str, RunConfig]]]


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change that makes a run fit, by the analytic model corrected by what the compiler said of the run as it is.

    Attributes:
        change: in words. run: with it. needed: bytes on one device.
        slower: predicted step over the present one, less 1, for equally many tokens.
    """

    change: str
    run: RunConfig
    needed: float
    slower: float


def _stronger_remat(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    policies: tuple[RematKind, ...] = ('none', 'dots', 'dots_no_batch', 'full')
    kinds = [kind for kind, _ in remat_of(run.model)]
    present = min(policies.index(kind) if kind in policies else 1 for kind in kinds)
    for remat in policies[present + 1 :]:
        model = with_remat(run.model, remat)
        yield f"remat = '{remat}'", dataclasses.replace(run, model=model)
    if 'offload' not in kinds:
        model = with_remat(run.model, 'offload', (LAYER_INPUT,))
        yield f"remat = 'offload' with remat_names = ('{LAYER_INPUT}',)", dataclasses.replace(run, model=model)


def _more_microbatches(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    count = 2 * run.step.gradient_accumulation
    while run.step.batch_size % count == 0:
        step = dataclasses.replace(run.step, gradient_accumulation=count)
        yield f'gradient_accumulation = {count}', dataclasses.replace(run, step=step)
        count *= 2


def _moved(source: str, target: str) -> Change:
    """Devices of one mesh axis given to another, in factors of two."""

    def change(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
        factor = 2
        while getattr(run.mesh, source) % factor == 0:
            sizes = {
                source: getattr(run.mesh, source) // factor,
                target: getattr(run.mesh, target) * factor,
            }
            words = ', '.join(f'mesh {axis} = {size}' for axis, size in sizes.items())
            yield words, run.fixed(sizes)
            factor *= 2

    return change


def _smaller_batch(run: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    size = run.step.batch_size
    while size % 2 == 0:
        size //= 2
        if size % run.step.gradient_accumulation == 0:
            yield f'batch_size = {size}', dataclasses.replace(run, step=dataclasses.replace(run.step, batch_size=size))


# What may be changed without changing what is learned, a row each; then what changes the run.
CHANGES: tuple[Change, ...] = (
    _stronger_remat,
    _more_microbatches,
    _moved('data', 'fsdp'),
    _moved('data', 'tensor'),
    _moved('fsdp', 'tensor'),
)
LAST_RESORTS: tuple[Change, ...] = (_smaller_batch,)


def cheapest_change(plan: Plan) -> Advice | None:
    """The change after which `plan` fits and is slowed down least; None if it fits as it is or nothing helps."""
    if plan.fits:
        return None
    correction = _correction(plan)
    for changes in (CHANGES, LAST_RESORTS):
        singles = [(words, run) for change in changes for words, run in change(plan.run)]
        pairs = (
            (f'{words} and {more}', second)
            for first, then in itertools.combinations((*changes, *CHANGES), 2)
            for words, run in first(plan.run)
            for more, second in then(run)
        )
        for tried in (singles, pairs):
            found = [each for words, run in tried if (each := _advice(words, run, plan, correction)) is not None]
            if found:
                return min(found, key=lambda each: (each.slower, each.needed))
    return None


def _correction(plan: Plan) -> float:
    """The compiler's temporaries over the estimated ones, of the run as it is."""
    if not isinstance(plan.compiled, CompiledStep | OutOfMemory):
        return 1.0
    return max(0.5, (plan.needed - plan.estimate.arguments - plan.estimate.code) / plan.estimate.temporaries)


def _advice(words: str, run: RunConfig, plan: Plan, correction: float) -> Advice | None:
    try:
        changed = estimate(run, plan.topology)
    except UserError:
        return None
    found = changed.estimate
    needed = found.arguments + found.code + correction * found.temporaries
    if needed > plan.available:
        return None
    before = estimate(plan.run, plan.topology).roofline.step * changed.run.tokens_per_step / plan.run.tokens_per_step
    return Advice(words, changed.run, needed, changed.roofline.step / before - 1)
