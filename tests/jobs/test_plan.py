"""The plan job, started as a person starts it."""

import json
import os
import subprocess
import sys

import pytest

from llm.main import main

ARGUMENTS = (
    '--gin_file=gin_configs/runs/plan.gin',
    '--gin_file=gin_configs/models/tiny.gin',
    '--gin_bindings=BATCH_SIZE = 16',
    '--gin_bindings=SEQUENCE_LENGTH = 32',
)


def start(*bindings, topology='h100:8', directory=None):
    words = [f'--gin_bindings=TOPOLOGY = {topology!r}', f'--gin_bindings=OUTPUT_DIRECTORY = {directory!r}']
    return main([*ARGUMENTS, *words, *(f'--gin_bindings={each}' for each in bindings)])


def test_a_run_is_planned_by_roofline_alone(capsys, tmp_path):
    assert start(directory=str(tmp_path / 'plan')) == 0
    text = capsys.readouterr().out
    assert '8 chips' in text and 'fits' in text and 'by the analytic model' in text and 'bound by' in text
    record = json.loads((tmp_path / 'plan' / 'plan.json').read_text())
    assert record['topology']['chips'] == 8 and record['run']['mesh']['fsdp'] == 8
    assert 'compiler' not in record and record['search'] == []
    assert (tmp_path / 'plan' / 'plan.html').read_text().startswith('<!doctype html>')


def test_search_prints_a_ranked_table(capsys, tmp_path):
    assert start('SEARCH = @search.SearchConfig()', directory=str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert 'the best that was found' in text and 'slower, bound by' in text
    record = json.loads((tmp_path / 'plan.json').read_text())
    assert record['search'][0]['reason'] == '' and len(record['search']) > 10


def test_compiled_for_this_cpu(capsys):
    assert start('FSDP = 8', 'mesh.MeshConfig.fsdp = 8', topology='cpu:8') == 2  # FSDP is no knob
    assert 'FSDP' in capsys.readouterr().err
    assert start(topology='cpu:8') == 0
    text = capsys.readouterr().out
    assert 'Memory of a device, by the compiler' in text and 'in the compiled program' in text


def test_dry_run_describes_and_compiles_nothing(capsys):
    assert main([*ARGUMENTS, "--gin_bindings=TOPOLOGY = 'h100:8x4'", '--dry_run']) == 0
    assert 'sharding over the mesh' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('topology', 'bindings', 'message'),
    [
        ('v5e', (), 'is no topology'),
        ('h100:8', ('TENSOR = 3',), 'cannot use 8 devices evenly'),
        ('h100:8', ('BATCH_SIZE = 4',), 'cannot be divided over 8 devices'),
        ('h100:8', ('NUM_SLICES = 2',), 'is no machine of GPUs'),
        ('v5e:32x32', (), 'the largest slice of v5e'),
        ('h100:8', ("SEARCH = 'yes'",), 'search'),
    ],
)
def test_mistakes_are_one_line(topology, bindings, message, capsys):
    assert start(*bindings, topology=topology) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith('error: ') and error.count('\n') == 0
    assert message in error


@pytest.mark.parametrize(
    ('run', 'more', 'said'),
    [
        ('gpt2_124m_text', (), '512 rows of 1024 tokens a step in 4 microbatches'),
        ('pretrain_sentence_pairs', (), '32 rows of 128 tokens a step in 1 microbatch,'),
        ('pretrain_span_corruption', ('SEARCH = @search.SearchConfig()',), 'the best that was found'),
        ('pretrain_transformer_xl', (), 'remembered'),
    ],
)
def test_a_pretraining_runs_own_file_can_be_planned(run, more, said, capsys):
    code = main(
        [
            f'--gin_file=gin_configs/runs/{run}.gin',
            '--gin_file=gin_configs/jobs/plan_pretraining.gin',
            "--gin_bindings=FILES = 'none.txt'",
            "--gin_bindings=TOPOLOGY = 'h100:8'",
            *(f'--gin_bindings={each}' for each in more),
        ]
    )
    text = capsys.readouterr()
    assert code == 0, text.err
    assert said in text.out


def test_planning_starts_without_tensorflow():
    words = [*ARGUMENTS, "--gin_bindings=TOPOLOGY = 'h100:8'", '--gin_bindings=OUTPUT_DIRECTORY = None']
    program = (
        f'import sys; from llm.main import main; code = main({words!r}); '
        "sys.exit(code or any(name in sys.modules for name in ('tensorflow', 'seqio')))"
    )
    assert subprocess.run([sys.executable, '-c', program], check=False, capture_output=True).returncode == 0


@pytest.mark.tpu_compile
def test_missing_tpu_compiler_is_a_users_mistake():
    """As on a machine without libtpu: the import system finds none."""
    words = [*ARGUMENTS, "--gin_bindings=TOPOLOGY = 'v5e:2x2'", '--gin_bindings=OUTPUT_DIRECTORY = None']
    program = f"import sys; sys.modules['libtpu'] = None; from llm.main import main; sys.exit(main({words!r}))"
    environment = {name: value for name, value in os.environ.items() if name != 'TPU_LIBRARY_PATH'}
    found = subprocess.run(
        [sys.executable, '-c', program], check=False, capture_output=True, text=True, env=environment
    )
    assert found.returncode == 2
    assert 'TPU compiler is not installed' in found.stderr and 'llm-jax[tpu]' in found.stderr
