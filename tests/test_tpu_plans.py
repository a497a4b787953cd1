"""docs/tpu_plans.md is what tools/tpu_plans.py makes of what was compiled, and every row of it can be made."""

import json

from tools import tpu_plans


def test_page_is_of_the_kept_results():
    assert tpu_plans.PAGE.read_text() == tpu_plans.page(json.loads(tpu_plans.RESULTS.read_text()))


def test_every_row_is_a_job_that_uses_all_chips():
    for row in tpu_plans.ROWS:
        job = row.job()
        chips = row.slices
        for side in row.topology.partition(':')[2].split('x'):
            chips *= int(side)
        devices = 1
        for size in row.mesh.values():
            devices *= size
        assert devices == chips, row.name
        assert (job.run.step.batch_size, job.run.step.sequence_length) == (row.rows, row.length)
        assert job.run.model.remat == ('offload' if row.offloaded else 'full'), row.name
        assert job.run.model.remat_names == row.offloaded and job.run.model.compute_dtype == 'bfloat16'
        assert job.run.optimizer.kind == 'adamw'


def test_tokens_of_a_chip_are_those_of_the_reference():
    tokens = {row.name: row.rows * row.length for row in tpu_plans.ROWS}
    chips = {'7b_16': 16, '7b_256': 256, '8b_256': 256, '70b_128': 128, '70b_pipeline': 128, '8b_sequence': 32}
    found = {name: tokens[name] / count for name, count in chips.items()}
    assert found == {
        '7b_16': 2048,
        '7b_256': 8192,
        '8b_256': 16_384,
        '70b_128': 16_384,
        '70b_pipeline': 8192,
        '8b_sequence': 8192,
    }
