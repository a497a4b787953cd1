"""Deduplication and decontamination through the prepare_data job and its run file, on real articles and questions."""

import gzip
import json

import pyarrow.parquet

from llm.configuration import Invocation, load_job


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
        [f'{name} = {value!r}' for name, value in bindings.items()] + ['prepare_data.PrepareData.processes = 1'],
    )
    job(Invocation(dry_run=True, operative_config=text, command=(), config_files=()))
    assert 'near_duplicate' in capsys.readouterr().out and not (tmp_path / 'out').exists()
    for _ in range(2):  # the second time all is there
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
