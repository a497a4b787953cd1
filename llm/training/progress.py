"""What a person watching a run sees: one live line on a terminal or in a notebook, else a log line now and then."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Self, TextIO

from tqdm import tqdm

from llm.training.short_numbers import short_duration, short_number

_SECONDS_BETWEEN_LOG_LINES = 15.0


def metrics_line(metrics: Mapping[str, float]) -> str:
    """What is known of loss, tokens/s and MFU, in a few words.

    Args:
        metrics: of these names: `loss` in nats per token, `tokens_per_second`, `mfu` from 0 to 1.
    """
    words = []
    if 'loss' in metrics:
        words.append(f'loss {metrics["loss"]:.3f}')
    if 'tokens_per_second' in metrics:
        words.append(f'{short_number(metrics["tokens_per_second"])} tok/s')
    if 'mfu' in metrics:
        words.append(f'MFU {100 * metrics["mfu"]:.0f}%')
    return '  '.join(words)


def scores_line(scores: Mapping[str, float]) -> str:
    """One figure for each evaluation set of `<set>/<metric>` names: bits per byte if it is known, else the loss."""
    sets: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        evaluation_set, _, metric = name.rpartition('/')
        sets.setdefault(evaluation_set, {})[metric] = value
    words = []
    for evaluation_set, values in sets.items():
        if 'bits_per_byte' in values:
            words.append(f'{evaluation_set} {values["bits_per_byte"]:.3f} bits/byte')
        elif 'loss' in values:
            words.append(f'{evaluation_set} loss {values["loss"]:.3f}')
    return '  '.join(words)


def _widget() -> type[tqdm] | None:
    """The bar that a notebook shows as a widget; None elsewhere, where IPython takes too long to import."""
    if 'IPython' not in sys.modules:
        return None
    from tqdm.auto import tqdm as automatic_tqdm
    from tqdm.notebook import tqdm_notebook

    return automatic_tqdm if issubclass(automatic_tqdm, tqdm_notebook) else None


class Progress:
    """Shows how far a run is: step, loss, tokens/s, MFU, time left and the last evaluation.

    A context manager. On a terminal it is one line that is redrawn, in Jupyter and Colab a widget; elsewhere a line is
    printed at the first step, every 15 seconds, at every evaluation and at the end.

    Args:
        total_steps: of the run. start_step: steps done before this process.
        enabled: False shows nothing, on hosts other than the first.
        stream: where to, by default stderr.
    """

    def __init__(self, total_steps: int, start_step: int = 0, *, enabled: bool = True, stream: TextIO | None = None):
        self._total, self._start = total_steps, start_step
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        widget = _widget() if stream is None else None
        self._bar_type = widget or tqdm
        self._live = enabled and (widget is not None or self._stream.isatty())
        self._bar: tqdm | None = None
        self._step = start_step
        self._metrics: dict[str, float] = {}
        self._scores: dict[str, float] = {}
        self._last_line = -math.inf
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._bar = self._bar_type(
                total=self._total,
                initial=self._start,
                file=self._stream,
                dynamic_ncols=True,
                bar_format='{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar}| {desc}',
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are done.

        Args:
            step: number of updates done, in this process and before it.
            metrics: what was measured at this step. Names as in `metrics_line`; those with a slash, `<set>/<metric>`,
                are the scores of an evaluation, as in `scores_line`.
        """
        if not self._enabled:
            return
        advanced, self._step = step - self._step, step
        scores = {name: value for name, value in metrics.items() if '/' in name}
        self._scores |= scores
        self._metrics |= {name: value for name, value in metrics.items() if '/' not in name}
        if self._first is None and advanced:  # The first step holds the compilation, and says nothing about the rest.
            self._first = (step, time.monotonic())
        if self._bar is not None:
            self._bar.set_description_str(self._text(), refresh=False)
            self._bar.update(advanced)
            if scores or step == self._total:
                self._bar.refresh()
            return
        now = time.monotonic()
        due = now - self._last_line >= _SECONDS_BETWEEN_LOG_LINES or step == self._total
        if scores:
            print(f'step {step:,}/{self._total:,}  evaluation  {scores_line(scores)}', file=self._stream, flush=True)
        elif due:
            self._last_line = now
            done = f'{100 * step / max(self._total, 1):.0f}%'
            print(f'step {step:,}/{self._total:,} ({done})  {self._text()}', file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Print `text` on lines of its own, above the live line."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _text(self) -> str:
        words = [metrics_line(self._metrics)]
        if (left := self._seconds_left()) is not None:
            words.append(f'{short_duration(left)} left')
        words.append(scores_line(self._scores))
        return '  '.join(word for word in words if word)

    def _seconds_left(self) -> float | None:
        """From the average step so far, evaluations included; None before the second step."""
        if self._first is None or self._step <= self._first[0]:
            return None
        step, since = self._first
        return (self._total - self._step) * (time.monotonic() - since) / (self._step - step)
