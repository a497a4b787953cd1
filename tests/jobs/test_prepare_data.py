"""The prepare_data job, as its run file starts it."""

import dataclasses
import json
import subprocess
import sys

import pyarrow.parquet
import pytest

from llm.configuration import Invocation
from llm.data.documents.sources import JsonLines
from llm.data.sources import TextFiles, read_documents
from llm.errors import UserError
from llm.jobs.prepare_data import PrepareData
from tests.data.documents.stages import Poisoned


def start(root, *bindings):
    command = [sys.executable, '-m', 'llm.main', '--gin_file=gin_configs/runs/prepare_web.gin']
    bound = [f'--gin_bindings={binding}' for binding in bindings]
    return subprocess.run([*command, *bound], cwd=root, capture_output=True, text=True, check=False)


def test_a_crawl_becomes_documents_that_training_reads(dev_data, tmp_path, request):
    root, out = request.config.rootpath, tmp_path / 'web'
    bindings = (f'FILES="{dev_data}/web/warc/*.warc.gz"', f'OUTPUT_DIRECTORY="{out}"')
    dry = start(root, *bindings, 'LANGUAGES=("en", "de")')
    assert dry.returncode == 0, dry.stderr
    summary = json.loads((out / 'summary.json').read_text())
    counts = summary['counts']
    assert counts['documents'] == 41 == counts['kept'] + sum(counts['removed'].values()) + counts['quarantined']
    assert 'done in' in dry.stdout and 'not documents: request record: 37' in dry.stdout
    ledger = [row for path in sorted(out.glob('ledger/*')) for row in pyarrow.parquet.read_table(path).to_pylist()]
    assert len(ledger) == 41
    assert sum(row['removed_by'] is None for row in ledger) == counts['kept']
    assert {row['removed_by'] for row in ledger if not row['language.keep']} == {'language'}
    texts = list(read_documents(TextFiles(str(out / 'documents' / '*.parquet'), validation_fraction=0), 'train'))
    assert len(texts) == counts['kept']

    assert 'report.html' in dry.stdout and (out / 'report.html').stat().st_size > 50_000
    again = start(root, *bindings, 'LANGUAGES=("en", "de")', 'prepare_data.PrepareData.report=None')
    assert '2 of 2 shards had been done before' in again.stdout
    other = start(root, *bindings, 'LANGUAGES=("fr",)')
    assert other.returncode == 2
    assert 'languages' in other.stderr.splitlines()[-1]
    nothing = start(root, f'FILES="{tmp_path}/none*.warc"', f'OUTPUT_DIRECTORY="{tmp_path}/other"')
    assert nothing.returncode == 2
    assert 'no file matches' in nothing.stderr.splitlines()[-1]


def test_a_run_that_could_judge_nothing_says_so(tmp_path, capsys):
    (tmp_path / 'texts.jsonl').write_text('{"text": "fail"}\n{"text": 7}\n')
    (tmp_path / 'odd.jsonl').write_text('{"text": "odd"}\n')
    job = PrepareData(
        str(tmp_path / 'out'),
        (JsonLines(files=str(tmp_path / 'texts.jsonl'), name='texts'),),
        (Poisoned(),),
        report=None,
        processes=1,
    )
    invocation = Invocation(dry_run=False, operative_config='', command=(), config_files=())
    for _ in range(2):
        with pytest.raises(UserError, match='none of 2 documents could be judged'):
            job(invocation)
    said = capsys.readouterr().out
    assert '1 of 1 shards had been done before' in said and 'done in' not in said
    assert json.loads((tmp_path / 'out/summary.json').read_text())['counts']['quarantined'] == 2
    other = dataclasses.replace(
        job, output_directory=str(tmp_path / 'odd'), sources=(JsonLines(files=str(tmp_path / 'odd.jsonl'), name='odd'),)
    )
    other(invocation)
    assert 'warning: no document stays' in capsys.readouterr().out
