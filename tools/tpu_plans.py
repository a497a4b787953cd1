"""Large runs compiled for real TPU topologies, beside MaxText's: makes docs/tpu_plans.md.

    python tools/tpu_plans.py [--only NAME ...]     compile these rows (default: all that are not there) and write
    python tools/tpu_plans.py --list                names of the rows

Each row is a preset of gin_configs/models on a mesh of ours, AdamW with fp32 state, compute in bf16, full remat. What
was compiled is kept in docs/tpu_plans.json, so that rows can be made one at a time: the large ones take minutes and
several GB of memory. The first figures of MaxText are of its snapshot of August 2026 (jax 0.12.0, synthetic data,
`remat_policy=full`, its default splash attention), compiled in the same way; the others of MaxText 0.2.5 from PyPI,
compiled by the same libtpu as ours.
"""

import argparse
import dataclasses
import datetime
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

from llm.configuration import load_job
from llm.jobs.plan import Plan as PlanJob
from llm.parallel.mesh import MESH_AXES
from llm.scaling.planner.planning import plan
from llm.scaling.planner.records import Record, plan_record
from llm.scaling.planner.topology import find_topology

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / 'docs/tpu_plans.json', ROOT / 'docs/tpu_plans.md'


@dataclasses.dataclass(frozen=True)
class Row:
    """One run, and what MaxText needs for the same one.

    Attributes:
        model: a file of gin_configs/models. title: in the table. rows: of the global batch.
        schedule, chunks: of the pipeline, where the mesh has one.
        theirs: (arguments GB, temporaries GB, seconds to compile, if known), None where there is nothing to compare
            with.
        again: (peak less arguments, temp_size) of MaxText 0.2.5, in GB.
        offloaded: activations that wait on the host; full remat without.
    """

    name: str
    title: str
    model: str
    topology: str
    mesh: dict[str, int]
    rows: int
    length: int
    theirs: tuple[float, float, float | None] | None = None
    again: tuple[float, float] | None = None
    microbatches: int = 1
    slices: int = 1
    offloaded: tuple[str, ...] = ()
    schedule: str = '1f1b'
    chunks: int = 1

    def job(self) -> PlanJob:
        """The plan job that makes it."""
        sizes = {**dict.fromkeys(MESH_AXES, 1), **self.mesh}
        bindings = [
            f'TOPOLOGY = {self.topology!r}',
            f'NUM_SLICES = {self.slices}',
            f'BATCH_SIZE = {self.rows}',
            f'SEQUENCE_LENGTH = {self.length}',
            f'GRADIENT_ACCUMULATION = {self.microbatches}',
            f'REMAT = {"offload" if self.offloaded else "full"!r}',
            f'REMAT_NAMES = {self.offloaded!r}',
            *(f'mesh.MeshConfig.{axis} = {size}' for axis, size in sizes.items() if axis != 'tensor'),
            f'TENSOR = {sizes["tensor"]}',
            f'mesh.MeshConfig.dcn_data = {self.slices}',
            'from llm.parallel.pipeline import schedules as stages',
            f'stages.PipelineConfig.schedule = {self.schedule!r}',
            f'stages.PipelineConfig.chunks = {self.chunks}',
        ]
        files = ['gin_configs/runs/plan.gin', f'gin_configs/models/{self.model}.gin']
        job, _ = load_job([str(ROOT / file) for file in files], bindings)
        assert isinstance(job, PlanJob)
        return job


