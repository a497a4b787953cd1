"""Learning-rate schedules: warm-up, then constant, linear or cosine decay, or a plateau with a final decay."""

import dataclasses
from typing import Literal

import optax

from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """A learning rate as a fraction of its peak, by step.

    Attributes:
        kind: shape after the warm-up. `stable_decay` stays at the peak and falls linearly over the last
            `decay_fraction` of the run (warm-up-stable-decay, Hu et al. 2024, section 4).
        warmup_steps: steps of linear rise from 0; the first step already uses peak / warmup_steps.
        final_fraction: fraction of the peak reached at the last step.
        decay_fraction: part of the run that `stable_decay` decays over.
    """

    kind: Literal['constant', 'linear', 'cosine', 'stable_decay'] = 'cosine'
    warmup_steps: int = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or not 0 <= self.final_fraction <= 1 or not 0 < self.decay_fraction <= 1:
            raise UserError(
                f'schedule {self} is out of range',
                where='ScheduleConfig',
                fix='Use warmup_steps >= 0, final_fraction in [0, 1] and decay_fraction in (0, 1].',
            )


def make_schedule(config: ScheduleConfig, peak: float, total_steps: int) -> optax.Schedule:
    """The learning rate at step 0, 1, ... total_steps - 1.

    Raises:
        UserError: the warm-up is longer than the run.
    """
    if config.warmup_steps > total_steps:
        raise UserError(
            f'warm-up of {config.warmup_steps} steps is longer than the run of {total_steps}',
            where='ScheduleConfig.warmup_steps',
            fix='Lower warmup_steps or train longer.',
        )
    rest = max(total_steps - config.warmup_steps, 1)
    final = peak * config.final_fraction
    match config.kind:
        case 'constant':
            after = optax.constant_schedule(peak)
        case 'linear':
            after = optax.linear_schedule(peak, final, rest)
        case 'cosine':
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
        case 'stable_decay':
            decay = max(1, min(rest, round(total_steps * config.decay_fraction)))
            after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])
