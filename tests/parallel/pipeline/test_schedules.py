"""Orders as the papers draw them, their formulas, and what a user can get wrong."""

import pytest

from llm.errors import UserError
from llm.parallel.pipeline.schedules import PipelineConfig, orders, paper_cost


def _drawn(config, stages, microbatches):
    """'F1 F2 B1 ...' for each stage, microbatches and (after a dot) chunks counted from 1."""

    def name(kind, microbatch, chunk):
        return f'{kind.value}{microbatch + 1}' + (f'.{chunk + 1}' if config.chunks > 1 else '')

    return [' '.join(name(*each) for each in order) for order in orders(config, stages, microbatches)]


def test_gpipe_is_figure_2c_of_huang_et_al():
    assert _drawn(PipelineConfig('gpipe'), 4, 4) == ['F1 F2 F3 F4 B4 B3 B2 B1'] * 4


def test_1f1b_is_figure_4_of_narayanan_et_al():
    assert _drawn(PipelineConfig('1f1b'), 4, 8) == [
        'F1 F2 F3 F4 B1 F5 B2 F6 B3 F7 B4 F8 B5 B6 B7 B8',
        'F1 F2 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 F8 B6 B7 B8',
        'F1 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 F8 B7 B8',
        'F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 F8 B8',
    ]


def test_interleaved_is_figure_4_of_narayanan_et_al():
    first, *_, last = _drawn(PipelineConfig('interleaved', chunks=2), 4, 8)
    assert first.startswith('F1.1 F2.1 F3.1 F4.1 F1.2 F2.2 F3.2 F4.2 F5.1 F6.1 F7.1 B1.2 F8.1 B2.2 F5.2 B3.2 F6.2 B4.2')
    assert last.startswith('F1.1 F2.1 F3.1 F4.1 F1.2 B1.2 F2.2 B2.2 F3.2 B3.2 F4.2 B4.2 F5.1 B1.1')
    assert last.endswith('B8.1')


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        # Forward 1, backward 2 with recomputation, weights 1: 16 * 4 and a bubble of 3 * (4, 4, 4 / 2, 2).
        (PipelineConfig('gpipe'), 76),
        (PipelineConfig('1f1b'), 76),
        (PipelineConfig('interleaved', chunks=2), 70),
        (PipelineConfig('zero_bubble'), 70),
    ],
    ids=lambda value: value.schedule if isinstance(value, PipelineConfig) else None,
)
def test_formulas(config, expected):
    assert paper_cost(config, 4, 16, forward=1, backward=2, weight=1) == expected


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('1f2b',), "no pipeline schedule is called '1f2b'"),
        (('1f1b', 2), "schedule '1f1b' with 2 chunks"),
        (('interleaved', 1), "schedule 'interleaved' with 1 chunks"),
        (('interleaved', 0), "schedule 'interleaved' with 0 chunks"),
        (('gpipe', 1, 2), 'with 2 deferred weight gradients'),
        (('zero_bubble', 1, 0), 'with 0 deferred weight gradients'),
    ],
)
def test_configs_that_make_no_sense(arguments, message):
    with pytest.raises(UserError, match=message):
        PipelineConfig(*arguments)


@pytest.mark.parametrize(
    ('config', 'sizes', 'message'),
    [
        (PipelineConfig('1f1b'), (4, 8, 3), '3 repeats .* fewer than the 4 blocks of 4 pipeline stages'),
        (PipelineConfig('interleaved', 3), (2, 8, 5), '5 repeats .* the 6 blocks of 2 pipeline stages of 3 chunks'),
        (PipelineConfig('gpipe'), (4, 3, 8), '3 microbatches are fewer than 4 pipeline stages'),
        (PipelineConfig('interleaved', 2), (4, 6, 8), 'a multiple of 4 microbatches, not 6'),
    ],
)
def test_runs_that_do_not_fit(config, sizes, message):
    with pytest.raises(UserError, match=message):
        config.check(*sizes)
