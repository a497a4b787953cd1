import json
import math
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm.errors import UserError
from llm.training.metrics import JsonLines, MetricsWriter, cut_after, read_json_lines, read_metrics


def tensorboard_scalars(run_directory: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard's own reader sees them; its stub stands in for TensorFlow."""
    sys.modules.setdefault('tensorboard.compat.notf', types.ModuleType('notf'))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_directory / 'tensorboard'), size_guidance={'scalars': 0})
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()['scalars']}
    return {tag: values for tag, values in scalars.items() if values}


def without_timing(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != 'timing'} for line in lines]


def write_run(directory: Path, first: int, last: int) -> None:
    with MetricsWriter(directory, first) as writer:
        for step in range(first + 1, last + 1):
            writer.write(step, 'train', {'loss': jnp.float32(1 / step)}, timing={'seconds': 0.5})
            if step % 3 == 0:
                writer.write(step, 'evaluation', {'set': 'held_out', 'loss': 2 / step})


def test_lines_have_sorted_keys_and_times_apart(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(3, 'train', {'loss': 2.5, 'examples': np.int64(12)}, timing={'seconds': 0.25})
    line = (tmp_path / 'metrics.jsonl').read_text().splitlines()[0]
    record = json.loads(line)
    assert list(record) == sorted(record)
    assert without_timing([record]) == [{'step': 3, 'kind': 'train', 'loss': 2.5, 'examples': 12}]
    assert set(record['timing']) == {'seconds', 'started', 'elapsed'}
    assert record['timing']['seconds'] == 0.25


@given(bits=st.integers(0, 2**32 - 1))
def test_every_float32_survives(tmp_path_factory, bits):
    value = np.uint32(bits).view(np.float32)
    directory = tmp_path_factory.mktemp('run')
    with MetricsWriter(directory, 0) as writer:
        writer.write(1, 'train', {'loss': value})
    back = np.float32(read_metrics(directory)[0]['loss'])
    assert np.isnan(back) if np.isnan(value) else back.tobytes() == value.tobytes()


def test_not_finite_values_are_strict_json(tmp_path):
    values = {'a': math.nan, 'b': math.inf, 'c': -math.inf, 'd': 1e300}
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(1, 'train', values, timing={'rate': math.inf})

    def refuse(token: str) -> None:
        raise AssertionError(token)

    json.loads((tmp_path / 'metrics.jsonl').read_text(), parse_constant=refuse)
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record['a'])
    assert (record['b'], record['c'], record['d']) == (math.inf, -math.inf, 1e300)
    assert record['timing']['rate'] == math.inf
    assert tensorboard_scalars(tmp_path)['train/d'] == [(1, math.inf)]  # beyond fp32, which event files hold


def test_tensorboard_reads_the_same_values(tmp_path):
    write_run(tmp_path, 0, 7)
    scalars = tensorboard_scalars(tmp_path)
    assert scalars['train/loss'] == [(step, float(np.float32(1 / step))) for step in range(1, 8)]
    assert scalars['train/seconds'] == [(step, 0.5) for step in range(1, 8)]
    assert scalars['evaluation/held_out/loss'] == [(step, float(np.float32(2 / step))) for step in (3, 6)]


def test_resumed_run_equals_one_never_killed(tmp_path):
    write_run(tmp_path / 'whole', 0, 12)
    killed = tmp_path / 'killed'
    write_run(killed, 0, 8)
    with (killed / 'metrics.jsonl').open('ab') as file:
        file.write(b'{"kind": "train", "loss": 0.1')
    events = max((killed / 'tensorboard').iterdir())
    events.write_bytes(events.read_bytes()[:-5])
    write_run(killed, 6, 7)
    write_run(killed, 6, 12)
    assert without_timing(read_metrics(killed)) == without_timing(read_metrics(tmp_path / 'whole'))
    assert tensorboard_scalars(killed) == tensorboard_scalars(tmp_path / 'whole')
    assert [path.name for path in killed.glob('*.partial')] == []


def test_fresh_start_cuts_everything(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(0, 'evaluation', {'set': 'held_out', 'loss': 9.0})
        writer.write(1, 'train', {'loss': 8.0})
    with MetricsWriter(tmp_path, 0) as writer:
        writer.write(0, 'evaluation', {'set': 'held_out', 'loss': 9.0})
    assert without_timing(read_metrics(tmp_path)) == [{'step': 0, 'kind': 'evaluation', 'set': 'held_out', 'loss': 9.0}]
    assert tensorboard_scalars(tmp_path) == {'evaluation/held_out/loss': [(0, 9.0)]}


def test_process_killed_while_writing_leaves_whole_lines(tmp_path):
    program = (
        'import os, pathlib, signal, sys\n'
        'from llm.training.metrics import MetricsWriter\n'
        'writer = MetricsWriter(pathlib.Path(sys.argv[1]), 0)\n'
        'for step in range(1, 50): writer.write(step, "train", {"loss": 1.0 / step})\n'
        'assert "tensorflow" not in sys.modules and "torch" not in sys.modules\n'
        'os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, '-c', program, str(tmp_path)], check=False, cwd=root)
    assert process.returncode == -signal.SIGKILL
    assert [record['loss'] for record in read_metrics(tmp_path)] == [1.0 / step for step in range(1, 50)]
    assert len(tensorboard_scalars(tmp_path)['train/loss']) == 49


@settings(max_examples=50)
@given(
    records=st.lists(st.tuples(st.integers(0, 5), st.text(max_size=5)), max_size=8),
    tail=st.binary(max_size=12),
    step=st.integers(0, 5),
)
def test_cut_keeps_exactly_the_whole_lines_up_to_the_step(tmp_path_factory, records, tail, step):
    path = tmp_path_factory.mktemp('lines') / 'samples.jsonl'
    lines = JsonLines(path, 0)
    for number, text in records:
        lines.append({'step': number, 'text': text})
    lines.close()
    with path.open('ab') as file:
        file.write(tail.replace(b'\n', b' '))
    cut_after(path, step)
    expected = [{'step': number, 'text': text} for number, text in records if number <= step]
    assert read_json_lines(path) == expected
    assert cut_after(path, step) == 0


def test_text_that_is_not_unicode_survives(tmp_path):
    text = b'caf\xc3\xa9 \xff\xe2\x80\xa8 end'.decode('utf-8', 'surrogateescape')
    lines = JsonLines(tmp_path / 'samples.jsonl', 0)
    lines.append({'step': 1, 'continuation': text})
    assert read_json_lines(tmp_path / 'samples.jsonl') == [{'step': 1, 'continuation': text}]


def test_no_file_is_no_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_reserved_names_are_refused(tmp_path):
    with MetricsWriter(tmp_path, 0) as writer, pytest.raises(ValueError, match='step'):
        writer.write(1, 'train', {'step': 3})


def test_failing_disk_is_a_user_error_and_leaves_no_half_line(tmp_path):
    lines = JsonLines(tmp_path / 'metrics.jsonl', 0)
    lines.append({'step': 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        with pytest.raises(UserError, match=r'metrics\.jsonl: cannot write'):
            lines.append({'step': 2, 'text': 'x' * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / 'metrics.jsonl').read_bytes() == b'{"step": 1}\n'


def test_run_directory_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / 'run').write_text('')
    with pytest.raises(UserError, match='cannot write'):
        MetricsWriter(tmp_path / 'run', 0)
