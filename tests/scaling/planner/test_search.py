import dataclasses

import pytest

from llm.errors import UserError
from llm.parallel.pipeline.schedules import PipelineConfig
from llm.scaling.planner.advice import cheapest_change
from llm.scaling.planner.planning import estimate
from llm.scaling.planner.search import SearchConfig, candidates, search
from llm.scaling.planner.topology import find_topology
from tests.scaling.planner.small_runs import small_run

PIPELINE = PipelineConfig('interleaved', chunks=3)
H100 = find_topology('h100:8')


def small_memory(gigabytes):
    """Eight H100s with less memory."""
    return dataclasses.replace(H100, chip=dataclasses.replace(H100.chip, hbm_bytes=gigabytes * 1e9))


def test_every_combination_is_a_candidate():
    config = SearchConfig(axes=('data', 'fsdp'), remats=('none', 'full'), microbatches=(1, 2, 3))
    found = list(candidates(small_run(), H100, config))
    # 8 = 1x8 = 2x4 = 4x2 = 8x1; three does not divide sixteen rows.
    assert len(found) == 4 * 2 * 2 == len(set(found))
    assert {each.mesh.data * each.mesh.fsdp for each in found} == {8}


def test_other_axes_stay_as_the_run_has_them():
    config = SearchConfig(axes=('fsdp',), remats=('full',), microbatches=(1,))
    (only,) = candidates(small_run(mesh={'tensor': 4}), H100, config)
    assert (only.mesh.fsdp, only.mesh.tensor, only.mesh.data) == (2, 4, 1)


def test_schedules_are_tried_where_there_are_stages():
    config = SearchConfig(axes=('data', 'pipeline'), remats=('full',), microbatches=(4,), chunks=(2, 4))
    found = list(candidates(small_run(), H100, config))
    tried = {(each.mesh.pipeline, each.pipeline.schedule, each.pipeline.chunks) for each in found}
    schedules = [('gpipe', 1), ('1f1b', 1), ('interleaved', 2), ('interleaved', 4), ('zero_bubble', 1)]
    assert tried == {(1, '1f1b', 1)} | {(stages, *each) for stages in (2, 4, 8) for each in schedules}
    assert len(found) == len(tried)
    # A pipeline that is not up for change is run as it is.
    fixed = SearchConfig(axes=('data',), remats=('full',), microbatches=(4,))
    (only,) = candidates(dataclasses.replace(small_run(mesh={'pipeline': 2}), pipeline=PIPELINE), H100, fixed)
    assert only.pipeline == PIPELINE


def test_a_search_over_schedules_names_them_and_says_why_each_lost():
    run = small_run(step={'batch_size': 32}, num_layers=32)
    config = SearchConfig(axes=('data', 'pipeline'), remats=('full', 'none'), microbatches=(2, 16), chunks=(2, 5))
    ranked = search(run, H100, config)
    by_name = {each.run.describe(): each for each in ranked}
    assert len(by_name) == len(ranked)

    def row(schedule, remat='full', stages=4):
        data = f'data={8 // stages} ' if stages < 8 else ''
        return by_name[f'pipeline={stages} {data}({schedule}), 16 microbatches, remat {remat}'.replace('  ', ' ')]

    # What the schedules are known for: a shorter bubble, and what it is paid with.
    bubble = {
        name: row(name).plan.roofline.bubble for name in ('gpipe', '1f1b', 'interleaved, 2 chunks', 'zero_bubble')
    }
    kept = {name: row(name).plan.estimate.activations for name in bubble}
    assert bubble['interleaved, 2 chunks'] < bubble['1f1b'] and bubble['zero_bubble'] < bubble['1f1b']
    assert kept['1f1b'] == min(kept.values())
    assert row('1f1b', 'none').plan.estimate.activations > 4 * kept['1f1b']
    assert row('1f1b', 'none').plan.flops.hardware < row('1f1b').plan.flops.hardware
    assert 'of it waiting for other stages' in row('1f1b').reason
    few = [each for each in ranked if each.run.mesh.pipeline > 2 and each.run.step.gradient_accumulation == 2]
    assert few and all('are fewer than' in each.reason for each in few)
    blocks = [each for each in ranked if each.run.mesh.pipeline == 8 and each.run.pipeline.chunks == 5]
    assert blocks and all(
        '32 repeats of the layer pattern are fewer than the 40 blocks' in each.reason for each in blocks
    )


def test_winner_is_the_fastest_that_fits_and_losers_have_reasons():
    ranked = search(small_run(), H100, SearchConfig())
    winner, *losers = ranked
    assert winner.reason == '' and winner.plan.fits
    assert all(each.reason for each in losers)
    steps = [each.plan.roofline.step for each in ranked if each.plan is not None]
    assert steps == sorted(steps)


