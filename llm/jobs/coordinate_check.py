"""The coordinate_check job: do activations move as far in a wide model as in a narrow one?"""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

from llm.configuration import Invocation
from llm.evaluation.reports.charts import Line
from llm.evaluation.reports.log_log import log_log_svg
from llm.models.model import ModelConfig
from llm.parallel.processes import require_one
from llm.training.coordinate_check import Coordinate, check_coordinates, slopes
from llm.training.optimizers import OptimizerConfig
from llm.training.run_directory import write_atomically
from llm.training.step import StepConfig


@dataclasses.dataclass(frozen=True)
class Variant:
    """One panel of the plot: a model, with or without muP, and its optimizer."""

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class CoordinateCheck:
    """Train each variant at each width for a few steps on one random batch; write a table, slopes and a plot.

    Attributes:
        output_directory: gets coordinates.csv, slopes.csv and coordinates.svg.
        widths: values of d_model. steps: updates; the plot shows the last.
    """

    output_directory: str
    variants: tuple[Variant, ...]
    step: StepConfig
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    steps: int = 4

    def __call__(self, invocation: Invocation) -> None:
        """Measure and write; with --dry_run say what would be measured."""
        if invocation.dry_run:
            print(f'would train {", ".join(v.name for v in self.variants)} at widths {self.widths}, {self.steps} steps')
            return
        require_one('coordinate_check')
        results: dict[str, list[Coordinate]] = {}
        for variant in self.variants:
            results[variant.name] = check_coordinates(
                variant.model, variant.optimizer, self.step, self.widths, self.steps
            )
            found = slopes(results[variant.name], self.steps)
            print(f'{variant.name}: ' + ', '.join(f'{name} {slope:+.3f}' for name, slope in found.items()), flush=True)
        directory = Path(self.output_directory)
        rows = [(name, c.width, c.step, c.activation, c.change) for name, found in results.items() for c in found]
        write_atomically(
            directory / 'coordinates.csv', _csv(('variant', 'width', 'step', 'activation', 'change'), rows)
        )
        fits = [(name, *fit) for name, found in results.items() for fit in slopes(found, self.steps).items()]
        write_atomically(directory / 'slopes.csv', _csv(('variant', 'activation', 'slope'), fits))
        panels = [(name, self._lines(found)) for name, found in results.items()]
        svg = log_log_svg(panels, x_label='width', y_label=f'RMS change after {self.steps} steps')
        write_atomically(directory / 'coordinates.svg', svg)

    def _lines(self, coordinates: list[Coordinate]) -> list[Line]:
        names = list(dict.fromkeys(c.activation for c in coordinates))
        return [
            Line(
                name, [(c.width, c.change) for c in coordinates if (c.activation, c.step) == (name, self.steps)], colour
            )
            for colour, name in enumerate(names)
        ]


def _csv(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *rows])
    return text.getvalue()
