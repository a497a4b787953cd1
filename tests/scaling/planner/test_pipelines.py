"""What the planner says that stages keep, against the buffers of the executor."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from llm.models.attention import AttentionConfig
from llm.models.multi_token import MultiTokenConfig
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.parallel.pipeline.split import split_backward
from llm.scaling.accounting import flops_per_token
from llm.scaling.planner.abstract import Placement, model_specs
from llm.scaling.planner.layer_costs import layer_costs
from llm.scaling.planner.pipelines import idle_share, kept_bytes, schedule_of
from llm.scaling.planner.planning import estimate
from llm.scaling.planner.stacks import stacks_of, with_remat
from llm.scaling.planner.topology import find_topology
from llm.scaling.planner.work import step_flops, step_traffic
from llm.training.stages import staged
from tests.models.small_encoders import bert, t5
from tests.scaling.planner.small_runs import LENGTH, D, sizes_of, small_run

ROWS = 4  # of a microbatch


def _pipeline_run(remat, implementation, stages=2, layers=16, **model):
    step = {'batch_size': 8 * ROWS, 'gradient_accumulation': 8}
    return small_run(
        mesh={'pipeline': stages}, step=step, remat=remat, num_layers=layers, implementation=implementation, **model
    )


def _bert(layers=16):
    mixer = AttentionConfig(4, 4, D // 4, causal=False, implementation='reference', qkv_bias=True, output_bias=True)
    return bert(layers, vocab=64, width=D, d_ff=3 * D, mixer=mixer, max_positions=LENGTH)


def _t5(encoder_layers=16):
    """Its decoder reads 29 tokens where the encoder reads 128."""

    def held(stack, layers):
        (layer,) = stack.pattern
        mixer, cross = (
            each and dataclasses.replace(each, implementation='reference') for each in (layer.mixer, layer.cross)
        )
        return dataclasses.replace(
            stack, num_layers=layers, pattern=(dataclasses.replace(layer, mixer=mixer, cross=cross),)
        )

    model = t5(vocab_size=64)
    return dataclasses.replace(model, encoder=held(model.encoder, encoder_layers), decoder=held(model.decoder, 16))


def _run_of(model, remat, stages=2, schedule='1f1b', rows=ROWS):
    """A pipeline of another model."""
    model = with_remat(dataclasses.replace(model, compute_dtype='bfloat16'), remat)
    run = small_run(mesh={'pipeline': stages}, step={'batch_size': 8 * rows, 'gradient_accumulation': 8})
    return dataclasses.replace(run, model=model, pipeline=PipelineConfig(schedule))


def _of_the_executor(run):
    """Bytes of a stage's buffers, for each token that the model's last layers read."""
    model = staged(run.model, 0.0)
    row, parts, table = run.row, model.parts(model_specs(run.model)), schedule_of(run, 2)
    left = table.problem.staged_repeats < model.repeats
    stages = model.stages.without_trunk() if left else model.stages

    def structs(specs, skip=0):
        return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape[skip:], jnp.bfloat16), specs)

    arrays = ('inputs', 'segment_ids', 'positions')
    batch = dict.fromkeys(arrays, jax.ShapeDtypeStruct((ROWS, row.read), jnp.int32))
    batch |= {f'encoder_{name}': jax.ShapeDtypeStruct((ROWS, row.text), jnp.int32) for name in arrays}
    context = jax.eval_shape(stages.context, batch, None)
    x = jax.eval_shape(stages.embed, structs(parts['ends']), batch, None)
    split = split_backward(
        lambda p, x, c: stages.repeat(p, x, jnp.int32(0), c), structs(parts['layers'], 1), x, context, stages.remat
    )

    def size(structs):
        return sum(math.prod(struct.shape) * struct.dtype.itemsize for struct in structs) / (ROWS * row.read)

    return (
        table.input_slots * table.problem.chunk_repeats * size(split.kept)
        + table.gradient_slots * size(jax.tree.leaves(jax.eval_shape(stages.output, x)))
        + table.residual_cells * size(split.residuals)
        + table.weight_cells * size(split.operands)
    )


def _planned(run):
    placement = Placement.of(sizes_of(run), run.rules)
    stack = stacks_of(run.model, run.row)[-1]
    costs = [layer_costs(layer, run.model, placement, stack, 'cpu') for layer in stack.config.pattern]
    return kept_bytes(run, stack, costs, 2)


@pytest.mark.parametrize(
    'run',
    [
        *(
            _pipeline_run(remat, kernel)
            for remat in ('full', 'dots_no_batch', 'none')
            for kernel in ('reference', 'chunked')
        ),
        _pipeline_run('dots', 'reference'),
        _pipeline_run('full', 'reference', multi_token=MultiTokenConfig(1, 'parallel')),
        _pipeline_run('full', 'reference', layers=17, multi_token=MultiTokenConfig(1, 'parallel')),
        _run_of(_bert(), 'none'),
        _run_of(_bert(), 'full', schedule='zero_bubble'),
        _run_of(_t5(), 'none'),
        _run_of(_t5(), 'full', schedule='zero_bubble'),
    ],
    ids=lambda run: f'{type(run.model).__name__}-{run.describe()}',
)
def test_what_is_kept_is_what_the_executor_keeps(run):
    # Kernels may keep more than what they make, and a policy of products their own products.
    near = 0.12 if stacks_of(run.model, run.row)[-1].config.remat in ('none', 'dots') else 1e-3
    assert _planned(run) == pytest.approx(_of_the_executor(run), rel=near)


def test_layers_that_are_left_over_do_not_wait():
    """17 layers on 4 stages: 16 in the pipeline and one shared, of rows that they can share, 4, or cannot, 1."""
    even, uneven = (_pipeline_run('full', 'chunked', 4, layers) for layers in (16, 17))
    few = small_run(
        mesh={'pipeline': 4},
        step={'batch_size': 8, 'gradient_accumulation': 8},
        remat='full',
        num_layers=17,
        implementation='chunked',
    )
    shares = [idle_share(run, Placement.of(sizes_of(run), run.rules)) for run in (even, uneven, few)]
    # In units of the work of a layer, of all microbatches: a stage's work, over that and the bubble.
    steps = [4 / (1 - shares[0]), (17 / 4) / (1 - shares[1]), (17 / 4) / (1 - shares[2])]
    assert steps[1] == pytest.approx(steps[0] + 1 / 4)
    assert steps[2] == pytest.approx(steps[0] + 1)


@pytest.mark.parametrize(('remat', 'forward'), [('none', 2), ('full', 3)])
def test_all_stages_run_an_encoder_again(remat, forward):
    """As its layers come before the stages': beside what recomputation of all layers makes of it."""
    one, two = (_run_of(_t5(layers), remat) for layers in (16, 32))
    flops = [step_flops(run, sizes_of(run), 'cpu') for run in (one, two)]
    per_token = [
        flops_per_token(run.model, model_specs(run.model), run.row).forward(causal=False) for run in (one, two)
    ]
    made = one.tokens_per_step * (per_token[1] - per_token[0]) / 2  # forward, by each of the two
    last = {'none': 0.0, 'full': 2 * 16 * 32 * 48 / (per_token[1] - per_token[0])}[remat]  # is not computed again
    assert flops[1].recomputed - flops[0].recomputed == pytest.approx((forward - 1 - last) * made)
    assert flops[1].hardware - flops[0].hardware == pytest.approx((forward + 2 - last) * made)


