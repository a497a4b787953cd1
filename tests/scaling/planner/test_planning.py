"""Plans by the compiler, on simulated CPU devices and for TPUs."""

import dataclasses
import json
import math

import pytest

from llm.errors import UserError
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.scaling.accounting import training_memory
from llm.scaling.planner.compiling import CompiledStep, OutOfMemory, read_refusal
from llm.scaling.planner.page import render
from llm.scaling.planner.planning import estimate, plan
from llm.scaling.planner.quantities import byte_size
from llm.scaling.planner.records import candidate_record, plan_record, to_json
from llm.scaling.planner.search import SearchConfig, search
from llm.scaling.planner.text import format_plan, format_search
from llm.scaling.planner.topology import find_topology
from tests.scaling.planner.small_runs import LENGTH, ROWS, D, F, H, K, L, small_run

# Enough layers and tokens that what waits for the backward pass is a good part of a TPU's temporaries.
LARGE = {'mesh': {'fsdp': 4}, 'step': {'batch_size': 64, 'sequence_length': 512}, 'num_layers': 16}


@pytest.fixture(scope='module')
def on_cpu():
    return plan(small_run(mesh={'fsdp': 8}, compute_dtype='float32'), find_topology('cpu:8'))


def test_arguments_of_a_compiled_step_are_state_and_batch(on_cpu):
    memory = on_cpu.compiled.memory
    assert memory.arguments == pytest.approx(on_cpu.estimate.arguments, abs=64)
    assert on_cpu.needed == memory.total > memory.arguments


def test_new_state_takes_the_place_of_the_old(on_cpu):
    """The donated train state is most of the arguments; of the outputs only the metrics are new."""
    memory, state = on_cpu.compiled.memory, on_cpu.state
    assert memory.aliased == state.parameters + state.optimizer + 4  # the count of steps
    assert 0 < memory.outputs - memory.aliased < 1000


def test_state_is_what_the_trainer_has(on_cpu):
    trainer = on_cpu.run.trainer(on_cpu.topology)
    found = training_memory(trainer.abstract_state['parameters'], trainer.abstract_state['optimizer'])
    assert on_cpu.state == found


def test_collectives_of_a_compiled_step_are_along_its_mesh(on_cpu):
    rows = [each.traffic for each in on_cpu.roofline.links]
    assert {row.axes for row in rows} == {('fsdp',)}
    assert on_cpu.compiled.program.unknown_loops == ()
    # Every matrix of every layer is gathered at least twice.
    gathered = sum(row.payload for row in rows if row.kind == 'all-gather')
    assert gathered >= 2 * 4 * L * (4 * D * H * K + 3 * D * F)


def test_records_hold_finite_numbers_and_agree_with_the_plan(on_cpu):
    record = json.loads(to_json(plan_record(on_cpu), []))
    assert record['memory']['needed'] == on_cpu.needed
    assert record['run']['mesh']['fsdp'] == 8
    assert record['run']['tokens_per_device'] == ROWS * LENGTH / 8
    assert record['compiler']['memory']['temporaries'] == on_cpu.compiled.memory.temporaries
    assert record['roofline']['step'] > 0 and math.isfinite(record['roofline']['mfu'])
    assert record['search'] == []


def test_text_and_page_say_the_same(on_cpu):
    record = plan_record(on_cpu)
    text, page = format_plan(record), render(record, [])
    assert 'fsdp=8' in text and 'fsdp=8' in page
    total = byte_size(on_cpu.needed)
    assert total.endswith(' MB') and total in text and total in page
    assert 'http' not in page.replace(record['topology']['source'], '')  # nothing to fetch


def test_batch_that_does_not_divide_is_a_mistake():
    with pytest.raises(UserError, match='cannot be divided over 8 devices'):
        estimate(small_run(mesh={'fsdp': 8}, step={'batch_size': 12}), find_topology('h100:8'))


