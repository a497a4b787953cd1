"""Pipeline schedules: in which order every stage does the forward and backward passes of the microbatches.

An order knows nothing of time. `simulation` runs it with the costs of the operations and says what happens when.

Layers are cut into stages * chunks blocks of equal size. Block j is chunk j div stages of stage j mod stages, so that
with one chunk a stage holds a contiguous block, and with more it holds as many pieces spread over the depth. Layers
that are left over at the end are in no block: all stages run them together, as they do the loss.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Literal, get_args

from llm.errors import UserError

ScheduleKind = Literal['gpipe', '1f1b', 'interleaved', 'zero_bubble']


class Operation(enum.IntEnum):
    """What a stage does in one tick, to some consecutive repeats of the layers of a chunk.

    RECOMPUTE runs the forward pass again for its residuals, INPUT_GRADIENT and WEIGHT_GRADIENT are the two halves of
    the backward pass. The other two do several of these at once, one repeat at a time.
    """

    IDLE = 0
    FORWARD = 1
    BACKWARD = 2  # recompute, input gradient and weight gradient
    RECOMPUTE = 3
    INPUT_GRADIENT = 4  # from the residuals of RECOMPUTE
    RECOMPUTE_INPUT_GRADIENT = 5
    WEIGHT_GRADIENT = 6


class Pass(enum.Enum):
    """What an order is made of."""

    FORWARD = 'F'
    BACKWARD = 'B'


Order = list[tuple[Pass, int, int]]  # of one stage: (pass, microbatch, chunk)


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How microbatches go through the stages; read when MeshConfig.pipeline is more than 1.

    StepConfig.gradient_accumulation is the number of microbatches.

    Attributes:
        schedule: 'gpipe' (Huang et al. 2019, section 2.3) keeps the activations of every microbatch; '1f1b' (Narayanan
            et al. 2021a, "PipeDream-Flush") of as many as there are stages; 'interleaved' (Narayanan et al. 2021b,
            section 2.2) has several chunks a stage and a shorter bubble; 'zero_bubble' (Qi et al. 2023, ZB-H1) puts off
            weight gradients into the bubble, and keeps what they need.
        chunks: blocks of layers that each stage holds; more than 1 for 'interleaved' only.
        deferred: with 'zero_bubble', how many microbatches' weight gradients a stage may put off; None for as many as
            there are stages. What they need is kept, several times a layer's input each.
    """

    schedule: ScheduleKind = '1f1b'
    chunks: int = 1
    deferred: int | None = None

    def __post_init__(self) -> None:
        where = 'PipelineConfig'
        if self.schedule not in get_args(ScheduleKind):
            raise UserError(
                f'no pipeline schedule is called {self.schedule!r}',
                where=f'{where}.schedule',
                fix=f'Use one of {", ".join(get_args(ScheduleKind))}.',
            )
        if self.chunks < 1 or (self.chunks > 1) != (self.schedule == 'interleaved'):
            raise UserError(
                f'schedule {self.schedule!r} with {self.chunks} chunks a stage',
                where=f'{where}.chunks',
                fix="Use at least 2 with schedule 'interleaved', and 1 with any other.",
            )
        if self.deferred is not None and (self.deferred < 1 or self.schedule != 'zero_bubble'):
            raise UserError(
                f'schedule {self.schedule!r} with {self.deferred} deferred weight gradients',
                where=f'{where}.deferred',
                fix="Use at least 1, or None; only 'zero_bubble' defers.",
            )

    def check(self, stages: int, microbatches: int, repeats: int) -> None:
        """Raises UserError unless this schedule can run `repeats` repeats of the layers in `stages` stages."""
        blocks = stages * self.chunks
        if repeats < blocks:
            of = f'{stages} pipeline stages' + (f' of {self.chunks} chunks' if self.chunks > 1 else '')
            raise UserError(
                f'{repeats} repeats of the layer pattern are fewer than the {blocks} blocks of {of}',
                where='MeshConfig.pipeline',
                fix=f'Use at most {max(1, repeats // self.chunks)}, or fewer PipelineConfig.chunks, or more layers.',
            )
        if microbatches < stages:
            raise UserError(
                f'{microbatches} microbatches are fewer than {stages} pipeline stages',
                where='StepConfig.gradient_accumulation',
                fix=f'It is the number of microbatches: use at least {stages}, better several times that.',
            )
        if self.chunks > 1 and microbatches % stages:
            raise UserError(
                f'the interleaved schedule needs a multiple of {stages} microbatches, not {microbatches}',
                where='StepConfig.gradient_accumulation',
                fix=f'Use a multiple of MeshConfig.pipeline ({stages}), or another PipelineConfig.schedule.',
            )


