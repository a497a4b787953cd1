"""The settings of checkpointing, and the rule that says which checkpoints they let go."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from llm.errors import UserError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how long they are kept.

    A checkpoint is kept while any of the rules (`keep_last`, `keep_best`, `keep_every`) asks for it. The disk holds
    one more than that while a save is in flight: old ones go only after the new one is committed.

    Attributes:
        save_every: steps between saves.
        keep_last: how many of the newest are kept; with 1 there is none to fall back to if the newest is damaged.
        keep_best: how many of the best by `best_metric` are kept, whatever their age.
        best_metric: the name, among the metrics passed to `save`, that `keep_best` compares. A checkpoint saved
            without it, or with NaN, is never among the best; of equals the earlier counts as better.
        best_mode: whether the smallest or the largest value is best.
        keep_every: checkpoints at multiples of this step are kept for ever.
        asynchronous: write in the background while training goes on.
        on_full_disk: whether a save that runs out of space ends the run, or is reported and left out.
    """

    save_every: int = 1000
    keep_last: int = 3
    keep_best: int = 0
    best_metric: str | None = None
    best_mode: Literal['min', 'max'] = 'min'
    keep_every: int | None = None
    asynchronous: bool = True
    on_full_disk: Literal['stop', 'continue'] = 'stop'

    def __post_init__(self) -> None:
        for name, least in (('save_every', 1), ('keep_last', 1), ('keep_best', 0), ('keep_every', 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f'CheckpointConfig.{name} = {value}', fix=f'It must be at least {least}.')
        if self.keep_best and self.best_metric is None:
            raise UserError(
                f'CheckpointConfig.keep_best = {self.keep_best} without a metric to compare',
                fix="Set CheckpointConfig.best_metric, for example to 'validation/loss', or keep_best = 0.",
            )
        for name, allowed in (('best_mode', ('min', 'max')), ('on_full_disk', ('stop', 'continue'))):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f'CheckpointConfig.{name} = {getattr(self, name)!r}', fix=f'It must be one of {allowed}.'
                )

    def is_due(self, step: int) -> bool:
        """Whether the regular schedule saves after this step."""
        return step % self.save_every == 0

    def expired(self, checkpoints: Mapping[int, Mapping[str, float]]) -> list[int]:
        """The steps, of these checkpoints with their metrics, that no rule keeps, in rising order.

        The newest is never among them.
        """
        steps = sorted(checkpoints)
        kept = set(steps[-self.keep_last :])
        if self.keep_every is not None:
            kept.update(step for step in steps if step % self.keep_every == 0)
        if self.keep_best:
            sign = 1 if self.best_mode == 'min' else -1
            scores = {step: checkpoints[step].get(self.best_metric or '', math.nan) for step in steps}
            ranked = sorted((sign * score, step) for step, score in scores.items() if not math.isnan(score))
            kept.update(step for _, step in ranked[: self.keep_best])
        return [step for step in steps if step not in kept]
