"""Copy what is worth committing of a finished run to a folder of experiments/.

    python tools/export_run.py runs/quickstart experiments/quickstart

The folder gets config.gin, environment.json, report.html (plots and samples) and metrics.csv: one line a step, and one
for each evaluation of a set. What is there is replaced; README.md, which a person writes, is not touched.
"""

import argparse
import csv
import shutil
import sys
from pathlib import Path
from typing import Any

from llm.training.metrics import read_metrics

COPIED = ('config.gin', 'environment.json', 'report.html')
COLUMNS = ('step', 'kind', 'set', 'loss', 'bits_per_byte', 'gradient_norm', 'learning_rate', 'seconds', 'elapsed')


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of the run, timings beside the rest, floats to six digits."""
    lines = [record | record.get('timing', {}) for record in read_metrics(run)]
    short = [{k: f'{v:.6g}' if isinstance(v, float) else v for k, v in line.items()} for line in lines]
    return [{column: line.get(column, '') for column in COLUMNS} for line in short]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=Path, help='a run directory')
    parser.add_argument('folder', type=Path, help='where to put it')
    arguments = parser.parse_args()
    missing = [name for name in (*COPIED, 'complete') if not (arguments.run / name).exists()]
    if missing:
        sys.exit(f'{arguments.run} is not a finished run: it has no {missing[0]}')
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(arguments.run / name, arguments.folder / name)
    with open(arguments.folder / 'metrics.csv', 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows(arguments.run))


if __name__ == '__main__':
    main()