def gpipe_order(stage: int, stages: int, microbatches: int) -> Order:
    """All forward passes, then all backward passes in reverse (Huang et al. 2019, figure 2c)."""
    forward: Order = [(Pass.FORWARD, m, 0) for m in range(microbatches)]
    return forward + [(Pass.BACKWARD, m, 0) for m in reversed(range(microbatches))]


def one_forward_one_backward_order(stage: int, stages: int, microbatches: int) -> Order:
    """stages - stage - 1 forward passes, then one forward and one backward in turn (Narayanan et al. 2021b, fig. 4)."""
    return _alternate(
        [(Pass.FORWARD, m, 0) for m in range(microbatches)],
        [(Pass.BACKWARD, m, 0) for m in range(microbatches)],
        warmup=stages - stage - 1,
    )


def interleaved_order(stage: int, stages: int, microbatches: int, chunks: int) -> Order:
    """1F1B over chunks: `stages` microbatches at a time pass chunk after chunk (Narayanan et al. 2021b, 2.2)."""
    groups = range(0, microbatches, stages)
    forward: Order = [
        (Pass.FORWARD, first + m, chunk) for first in groups for chunk in range(chunks) for m in range(stages)
    ]
    backward: Order = [
        (Pass.BACKWARD, first + m, chunk)
        for first in groups
        for chunk in reversed(range(chunks))
        for m in range(stages)
    ]
    return _alternate(forward, backward, warmup=2 * (stages - stage - 1) + (chunks - 1) * stages)


def _alternate(forward: Order, backward: Order, warmup: int) -> Order:
    warmup = min(warmup, len(forward))
    order = forward[:warmup]
    for each, other in zip(forward[warmup:], backward, strict=False):
        order += [each, other]
    return order + backward[len(forward) - warmup :]


def orders(config: PipelineConfig, stages: int, microbatches: int) -> list[Order]:
    """The order of every stage. Zero-bubble has none: the simulation decides as it goes; see `simulation`."""
    build: dict[str, Callable[[int], Order]] = {
        'gpipe': lambda stage: gpipe_order(stage, stages, microbatches),
        '1f1b': lambda stage: one_forward_one_backward_order(stage, stages, microbatches),
        'interleaved': lambda stage: interleaved_order(stage, stages, microbatches, config.chunks),
    }
    return [build[config.schedule](stage) for stage in range(stages)]


def paper_cost(
    config: PipelineConfig, stages: int, microbatches: int, forward: float, backward: float, weight: float
) -> float:
    """Time of a step by the formula of the schedule's paper, when no stage waits for another's longer operation.

    Args:
        forward: time of the forward pass of one microbatch on one stage; backward: of its backward pass without the
            weight gradients, recomputation included; weight: of the weight gradients.

    GPipe and 1F1B: Narayanan et al. 2021b, section 2.2.1; interleaved: section 2.2.2; ZB-H1: Qi et al. 2023, table 2.
    """
    bubble = {
        'gpipe': forward + backward + weight,
        '1f1b': forward + backward + weight,
        'interleaved': (forward + backward + weight) / config.chunks,
        'zero_bubble': forward + backward - weight,
    }[config.schedule]
    return microbatches * (forward + backward + weight) + (stages - 1) * bubble
