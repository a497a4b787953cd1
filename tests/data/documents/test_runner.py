"""Running shards in processes: nothing is lost or done twice, whatever dies."""

import collections
import json
import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest

from llm.data.documents import shard_processing
from llm.data.documents.runner import run
from llm.data.documents.sources import JsonLines
from llm.data.documents.stage import Chain
from llm.errors import UserError
from tests.data.documents.stages import Poisoned

CHAIN = Chain((Poisoned(),))


def write_shards(folder, shards, documents, special=()):
    """JSON lines files with texts 'even' and 'odd' in turn, and special texts by (shard, record)."""
    special = dict(special)
    for shard in range(shards):
        texts = [special.get((shard, i), ('even', 'odd')[i % 2]) for i in range(documents)]
        lines = [json.dumps({'id': f'{shard}-{i}', 'text': text}) for i, text in enumerate(texts)]
        (folder / f'{shard}.jsonl').write_text('\n'.join(lines))
    return JsonLines(files=str(folder / '*.jsonl'), name='made')


def outputs(directory):
    """{relative path: bytes} of everything that a run leaves but for its summary of times."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.glob('*/*') if path.is_file()}


def quarantined(directory):
    lines = [line for path in sorted(directory.glob('quarantine/*')) for line in path.read_text().splitlines()]
    return {item['id']: item['reason'] for item in map(json.loads, lines)}


def ids(directory, kind='documents'):
    paths = sorted(directory.glob(f'{kind}/*.parquet'))
    return [value for path in paths for value in pyarrow.parquet.read_table(path)['id'].to_pylist()]


def test_a_document_that_kills_its_process_is_quarantined_and_no_other(tmp_path):
    orders = {(0, 3): 'hang', (1, 5): 'kill', (1, 140): 'fail', (2, 0): 'exit', (2, 1): 'fail'}
    orders |= {(1, i): 'crowd' for i in (10, 20, 130, 144)}  # too much for a batch, in both of a shard
    source = write_shards(tmp_path, 3, 150, orders)
    out = tmp_path / 'out'
    summary = run([source], CHAIN, out, settings='', processes=2, seconds_per_batch=8)
    assert quarantined(out) == {
        '0-3': 'took more than 8 seconds',
        '1-5': 'ended its process (SIGKILL)',
        '1-140': 'ValueError: as told',
        '2-0': 'ended its process (exit code 7)',
        '2-1': 'ValueError: as told',
    }
    counts = summary.counts
    assert (counts.documents, counts.quarantined) == (450, 5)
    expected = [f'{s}-{i}' for s in range(3) for i in range(150) if i % 2 == 0 and (s, i) not in orders]
    assert ids(out) == expected
    assert (counts.kept, counts.removed) == (len(expected), collections.Counter(odd=450 - 5 - len(expected)))
    assert len(ids(out, 'ledger')) == 445


def test_killed_at_any_time_it_goes_on_to_the_same_bytes(tmp_path):
    source = write_shards(tmp_path, 12, 40)
    slow = Chain((Poisoned(seconds=0.002),))
    run([source], slow, tmp_path / 'whole', settings='', processes=1)
    program = (
        'from pathlib import Path\nfrom llm.data.documents.runner import run\n'
        'from llm.data.documents.sources import JsonLines\nfrom llm.data.documents.stage import Chain\n'
        'from tests.data.documents.stages import Poisoned\n'
        'if __name__ == "__main__":\n'
        f'    summary = run([JsonLines(files={source.files!r}, name="made")], Chain((Poisoned(seconds=0.002),)),\n'
        f'        Path({str(tmp_path / "killed")!r}), settings="", processes=2)\n'
        '    print(summary.resumed)\n'
    )
    (tmp_path / 'program.py').write_text(program)
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)}

    def start():
        return subprocess.Popen(
            [sys.executable, tmp_path / 'program.py'], env=environment, stdout=subprocess.PIPE, start_new_session=True
        )

    done = 0
    for _ in range(3):
        process = start()
        while process.poll() is None and len(list(tmp_path.glob('killed/shards/*.json'))) <= done:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done = len(list(tmp_path.glob('killed/shards/*.json')))
    process = start()
    printed, _ = process.communicate()
    assert process.returncode == 0
    assert int(printed) == done >= 1
    assert outputs(tmp_path / 'killed') == outputs(tmp_path / 'whole')


def test_what_was_done_is_done_again_only_where_it_changed(tmp_path):
    source = write_shards(tmp_path, 3, 4)
    out = tmp_path / 'out'
    assert run([source], CHAIN, out, settings='a', processes=1).resumed == 0
    before = outputs(out)
    later = [out / name for name in ('final/0.parquet', 'final.json', 'deduplication/phases/final.json')]
    for path in later:  # as the phases over all shards leave them
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('made of the documents as they are')
    assert run([source], CHAIN, out, settings='a', processes=1).resumed == 3
    assert all(path.exists() for path in later)
    (tmp_path / '1.jsonl').write_text(json.dumps({'id': 'new', 'text': 'even'}))
    (out / 'documents' / '000002.parquet').write_bytes(b'damaged')
    assert run([source], CHAIN, out, settings='a', processes=1).resumed == 1
    assert not any(path.exists() for path in later)
    assert ids(out) == ['0-0', '0-2', 'new', '2-0', '2-2']
    assert outputs(out)['documents/000002.parquet'] == before['documents/000002.parquet']
    assert run([source], CHAIN, out, settings='other rules', processes=1).resumed == 0
    # A file that sorts before all others, and one that is gone before it was committed.
    (tmp_path / '00.jsonl').write_text(json.dumps({'id': 'before', 'text': 'even'}))
    (tmp_path / '2.jsonl').unlink()
    (out / 'shards' / '000002.json').unlink()
    before = outputs(out)
    summary = run([source], CHAIN, out, settings='other rules', processes=1)
    assert (summary.resumed, summary.shards, summary.counts.kept) == (2, 3, 4)
    assert ids(out) == ['0-0', '0-2', 'new', 'before']
    assert outputs(out)['ledger/000000.parquet'] == before['ledger/000000.parquet']
    (tmp_path / '0.jsonl').unlink()
    assert run([source], CHAIN, out, settings='other rules', processes=1).resumed == 2
    assert ids(out) == ['new', 'before']


def test_one_shard_alone_is_as_safe(tmp_path):
    source = write_shards(tmp_path, 1, 4, {(0, 1): 'kill'})
    assert run([source], CHAIN, tmp_path / 'out', settings='', processes=2).counts.quarantined == 1
    # A script that starts itself again in every worker.
    program = (
        'from pathlib import Path\nfrom llm.data.documents.runner import run\n'
        'from llm.data.documents.sources import JsonLines\nfrom llm.data.documents.stage import Chain\n'
        f'run([JsonLines(files={source.files!r}, name="made")], Chain(()), Path({str(tmp_path / "other")!r}),\n'
        '    settings="", processes=2)\n'
    )
    (tmp_path / 'program.py').write_text(program)
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, tmp_path / 'program.py']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert '3 times before it had begun' in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob('other/shards/*'))


def test_names_of_files_need_not_be_unicode(tmp_path):
    with open(os.fsencode(tmp_path) + b'/\xff.jsonl', 'wb') as file:
        file.write(b'{"text": "even"}\n{')
    counts = run(
        [JsonLines(files=str(tmp_path / '*.jsonl'), name='made')], CHAIN, tmp_path, settings='', processes=1
    ).counts
    assert (counts.kept, counts.quarantined) == (1, 1)


def test_what_waits_to_be_written_is_bounded_with_its_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_processing, '_GROUP_CHARACTERS', 1000)
    records = [json.dumps({'text': 'even', 'html': 'x' * 500}) for _ in range(8)]
    (tmp_path / 'a.jsonl').write_text('\n'.join(records))
    run([JsonLines(files=str(tmp_path / 'a.jsonl'), name='made')], CHAIN, tmp_path, settings='', processes=1)
    assert pyarrow.parquet.ParquetFile(tmp_path / 'documents' / '000000.parquet').num_row_groups == 4


def test_a_full_disk_stops_it_in_one_line_and_loses_nothing(tmp_path):
    source = write_shards(tmp_path, 2, 4)
    program = (
        'import resource, signal, sys\nfrom pathlib import Path\nfrom llm.data.documents.runner import run\n'
        'from llm.data.documents.sources import JsonLines\nfrom llm.data.documents.stage import Chain\n'
        'from llm.errors import UserError\nfrom tests.data.documents.stages import Poisoned\n'
        'signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n'
        'resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n'
        f'try:\n    run([JsonLines(files={source.files!r}, name="made")], Chain((Poisoned(),)),\n'
        f'        Path({str(tmp_path / "out")!r}), settings="", processes=1)\n'
        'except UserError as error:\n    sys.exit(str(error))\n'
    )
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, '-c', program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert 'cannot be written (File too large). Free some space' in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob('out/*/*.tmp'))
    assert run([source], CHAIN, tmp_path / 'out', settings='', processes=1).counts.kept == 4


def test_two_rules_of_one_name_are_refused():
    with pytest.raises(UserError, match="two stages have a rule 'odd'"):
        Chain((Poisoned(), Poisoned(1.0)))
