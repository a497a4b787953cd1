import dataclasses

import pytest

from llm.errors import UserError
from llm.scaling.planner.advice import cheapest_change
from llm.scaling.planner.planning import estimate
from llm.scaling.planner.search import SearchConfig, candidates, search
from llm.scaling.planner.topology import find_topology
from tests.scaling.planner.small_runs import small_run

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
