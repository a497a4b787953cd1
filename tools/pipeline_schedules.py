"""What pipeline schedules cost, by compiled FLOPs and beside their papers' formulas, and pictures of them for the docs.

    python tools/pipeline_schedules.py            # print the table
    python tools/pipeline_schedules.py --write    # also write it, and the pictures, into docs/

The layer is Llama 3 8B's in bf16, 32 of them; costs of its parts are the FLOPs that XLA counts in the program of each,
compiled for CPU with the plain definition of attention. Lock-step: every tick takes as long as its slowest stage.
"""

import argparse
import dataclasses
import os
import re
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from llm.models.attention import AttentionConfig
from llm.models.decoder import Decoder, DecoderConfig
from llm.models.feed_forward import FeedForwardConfig
from llm.models.layer import LayerConfig
from llm.models.parameters import parameter_specs
from llm.parallel.pipeline.costs import compiled_costs
from llm.parallel.pipeline.granularity import Costs, Granularity
from llm.parallel.pipeline.planning import plan
from llm.parallel.pipeline.schedules import Operation, PipelineConfig, paper_cost
from llm.parallel.pipeline.simulation import Problem, Timeline, lock_step_cost, run_orders
from llm.parallel.pipeline.table import make_table
from llm.parallel.pipeline.validation import validate
from llm.training.pipeline import repeat_costs_of

DOCS = Path(__file__).parent.parent / 'docs'
LAYERS = 32
LENGTHS = (2048, 8192)
STAGES, MICROBATCHES = 4, 16
SCHEDULES = {
    'GPipe': PipelineConfig('gpipe'),
    '1F1B': PipelineConfig('1f1b'),
    'interleaved, 2 chunks': PipelineConfig('interleaved', chunks=2),
    'zero-bubble': PipelineConfig('zero_bubble'),
    'zero-bubble, 1 deferred': PipelineConfig('zero_bubble', deferred=1),
}


def llama_layer_costs(length: int) -> Costs:
    """Compiled FLOPs of the parts of one layer for one row, relative to its forward pass."""
    layer = LayerConfig(
        mixer=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128, implementation='reference'),
        feed_forward=FeedForwardConfig(d_ff=14_336),
    )
    model = DecoderConfig(128_256, 4096, LAYERS, (layer,), compute_dtype='bfloat16', remat='full')
    costs = repeat_costs_of(model, parameter_specs(Decoder(model)), 1, length, compiled_costs)
    return Costs(*(value / costs.forward for value in dataclasses.astuple(costs)))


def rows(costs: Costs) -> list[str]:
    """The table's lines for one length; costs in forward passes of a stage."""
    found = []
    repeats = LAYERS // STAGES
    parts = costs.forward, costs.recompute + costs.input_gradient, costs.weight_gradient
    for name, config in SCHEDULES.items():
        problem = Problem(config, STAGES, MICROBATCHES, LAYERS)
        table = make_table(problem, plan(problem, costs))
        validate(table)
        cost = table.cost(costs) / repeats
        paper = paper_cost(config, STAGES, MICROBATCHES, *parts)
        naive = '-'
        if config.schedule != 'zero_bubble':
            whole = Granularity(repeats, 'whole', repeats, repeats)
            naive = f'{lock_step_cost(run_orders(problem, whole), costs) / repeats:.1f}'
        inputs = table.input_slots / config.chunks
        numbers = f'{paper:.1f} | {cost:.1f} | {100 * (cost / paper - 1):+.1f}% | {naive} | {len(table.timeline)}'
        found.append(f'| {name} | {numbers} | {inputs:g} | {table.residual_cells + table.weight_cells} |')
    return found


def report() -> str:
    """The table, as Markdown."""
    head = [
        'schedule',
        "paper's formula",
        'here',
        'difference',
        'passes as ticks',
        'ticks',
        'inputs kept',
        'repeats kept',
    ]
    lines = []
    for length in LENGTHS:
        costs = llama_layer_costs(length)
        lines += [
            f'Rows of {length:,} tokens. Parts of a layer: recomputation {costs.recompute:.2f}, input gradient '
            f'{costs.input_gradient:.2f}, weight gradient {costs.weight_gradient:.2f} times the forward pass.',
            '',
            '| ' + ' | '.join(head) + ' |',
            '|---' * len(head) + '|',
            *rows(costs),
            '',
        ]
    return '\n'.join(lines)