def test_what_needs_too_much_memory_comes_after_what_fits():
    everything = sorted(each.plan.needed for each in search(small_run(), H100, SearchConfig()) if each.plan)
    middle = everything[len(everything) // 2] / 1e9
    ranked = [each for each in search(small_run(), small_memory(middle), SearchConfig()) if each.plan]
    fits = [each.plan.fits for each in ranked]
    assert fits == sorted(fits, reverse=True) and True in fits and False in fits
    assert all('needs ' in each.reason for each in ranked if not each.plan.fits)


def test_impossible_layouts_are_last_with_what_is_wrong():
    run = small_run(step={'batch_size': 4})
    ranked = search(run, H100, SearchConfig(axes=('data', 'tensor'), remats=('full',), microbatches=(1,)))
    reasons = {(each.run.mesh.data, each.run.mesh.tensor): each.reason for each in ranked}
    assert 'cannot be divided over 8 devices' in reasons[8, 1]  # 4 rows
    assert 'cannot be divided over mesh axis' in reasons[1, 8]  # 4 heads
    assert ranked[0].plan is not None and ranked[-1].plan is None


def test_nothing_possible_is_a_mistake():
    with pytest.raises(UserError, match='no mesh of h100:8 suits'):
        search(small_run(step={'batch_size': 1}), H100, SearchConfig(axes=('data',), microbatches=(1,)))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'axes': ('data', 'model')}, "axes has \\['model'\\]"),
        ({'remats': ()}, 'remats is empty'),
        ({'schedules': ()}, 'schedules is empty'),
        ({'schedules': ('1f2b',)}, "no pipeline schedule is called '1f2b'"),
        ({'chunks': (1, 2)}, "schedule 'interleaved' with 1 chunks"),
        ({'microbatches': (0, 1)}, 'below 1'),
        ({'compile_best': -1}, 'compile_best is -1'),
        ({'margin': 1.0}, 'margin is 1.0'),
    ],
)
def test_bad_search(fields, message):
    with pytest.raises(UserError, match=message):
        SearchConfig(**fields)


def test_a_run_that_fits_needs_no_change():
    assert cheapest_change(estimate(small_run(mesh={'data': 8}), H100)) is None


def test_cheapest_change_makes_it_fit():
    run = small_run(mesh={'data': 8}, remat='none')
    needed = estimate(run, H100).needed
    plan = estimate(run, small_memory(0.9 * needed / 1e9))
    assert not plan.fits
    advice = cheapest_change(plan)
    assert estimate(advice.run, plan.topology).fits
    assert advice.needed <= plan.available
    assert advice.run.tokens_per_step == run.tokens_per_step  # what is learned stays
    assert advice.change


def test_batch_shrinks_only_if_nothing_else_helps():
    run = small_run(mesh={'data': 8}, remat='none')
    least = min(
        estimate(each, H100).needed
        for each in candidates(run, H100, SearchConfig(microbatches=(1, 2)))
        if each.mesh.tensor <= 4
    )
    nothing = estimate(run, small_memory(0.2 * least / 1e9))
    assert cheapest_change(nothing) is None


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_compiled_candidates_win_and_others_are_compared_by_the_same_model():
    """The fastest by the model is compiled; what was not compiled is set against the model's figure of it."""
    topology = find_topology('v5e:2x2')
    config = SearchConfig(axes=('data', 'fsdp'), remats=('full',), microbatches=(1,), compile_best=1)
    said = []
    ranked = search(small_run(), topology, config, say=said.append)
    assert [each.is_compiled for each in ranked] == [True, False, False]
    assert len(said) == 1 and 'compiling 1 of 1' in said[0]
    best, *_, last = ranked
    expected = last.plan.roofline.step / estimate(best.run, topology).roofline.step - 1
    assert last.reason.startswith(f'{100 * expected:.1f}% slower') and 'analytic' in last.reason


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_the_best_schedule_is_compiled():
    config = SearchConfig(axes=('pipeline',), remats=('full',), microbatches=(8,), compile_best=1)
    run = small_run(step={'batch_size': 32}, num_layers=8, implementation='auto')  # a kernel, in a stage of one device
    ranked = search(run, find_topology('v5e:2x2'), config)
    assert [each.is_compiled for each in ranked] == [True, False, False, False]
    best = ranked[0]
    assert f'({best.run.pipeline.schedule}' in best.run.describe()
    assert best.plan.compiled.program.traffic()
    assert {each.run.pipeline.schedule for each in ranked} == {'gpipe', '1f1b', 'interleaved', 'zero_bubble'}
    assert all(each.reason for each in ranked[1:])