# Inputs of all layers of every microbatch in flight, and gradients on their way back: GPipe's last stage has them all.
@pytest.mark.parametrize(('schedule', 'kept'), [('gpipe', 12 * 8 + 12), ('1f1b', 2 * 8 + 1)])
def test_bubble_and_memory_of_a_pipeline(schedule, kept):
    """Two stages of eight layers, twelve microbatches of two rows: by the papers a step lasts 13/12 of its work."""
    run = small_run(
        mesh={'pipeline': 2},
        step={'batch_size': 24, 'gradient_accumulation': 12},
        remat='full',
        implementation='chunked',
        num_layers=16,
    )
    run = dataclasses.replace(run, pipeline=PipelineConfig(schedule))
    found = estimate(run, find_topology('h100:2'))
    work = found.roofline.step - found.roofline.bubble
    assert found.roofline.step / work == pytest.approx(13 / 12, rel=0.05)
    assert found.estimate.activations == kept * 2 * LENGTH * D * 2
    assert schedule in found.run.describe()


def test_search_without_a_compiler_is_reported():
    topology = find_topology('h100:8')
    ranked = search(small_run(), topology, SearchConfig(microbatches=(1,)))
    rows = [candidate_record(each) for each in ranked]
    text = format_search(rows)
    assert text.count('slower') == sum('slower' in row['reason'] for row in rows)
    assert all(not row['compiled'] for row in rows)
    assert rows[0]['run'] in render(plan_record(ranked[0].plan), rows)
    assert json.loads(to_json(plan_record(ranked[0].plan), rows))['search'][0]['reason'] == ''


def test_refusals_are_read():
    found = read_refusal('RESOURCE_EXHAUSTED: XLA:TPU compile. Used 24.79G of 15.75G hbm. Exceeded by 9.04G.', 1.0)
    assert (found.needed, found.available, found.partial) == (24.79 * 2**30, 15.75 * 2**30, False)
    assert read_refusal('INTERNAL: something else', 1.0) is None


@pytest.fixture(scope='module')
def on_tpu():
    return plan(small_run(**LARGE, remat='full'), find_topology('v5e:2x2'))


@pytest.mark.tpu_compile
def test_plan_for_a_tpu(on_tpu):
    found, topology = on_tpu, on_tpu.topology
    assert isinstance(found.compiled, CompiledStep) and found.fits
    assert found.compiled.memory.arguments == pytest.approx(found.estimate.arguments, rel=0.02)
    assert found.available == 15.75 * 2**30
    assert 0.9 < found.compiled.weights.ratio < 1.5
    # Compiler and analytic model agree on what sharded weights need, within the second gather of some.
    model = estimate(found.run, topology)
    sent = [sum(each.traffic.link_bytes for each in one.roofline.links) for one in (found, model)]
    assert 0.8 < sent[0] / sent[1] < 1.5


@pytest.mark.tpu_compile
def test_inputs_of_layers_wait_on_the_host_of_a_tpu(on_tpu):
    """Sixteen rows of 512 tokens a device, of sixteen layers; what the device has less of is most of that."""
    offload = plan(small_run(**LARGE, remat='offload', remat_names=('layer_input',)), on_tpu.topology)
    memory = offload.compiled.memory
    assert memory.host == offload.estimate.host == 16 * 16 * 512 * D * 2
    assert on_tpu.compiled.memory.host == on_tpu.estimate.host == on_tpu.host_bytes == 0
    assert on_tpu.compiled.memory.temp_size - memory.temp_size > 0.6 * memory.host
    assert offload.host_bytes == 2 * memory.host
    text = format_plan(plan_record(offload))
    assert 'on the host, beside it' in text and f'to and from the host ({byte_size(2 * memory.host)})' in text
    # The new train state takes the place of all arguments but the batch.
    assert memory.aliased == memory.arguments - 5 * 4 * 16 * 512


@pytest.mark.tpu_compile
def test_plan_that_a_tpu_refuses():
    """Eight million tokens, whose inputs to three layers alone are 13 GB, and much more in every layer."""
    found = plan(small_run(step={'batch_size': 65_536}, remat='none'), find_topology('v5e:1x1'))
    assert isinstance(found.compiled, OutOfMemory) and not found.fits
    assert found.needed > found.available == 15.75 * 2**30
    assert 'DOES NOT FIT' in format_plan(plan_record(found))