ROWS = (
    Row('7b_16', 'Llama 2 7B, v5e 4x4', 'llama2_7b', 'v5e:4x4', {'fsdp': 16}, 16, 2048, (5.05, 3.70, 63), (3.67, 4.94)),
    Row(
        '7b_256',
        'Llama 2 7B, v5e 16x16',
        'llama2_7b',
        'v5e:16x16',
        {'fsdp': 256},
        1024,
        2048,
        (0.32, 4.29, 155),
        (4.12, 5.80),
    ),
    Row(
        '8b_256',
        'Llama 3 8B, v6e 16x16',
        'llama3_8b',
        'v6e:16x16',
        {'fsdp': 256},
        512,
        8192,
        (0.38, 11.17, 64),
        (10.94, 15.42),
    ),
    Row(
        '8b_256_offload',
        'Llama 3 8B, v6e 16x16, inputs of layers on the host',
        'llama3_8b',
        'v6e:16x16',
        {'fsdp': 256},
        512,
        8192,
        offloaded=('layer_input',),
    ),
    Row(
        '70b_128',
        'Llama 3 70B, v5p, 128 chips',
        'llama3_70b',
        'v5p:4x4x8',
        {'fsdp': 128},
        256,
        8192,
        (6.63, 36.75, 40),
        (36.34, 50.66),
    ),
    Row(
        '70b_pipeline',
        'Llama 3 70B, v5p, 128 chips, pipeline 4, 8 microbatches',
        'llama3_70b',
        'v5p:4x4x8',
        {'pipeline': 4, 'fsdp': 32},
        256,
        4096,
        (7.21, 45.44, 319),
        (45.13, 63.05),
        microbatches=8,
    ),
    Row(
        '8b_sequence',
        'Llama 3 8B, v5p, 32 chips, sequence 4',
        'llama3_8b',
        'v5p:2x4x4',
        {'sequence': 4, 'fsdp': 8},
        8,
        32_768,
        (3.02, 8.86, 34),
        (7.89, 11.38),
    ),
    Row(
        '8b_128k_8',
        'Llama 3 8B, v5p, 32 chips, sequence 8',
        'llama3_8b',
        'v5p:2x4x4',
        {'sequence': 8, 'fsdp': 4},
        4,
        131_072,
    ),
    Row(
        '8b_128k',
        'Llama 3 8B, v5p, 64 chips, sequence 16',
        'llama3_8b',
        'v5p:4x4x4',
        {'sequence': 16, 'fsdp': 4},
        4,
        131_072,
    ),
    Row(
        '8b_128k_32',
        'Llama 3 8B, v5p, 128 chips, sequence 32',
        'llama3_8b',
        'v5p:4x4x8',
        {'sequence': 32, 'fsdp': 4},
        4,
        131_072,
    ),
    Row(
        '70b_slices',
        'Llama 3 70B, v5p, 2 slices of 128 chips',
        'llama3_70b',
        'v5p:4x4x8',
        {'data': 2, 'fsdp': 128},
        512,
        8192,
        slices=2,
    ),
    Row(
        'mixtral_64',
        'Mixtral 8x7B, v5p, 64 chips, expert 8',
        'mixtral_8x7b',
        'v5p:4x4x4',
        {'expert': 8, 'fsdp': 8},
        256,
        4096,
        (8.76, 16.68, None),
    ),
)


