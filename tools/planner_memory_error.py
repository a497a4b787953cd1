"""How far the planner's analytic memory model is from the TPU compiler, over runs of many kinds.

    python tools/planner_memory_error.py [--only NAME ...] [--presets] [--csv FILE]

Compiles each run's training step (about a minute each on two cores) and prints bytes on one device, compiled and
estimated. Rows that the CSV file has already are not compiled again; the estimate is always made anew. With
--presets only presets of models of every kind, whose file is docs/planner_memory.csv; those not in it are compiled if
--only names them. Else the runs of tools/tpu_plans.py come after, as far as docs/tpu_plans.json has them.
"""

import argparse
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(Path(__file__).parents[1]))

from llm.configuration import load_job
from llm.jobs.plan import Plan
from llm.models.attention import AttentionConfig
from llm.models.decoder import DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.parallel.mesh import MeshConfig
from llm.parallel.pipeline.schedules import PipelineConfig, ScheduleKind
from llm.scaling.planner.compiling import CompiledStep, compile_step
from llm.scaling.planner.planning import estimate
from llm.scaling.planner.run_config import RunConfig
from llm.scaling.planner.topology import Topology, find_topology
from llm.training.optimizers import OptimizerConfig
from llm.training.step import StepConfig
from tools import tpu_plans


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: a topology, a model, a mesh and a batch."""

    name: str
    topology: str
    mesh: dict[str, int]
    rows: int = 8
    length: int = 1024
    microbatches: int = 1
    d_model: int = 1024
    d_ff: int = 2816
    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 4096
    remat: str = 'full'
    remat_names: tuple[str, ...] = ()
    optimizer: str = 'adamw'
    schedule: ScheduleKind = '1f1b'

    def run(self) -> RunConfig:
        """The training run."""
        mixer = AttentionConfig(num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=128)
        layer = LayerConfig(mixer=mixer, feed_forward=FeedForwardConfig(d_ff=self.d_ff))
        changes: dict[str, Any] = {'remat': self.remat, 'remat_names': self.remat_names}
        model = DecoderConfig(
            vocab_size=self.vocabulary,
            d_model=self.d_model,
            num_layers=self.layers,
            pattern=(layer,),
            compute_dtype='bfloat16',
            **changes,
        )
        kind: Any = self.optimizer
        mesh: dict[str, Any] = {'data': 1, **self.mesh}
        return RunConfig(
            model,
            OptimizerConfig(kind=kind),
            StepConfig(self.rows, self.length, gradient_accumulation=self.microbatches),
            MeshConfig(**mesh),
            pipeline=PipelineConfig(self.schedule),
        )


@dataclasses.dataclass(frozen=True)
class Preset:
    """One run of a preset of gin_configs/models, by fsdp, on what models of its kind are trained on.

    Attributes:
        model: a file there. kind: the gin name of its config. changes: more bindings.
    """

    name: str
    topology: str
    model: str
    kind: str
    rows: int
    length: int
    remat: str = 'full'
    changes: tuple[str, ...] = ()
    mesh: tuple[tuple[str, int], ...] = (('fsdp', 4),)

    def run(self) -> RunConfig:
        """The training run."""
        bindings = [
            'from llm.jobs import plan',
            'from llm.scaling.planner import run_config',
            'from llm.training import step',
            'JOB = @plan.Plan()',
            'plan.Plan.run = @run_config.RunConfig()',
            f'plan.Plan.topology = {self.topology!r}',
            f'run_config.RunConfig.model = @{self.kind}()',
            'run_config.RunConfig.step = @step.StepConfig()',
            'run_config.RunConfig.optimizer = @optimizers.OptimizerConfig()',
            f'step.StepConfig.batch_size = {self.rows}',
            f'step.StepConfig.sequence_length = {self.length}',
            f'REMAT = {self.remat!r}',
            *self.changes,
        ]
        files = [f'gin_configs/models/{self.model}.gin', 'gin_configs/optimizers/adamw.gin']
        job, _ = load_job([str(tpu_plans.ROOT / file) for file in files], bindings)
        assert isinstance(job, Plan) and isinstance(job.run, RunConfig)
        mesh: dict[str, Any] = {'data': 1, **dict(self.mesh)}
        return dataclasses.replace(job.run, mesh=MeshConfig(**mesh))


_FSDP = {'fsdp': 4}
_STAGES = {'pipeline': 4}
CASES = (
    Case('fsdp', 'v5e:2x2', _FSDP),
    Case('two microbatches', 'v5e:2x2', _FSDP, rows=16, microbatches=2),
    Case('everything kept', 'v5e:2x2', _FSDP, remat='none'),
    Case('projections kept', 'v5e:2x2', _FSDP, remat='dots_no_batch'),
    Case('names kept', 'v5e:2x2', _FSDP, remat='names', remat_names=('query', 'key', 'value', 'attention')),
    Case('inputs offloaded', 'v5e:2x2', _FSDP, remat='offload', remat_names=('layer_input',)),
    Case('data', 'v5e:2x2', {'data': 4}),
    Case('tensor', 'v5e:2x2', {'tensor': 4}),
    Case('fsdp and tensor', 'v5e:2x2', {'fsdp': 2, 'tensor': 2}),
    Case('long rows, grouped queries', 'v6e:2x2', _FSDP, rows=4, length=8192, kv_heads=2),
    Case('large vocabulary', 'v5p:2x2x1', _FSDP, rows=16, vocabulary=32_768),
    Case('sixteen chips', 'v5e:4x4', {'fsdp': 16}, rows=16, length=2048, d_model=2048, d_ff=5632, heads=16),
    Case('another chip', 'v4:2x2x1', _FSDP),
    Case('data and fsdp', 'tpu7x:2x2x1', {'data': 2, 'fsdp': 4}, rows=16),
    Case('deep', 'v6e:2x2', _FSDP, layers=32),
    Case('muon', 'v5e:2x2', _FSDP, optimizer='muon', layers=4),
    Case('many tokens', 'v6e:2x2', _FSDP, rows=64),
    Case('stages', 'v5e:2x2', _STAGES, rows=32, microbatches=8, layers=16),
    Case('stages, everything kept', 'v5e:2x2', _STAGES, rows=32, microbatches=8, layers=16, remat='none'),
    Case('zero-bubble', 'v5e:2x2', _STAGES, rows=32, microbatches=8, layers=16, schedule='zero_bubble'),
)
_ENCODER, _DECODER = 'encoder.EncoderConfig', 'decoder.DecoderConfig'
_MULTI_TOKEN = (
    'from llm.models import multi_token',
    'decoder.DecoderConfig.multi_token = @multi_token.MultiTokenConfig()',
    'multi_token.MultiTokenConfig.depths = 2',
    "multi_token.MultiTokenConfig.kind = 'sequential'",
)
PRESETS = (
    Preset('BERT', 'v5e:2x2', 'bert_base', _ENCODER, 64, 512, 'none'),
    Preset('BERT, recomputed', 'v5e:2x2', 'bert_base', _ENCODER, 256, 512),
    Preset('Longformer', 'v5e:2x2', 'longformer_base_4096', _ENCODER, 16, 4096, 'none'),
    Preset('T5', 'v5e:2x2', 't5_base', 'encoder_decoder.EncoderDecoderConfig', 128, 512),
    Preset('Mamba', 'v5e:2x2', 'mamba_130m', _DECODER, 64, 1024),
    Preset('Mamba, everything kept', 'v5e:2x2', 'mamba_130m', _DECODER, 16, 1024, 'none'),
    Preset('Mamba-2', 'v5e:2x2', 'mamba2_130m', _DECODER, 64, 1024),
    Preset('Jamba', 'v5p:2x2x1', 'jamba_like', _DECODER, 16, 2048),
    Preset('Jamba, experts apart', 'v5p:2x2x1', 'jamba_like', _DECODER, 16, 2048, mesh=(('fsdp', 2), ('expert', 2))),
    Preset('Transformer-XL', 'v5e:2x2', 'transformer_xl_41m', _DECODER, 64, 512, 'none'),
    Preset('Transformer-XL, recomputed', 'v5e:2x2', 'transformer_xl_41m', _DECODER, 64, 512),
    Preset('multi-token prediction', 'v5e:2x2', 'gpt2_124m', _DECODER, 64, 1024, changes=_MULTI_TOKEN),
)
COMPILED = tpu_plans.ROOT / 'docs/planner_memory.csv'  # of the presets
_FIELDS = ('arguments', 'outputs', 'temporaries', 'aliased', 'code', 'temp_size', 'total')


def read(path: Path) -> dict[str, dict[str, float]]:
    """What the compiler said of the cases of a CSV file."""
    with path.open() as file:
        return {row['name']: {field: float(row[field]) for field in _FIELDS} for row in csv.DictReader(file)}


def measure(cases: tuple[Case | Preset, ...], path: Path | None) -> Iterator[tuple[Case | Preset, dict[str, float]]]:
    """Each case and the compiler's bytes of it, kept in a CSV file."""
    known = {} if path is None or not path.exists() else read(path)
    for case in cases:
        if case.name not in known:
            compiled = compile_step(case.run(), find_topology(case.topology))
            if not isinstance(compiled, CompiledStep):
                print(f'{case.name}: {compiled.message}')
                continue
            memory = compiled.memory
            known[case.name] = {field: getattr(memory, field) for field in _FIELDS}
            if path is not None:
                is_new = not path.exists()
                with path.open('a', newline='') as file:
                    writer = csv.DictWriter(file, ('name', *_FIELDS))
                    if is_new:
                        writer.writeheader()
                    writer.writerow({'name': case.name, **known[case.name]})
        yield case, known[case.name]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', nargs='*', help='names of cases')
    parser.add_argument('--presets', action='store_true', help='presets of models of every kind alone')
    parser.add_argument('--csv', type=Path, help='what the compiler said, kept between calls')
    options = parser.parse_args()
    cases: tuple[Case | Preset, ...] = CASES
    if options.presets:
        cases, options.csv = PRESETS, options.csv or COMPILED
        options.only = options.only or list(read(options.csv))
    cases = tuple(case for case in cases if not options.only or case.name in options.only)
    print('| run | topology | layout | compiled, GB | estimated, GB | error | temporaries, GB | estimated, GB |')
    print('|---|---|---|---|---|---|---|---|')
    small = [
        line(case.name, case.run(), find_topology(case.topology), memory)
        for case, memory in measure(cases, options.csv)
    ]
    print(summary('small', small))
    if options.only:
        return
    records = json.loads(tpu_plans.RESULTS.read_text())
    large = []
    for row in tpu_plans.ROWS:
        if 'memory' in records.get(row.name, {}).get('compiler', {}):
            job = row.job()
            topology = find_topology(job.topology, job.num_slices)
            large.append(line(row.title, job.run_config(), topology, records[row.name]['compiler']['memory']))
    print(summary('large', large))


def line(name: str, run: RunConfig, topology: Topology, memory: dict[str, float]) -> float:
    """Prints a row of the table: the error of the estimate, against what the compiler said."""
    plan = estimate(run, topology)
    found = plan.estimate
    error = found.peak / memory['total'] - 1
    print(
        f'| {name} | {topology.name} | {plan.run.describe()} | {memory["total"] / 1e9:.3f} '
        f'| {found.peak / 1e9:.3f} | {100 * error:+.1f}% | {memory["temporaries"] / 1e9:.3f} '
        f'| {found.temporaries / 1e9:.3f} |',
        flush=True,
    )
    return error


def summary(kind: str, errors: list[float]) -> str:
    """How large the errors are."""
    sizes = sorted(map(abs, errors))
    return (
        f'{len(errors)} {kind} runs: largest error {100 * sizes[-1]:.1f}%, mean {100 * sum(sizes) / len(sizes):.1f}%, '
        f'{sum(size <= 0.1 for size in sizes)} within 10%'
    )


if __name__ == '__main__':
    main()
