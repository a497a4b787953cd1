"""The compressor's score beside a run's own: computed in a thread while the model trains, once per run directory."""

import contextlib
import json
import threading
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Self

from llm.data.datasets import Component, DataConfig
from llm.data.sources import ReadCounts, Split, read_documents
from llm.evaluation.compression_baseline import xz_baselines
from llm.evaluation.reports import read_run, update_summary


def _text(component: Component, split: Split) -> bytes:
    return b''.join(text.encode() for text in read_documents(component.source, split, ReadCounts()))


class Baselines:
    """Bits per byte of every evaluation set under xz alone and xz primed with the training text of that component.

    Args:
        data: whose sets to compress; None for none.
        directory: the run's; what its summary.json already has is not computed again.
    """

    def __init__(self, data: DataConfig | None, directory: Path):
        self._data, self._directory = data, directory
        self._known: dict[str, dict[str, float]] = {}
        self._results: dict[str, Future[dict[str, float]]] = {}

    def __enter__(self) -> Self:
        if self._data:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # none yet, or damaged: computed anew
                summary = json.loads((self._directory / 'summary.json').read_bytes())
                self._known = dict(summary.get('baselines', {}))
            components = [each for each in self._data.evaluation_components() if each.name not in self._known]
            self._results = {component.name: Future() for component in components}
            # A daemon, which an executor's threads are not: a run that is stopped must not wait for the compressor.
            threading.Thread(target=self._compute, args=(components,), name='baselines', daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for result in self._results.values():
            result.cancel()

    def finish(self) -> None:
        """Wait, and add the results to summary.json."""
        if self._results:
            results = {name: result.result() for name, result in self._results.items()}
            update_summary(self._directory, {'baselines': self._known | results})

    def _compute(self, components: list[Component]) -> None:
        for component in components:
            result = self._results[component.name]
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(self._compress(component))
                except BaseException as error:  # for whoever waits for it
                    result.set_exception(error)

    @staticmethod
    def _compress(component: Component) -> dict[str, float]:
        return xz_baselines(_text(component, 'train'), _text(component, 'validation'))


def result_lines(directory: Path) -> str:
    """The last score on each evaluation set, beside the compressor's where it is known; one line each."""
    run = read_run(directory)
    lines = []
    for name, scores in run.evaluations.items():
        last = scores[-1]
        words = [f'{name} after step {last["step"]}: loss {last["loss"]:.4f}']
        if 'bits_per_byte' in last:
            words.append(f'{last["bits_per_byte"]:.4f} bits per byte')
        for baseline, value in sorted(run.baselines(name).items()):
            words.append(f'{baseline.removesuffix("_bits_per_byte").replace("_", " ")} {value:.4f}')
        lines.append(', '.join(words) + '\n')
    return ''.join(lines)