def compile_row(row: Row) -> Record:
    """What the planner says of it."""
    job = row.job()
    start = time.perf_counter()
    record = plan_record(plan(job.run_config(), find_topology(job.topology, job.num_slices)))
    record['made'] = {
        'jax': jax.__version__,
        'seconds': time.perf_counter() - start,
        'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
        'commit': subprocess.run(
            ['git', 'rev-parse', '--short=7', 'HEAD'], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip(),
    }
    return record


def page(results: dict[str, Record]) -> str:
    """The table as Markdown."""
    lines = [
        '# Large runs, compiled for TPUs',
        '',
        'Made by `tools/tpu_plans.py`: training steps compiled by the TPU compiler for these topologies, on a CPU.',
        'Compute in bf16, AdamW with fp32 state, full remat. Bytes are of one chip, from `memory_analysis()`; what',
        'waits on the host is not in them. *Temporaries* are its peak less its arguments: what the program needs. Its',
        '`temp_size` counts part of the same space twice: the compiler makes programs whose `temp_size` no chip has',
        '(docs/decisions.md). The peak counts VMEM too. Which measure the second figures are is not known; they are',
        'near the peak of MaxText 0.2.5, but 12% above it with sequence 4. By `temp_size` five of six of ours exceed',
        'them.',
        '',
        "Second figures are MaxText's for the same model, tokens and topology, at its snapshot of August 2026 (jax",
        '0.12.0, splash attention), as they were given to us; third ones (second ones of temp_size) are of MaxText',
        '0.2.5, compiled by the same libtpu as ours, its pipeline with 20 layers a stage (with one it needs',
        '21.76 GB). Times to compile are for scale: machines differ. The step time is a bound by published rates, not',
        'measured.',
        '',
        'Each row was made by `python tools/tpu_plans.py --only NAME`, of the code of the commit in the last column.',
        'Those from before 1619cb6 have neither gradients of weights written out by hand (`llm/kernels/projection.py`)',
        'nor experts multiplied by `llm/kernels/grouped_matmul/pallas_tpu.py`. Two were made before and after: Llama 2',
        '7B on 16 chips needs what it needed, Mixtral 11.44 GB of temporaries where it needed 11.26.',
        '',
        '| run | tokens a chip | sequence | arguments, GB | temporaries, GB | temp_size, GB | compiled in, s '
        '| weight bytes over least | least step, s | MFU at most, causal | NAME | made |',
        '|---|---|---|---|---|---|---|---|---|---|---|---|',
    ]
    for row in ROWS:
        record = results.get(row.name)
        lines.append(_line(row, record))
    missing = [row.title for row in ROWS if row.name not in results]
    if missing:
        lines += ['', f'Not compiled yet: {"; ".join(missing)}.']
    return '\n'.join(lines) + '\n'


def _line(row: Row, record: Record | None) -> str:
    theirs = row.theirs or (None, None, None)
    live, temp_size = row.again or (None, None)
    chips = 0 if record is None else record['topology']['chips']
    cells: list[Any] = [row.title, '-' if not chips else f'{row.rows * row.length / chips:,.0f}', f'{row.length:,}']
    compiler = {} if record is None else record.get('compiler', {})
    ours: list[float | None] = [None, None, None]
    if record is not None and 'memory' in compiler:
        # Of a chip: where libtpu has two devices a chip, both.
        per_chip = record['topology']['devices'] / chips / 1e9
        ours = [compiler['memory'][kind] * per_chip for kind in ('arguments', 'temporaries', 'temp_size')]
    cells += [_cell(2, ours[0], theirs[0]), _cell(2, ours[1], theirs[1], live), _cell(2, ours[2], temp_size)]
    if record is not None and 'memory' not in compiler:
        cells[-3] = f'does not fit, by {record["memory"]["over"] / 1e9:.2f}'
    cells.append(_cell(0, compiler.get('seconds'), theirs[2]))
    if record is not None and 'memory' in compiler:
        roof = record['roofline']
        cells += [f'{compiler["weights"]["ratio"]:.2f}', f'{roof["step"]:.2f}', f'{100 * roof["mfu_causal"]:.0f}%']
    else:
        cells += ['-', '-', '-']
    made = {} if record is None else record['made']
    cells += [f'`{row.name}`', f'{made["date"]}, {made["commit"]}' if made else '-']
    return '| ' + ' | '.join(cells) + ' |'


def _cell(digits: int, ours: float | None, *others: float | None) -> str:
    """'4.90 / 5.05'; what others do not have is left out."""
    values = [ours, *(value for value in others if value is not None)]
    return ' / '.join('-' if value is None else f'{value:.{digits}f}' for value in values)


def main() -> None:
    """Compile what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='*', choices=[row.name for row in ROWS], help='names of rows')
    parser.add_argument('--list', action='store_true')
    options = parser.parse_args()
    if options.list:
        print('\n'.join(f'{row.name:14}{row.title}' for row in ROWS))
        return
    results: dict[str, Record] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row in ROWS:
        wanted = row.name in options.only if options.only else row.name not in results
        if wanted:
            print(f'compiling {row.title}', flush=True)
            results[row.name] = compile_row(row)
            RESULTS.write_text(json.dumps(results, indent=1) + '\n')
        PAGE.write_text(page(results))
    print(page(results))


if __name__ == '__main__':
    main()
