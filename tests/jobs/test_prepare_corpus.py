"""Deduplication and decontamination through the prepare_data job and its run file, on real articles and questions."""

import gzip
import json

import pyarrow.parquet
import pytest

from llm.configuration import Invocation, load_job
from llm.errors import UserError


def test_articles_lose_their_near_duplicates_and_what_an_evaluation_set_holds(dev_data, tmp_path, capsys):
    with gzip.open(dev_data / 'dedup/articles_100.txt.gz', 'rt', encoding='utf-8') as file:
        articles = [line.rstrip('\n').split(' ', 1) for line in file]
    with gzip.open(dev_data / 'eval/arc_easy.jsonl.gz', 'rt', encoding='utf-8') as file:
        items = [line for line, _ in zip(file, range(50), strict=False)]
    (tmp_path / 'arc.jsonl').write_text(''.join(items))
    question = max((value for value in json.loads(items[0]).values() if isinstance(value, str)), key=len)
    articles.append(['leak', question])
    for i in range(2):
        lines = [json.dumps({'id': name, 'text': text}) for name, text in articles[i::2]]
        (tmp_path / f'{i}.jsonl').write_text('\n'.join(lines))
    bindings = {'FILES': str(tmp_path / '[01].jsonl'), 'EVALUATION': str(tmp_path / 'arc.jsonl')}
    bindings['OUTPUT_DIRECTORY'] = str(tmp_path / 'out')
    job, text = load_job(
        ['gin_configs/runs/prepare_corpus.gin'],
        [f'{name} = {value!r}' for name, value in bindings.items()]
        + ['prepare_data.PrepareData.processes = 1', 'prepare_data.PrepareData.report = None'],
    )
    job(Invocation(dry_run=True, operative_config=text, command=(), config_files=()))
    said = capsys.readouterr().out
    assert 'near_duplicate' in said and 'against 50 items' in said and not (tmp_path / 'out').exists()
    # Found before hours of work, also without --dry_run.
    (tmp_path / 'arc.jsonl').rename(tmp_path / 'not_here.jsonl')
    for dry_run in (True, False):
        with pytest.raises(UserError, match='no file matches'):
            job(Invocation(dry_run=dry_run, operative_config=text, command=(), config_files=()))
    (tmp_path / 'arc.jsonl').write_text('')
    for dry_run in (True, False):
        with pytest.raises(UserError, match=r'arc.jsonl: an evaluation set has no items. +Name files'):
            job(Invocation(dry_run=dry_run, operative_config=text, command=(), config_files=()))
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'not_here.jsonl').rename(tmp_path / 'arc.jsonl')
    for attempt in range(3):  # the second time all is there
        if attempt == 2:
            (tmp_path / 'out/ledger/000000.parquet').write_bytes(b'damaged')
        job(Invocation(dry_run=False, operative_config=text, command=(), config_files=()))
        said = capsys.readouterr().out
        assert 'of 101 documents 95 are final' in said
        assert 'removed by near_duplicate: 5' in said and 'removed by contamination: 1' in said
    shards = sorted((tmp_path / 'out').glob('verdicts/*.parquet'))
    verdicts = {row['id']: row for shard in shards for row in pyarrow.parquet.read_table(shard).to_pylist()}
    truth = [line.split() for line in (dev_data / 'dedup/articles_100.truth').read_text().splitlines()]
    assert all({verdicts[a]['representative'], verdicts[b]['representative']} & {a, b} for a, b in truth)
    assert verdicts['leak']['representative'] == 'arc:1'
    hits = [
        row
        for path in (tmp_path / 'out').glob('contamination/*')
        for row in pyarrow.parquet.read_table(path).to_pylist()
    ]
    assert {(hit['id'], hit['item']) for hit in hits} == {('leak', 'arc:1')}
