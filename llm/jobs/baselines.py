"""The compressor's score beside a run's own: computed in a thread while the model trains, once per run directory."""

import json
from concurrent.futures import Future, ThreadPoolExecutor
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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix='baselines')
        self._results: dict[str, Future[dict[str, float]]] = {}

    def __enter__(self) -> Self:
        summary = self._directory / 'summary.json'
        known = json.loads(summary.read_text(encoding='utf-8')).get('baselines', {}) if summary.exists() else {}
        for component in self._data.evaluation_components() if self._data else ():
            if component.name not in known:
                self._results[component.name] = self._pool.submit(self._compress, component)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def finish(self) -> None:
        """Wait, and add the results to summary.json."""
        if self._results:
            update_summary(
                self._directory, {'baselines': {name: future.result() for name, future in self._results.items()}}
            )

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