_FILL = {
    Operation.FORWARD: '#5b8def',
    Operation.BACKWARD: '#3fa77a',
    Operation.RECOMPUTE: '#a9d8c2',
    Operation.INPUT_GRADIENT: '#3fa77a',
    Operation.RECOMPUTE_INPUT_GRADIENT: '#3fa77a',
    Operation.WEIGHT_GRADIENT: '#e8a33d',
}
_WIDTH, _ROW, _LEFT, _TOP = 1160, 30, 62, 26


def picture(name: str, problem: Problem, timeline: Timeline, costs: Costs) -> str:
    """A timeline as SVG: a row for each stage, time to the right, numbers of microbatches; what is empty is waiting."""
    starts, now = [], 0.0
    for row in timeline:
        starts.append(now)
        now += max((costs.of(piece.operation) * piece.count for piece in row if piece is not None), default=0.0)
    scale = (_WIDTH - _LEFT - 8) / now
    height = _TOP + _ROW * problem.stages + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="16" font-size="13">{name}: {problem.stages} stages, {problem.microbatches} '
        f'microbatches, {now * problem.stages / problem.repeats:.1f} forward passes of a stage</text>',
    ]
    for stage in range(problem.stages):
        y = _TOP + stage * _ROW
        parts.append(f'<text x="6" y="{y + 19}">stage {stage}</text>')
        for tick, row in enumerate(timeline):
            piece = row[stage]
            if piece is None:
                continue
            x, width = _LEFT + scale * starts[tick], scale * costs.of(piece.operation) * piece.count
            light = ' fill-opacity="0.55"' if piece.chunk % 2 else ''
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.6, 0.6):.1f}" height="{_ROW - 5}" '
                f'fill="{_FILL[piece.operation]}"{light}/>'
            )
            begins = tick == 0 or timeline[tick - 1][stage] is None or _mark(timeline[tick - 1][stage]) != _mark(piece)
            if begins:
                parts.append(f'<text x="{x + 1.5:.1f}" y="{y + 17}" font-size="9">{piece.microbatch + 1}</text>')
    x = float(_LEFT)
    for label, operation in (
        ('forward', Operation.FORWARD),
        ('recomputation', Operation.RECOMPUTE),
        ('input gradient, or the whole backward pass', Operation.BACKWARD),
        ('weight gradient', Operation.WEIGHT_GRADIENT),
    ):
        parts.append(f'<rect x="{x:g}" y="{height - 22}" width="12" height="12" fill="{_FILL[operation]}"/>')
        parts.append(f'<text x="{x + 17:g}" y="{height - 12}">{label}</text>')
        x += 40 + 6.2 * len(label)
    return '\n'.join([*parts, '</svg>', ''])


def _mark(piece: object) -> tuple[object, ...]:
    return tuple(getattr(piece, name) for name in ('operation', 'microbatch', 'chunk'))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='write docs/parallelism.md and docs/pipeline/*.svg')
    arguments = parser.parse_args()
    text = report()
    print(text)
    if not arguments.write:
        return
    page = DOCS / 'parallelism.md'
    marks = '<!-- tools/pipeline_schedules.py -->\n', '<!-- end -->'
    pattern = re.compile(re.escape(marks[0]) + '.*?' + re.escape(marks[1]), re.DOTALL)
    page.write_text(
        pattern.sub(lambda _: marks[0] + text + marks[1], page.read_text(encoding='utf-8')), encoding='utf-8'
    )
    costs = Costs()
    (DOCS / 'pipeline').mkdir(exist_ok=True)
    for name, config in SCHEDULES.items():
        problem = Problem(config, STAGES, 8, STAGES * 2)
        if config.deferred is None:
            drawn = picture(name, problem, plan(problem, costs), costs)
            (DOCS / 'pipeline' / f'{config.schedule}.svg').write_text(drawn, encoding='utf-8')
    problem = Problem(PipelineConfig('1f1b'), STAGES, 8, STAGES * 2)
    naive = run_orders(problem, Granularity(2, 'whole', 2, 2))
    drawn = picture('1F1B with whole passes as ticks', problem, naive, costs)
    (DOCS / 'pipeline' / '1f1b_whole_passes.svg').write_text(drawn, encoding='utf-8')


if __name__ == '__main__':
    main()
