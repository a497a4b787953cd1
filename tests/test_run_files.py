"""Every run file resolves to a job as it stands, with its REQUIRED knobs set."""

from pathlib import Path

import pytest

from llm.configuration import load_job

RUNS = sorted(Path(__file__).parents[1].glob('gin_configs/runs/*.gin'))


@pytest.mark.parametrize('path', RUNS, ids=lambda path: path.stem)
def test_run_file_resolves_and_reads_back_as_the_same_job(path, tmp_path):
    required = [f'{line.split()[0]} = "x.txt"' for line in path.read_text().splitlines() if '%gin.REQUIRED' in line]
    job, text = load_job([str(path)], required)
    operative = tmp_path / 'config.gin'
    operative.write_text(text)
    assert load_job([str(operative)]) == (job, text)


@pytest.mark.parametrize('path', RUNS, ids=lambda path: path.stem)
def test_run_file_begins_with_what_it_is_and_how_to_start_it(path):
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith('# ') and first.endswith('.')
    assert f'python -m llm.main --gin_file=gin_configs/runs/{path.name}' in second