def test_an_encoder_does_not_wait():
    """What it adds to a step is its work, shared by rows; and all of it on every stage where there is one row."""
    runs = [_run_of(_t5(layers), 'full', 4, rows=rows) for rows, layers in ((4, 1), (4, 3), (1, 1), (1, 3))]
    steps = []
    for run in runs:
        idle = idle_share(run, Placement.of(sizes_of(run), run.rules))
        steps.append(step_flops(run, sizes_of(run), 'cpu').hardware / (1 - idle))
    work = [step_flops(run, sizes_of(run), 'cpu').hardware for run in runs]
    assert steps[1] - steps[0] == pytest.approx(work[1] - work[0], rel=0.005)
    assert steps[3] - steps[2] == pytest.approx(4 * (work[3] - work[2]), rel=0.005)


def test_plans_of_an_encoder_and_of_both_sides():
    """Messages hold the encoder's output too, and what the encoder keeps is there in between two ticks alone.

    Its weights are gathered for two forward passes and one backward pass of each microbatch.
    """
    for model, tokens in ((_bert(), LENGTH), (_t5(), LENGTH + 29)):
        run = _run_of(model, 'full')
        (sent,) = (row for row in step_traffic(run, sizes_of(run), 'cpu') if row.kind == 'collective-permute')
        assert sent.payload == 2 * 8 * ROWS * tokens * model.d_model * 2
        assert estimate(run, find_topology('cpu:2')).roofline.bubble > 0
    runs = [_run_of(_t5(layers), 'full') for layers in (16, 32)]
    traffic = [{row.kind: row for row in step_traffic(run, sizes_of(run), 'cpu')} for run in runs]
    for kind, passes in (('all-gather', 3), ('reduce-scatter', 1)):
        more = traffic[1][kind].payload - traffic[0][kind].payload
        assert more == 8 * passes * 16 * 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    small, large = (estimate(run, find_topology('cpu:2')).estimate for run in runs)
    assert large.activations == small.activations
    assert large.layer - small.layer == pytest.approx(16 * ROWS * LENGTH * 32 * 2 / 2)


def test_stages_share_the_projections_of_multi_token_prediction():
    run = small_run(mesh={'pipeline': 2}, num_layers=4, multi_token=MultiTokenConfig(2, 'sequential'))
    found = step_flops(run, sizes_of(run), 'cpu')
    assert 2 * found.hardware == pytest.approx(found.model)
