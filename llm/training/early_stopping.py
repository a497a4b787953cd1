"""Early stopping: a run ends when its evaluations have not become better for a while."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from llm.errors import UserError
from llm.training.checkpoints import CheckpointConfig
from llm.training.metrics import read_metrics


class Patience:
    """Counts evaluations in a row that were no better than the best before them.

    Args:
        config: says by `best_metric` which figure counts, and by `best_mode` whether it should be low.
        limit: so many are enough; 0 is never enough.
        history: figures of earlier evaluations by name, in order.

    Raises:
        UserError: there is a limit and no figure to look at.
    """

    def __init__(self, config: CheckpointConfig, limit: int, history: Iterable[Mapping[str, Any]] = ()) -> None:
        if limit and config.best_metric is None:
            raise UserError(
                f'patience is {limit}, but nothing says which figure should become better',
                where='LoopConfig.patience',
                fix='Set CheckpointConfig.best_metric and best_mode.',
            )
        self.limit, self.waited = limit, 0
        self._name, self._sign = config.best_metric, 1.0 if config.best_mode == 'min' else -1.0
        self._best = math.inf
        for scores in history:
            self.add(scores)

    @classmethod
    def of_run(cls, config: CheckpointConfig, limit: int, run_directory: Path) -> Self:
        """With what the run's metrics say of its evaluations so far, so that a restart changes nothing."""
        lines = (line for line in read_metrics(run_directory) if line.get('kind') == 'evaluation')
        return cls(config, limit, ({f'{line["set"]}/{name}': value for name, value in line.items()} for line in lines))

    def add(self, scores: Mapping[str, Any]) -> None:
        """Take in an evaluation; one without the figure does not count."""
        if self._name is None or self._name not in scores:
            return
        value = self._sign * scores[self._name]
        self.waited = 0 if value < self._best else self.waited + 1
        self._best = min(self._best, value)

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return 0 < self.limit <= self.waited
