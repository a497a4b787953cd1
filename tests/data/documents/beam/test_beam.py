"""Beam pipelines give what the runner for one machine gives, document for document."""

import dataclasses
import functools
import gzip
import json
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llm.configuration import load_job
from llm.data.documents.beam import Beam
from llm.data.documents.beam.running import interruptible, new_pipeline
from llm.data.documents.beam.scanning import cards
from llm.data.documents.deduplication import pipeline
from llm.data.documents.deduplication.config import Deduplication
from llm.data.documents.deduplication.decontamination import CommonNgrams, Decontamination, EvaluationSet
from llm.data.documents.deduplication.near_duplicates import NearDuplicates
from llm.data.documents.deduplication.repeats import Repeats
from llm.data.documents.extraction import Extraction
from llm.data.documents.language import Language
from llm.data.documents.quality.gopher_quality import GopherQuality
from llm.data.documents.quality.rules import Rules
from llm.data.documents.runner import run
from llm.data.documents.sources import JsonLines, Source, Warc
from llm.data.documents.stage import Chain
from llm.errors import UserError
from llm.jobs.prepare_data import PrepareData
from tests.data.documents.deduplication.prepared import rows
from tests.data.documents.stages import Poisoned

CHAIN = Chain((Extraction(), Language(languages=('en',)), Rules(sets=(GopherQuality(),)), Poisoned()))

DATAFLOW = (
    '--runner=DataflowRunner',
    '--project=some-project',
    '--region=us-east1',
    '--temp_location=gs://some-bucket/t',
    '--staging_location=gs://some-bucket/t',
)


def planted(dev_data: Path) -> list[dict[str, str]]:
    """Real texts with every kind of duplicate of them, and 1,500 pages that differ in a word: hot buckets."""
    with gzip.open(dev_data / 'dedup/articles_100.txt.gz', 'rt', encoding='utf-8') as file:
        articles = [line.rstrip('\n').split(' ', 1) for line in file]
    with gzip.open(dev_data / 'web/cc_en_head-0174.jsonl.gz', 'rt', encoding='utf-8') as file:
        pages = [json.loads(line) for line in file]
    generator = random.Random(0)
    documents = [{'id': name, 'text': text, 'url': f'http://a.org/{name}'} for name, text in articles]
    documents += [{'id': page['id'], 'text': page['text'], 'url': page['id']} for page in pages]
    for i, document in enumerate(list(documents)):
        words = document['text'].split(' ')
        place = generator.randrange(len(words))
        changed = ' '.join([*words[:place], 'changed', *words[place + 1 :]])
        kind = {
            0: {'id': document['id'], 'text': articles[-1][1] + ' more'},
            1: {'id': f'url{i}', 'text': articles[-2][1] + ' of a page', 'url': document['url'] + '/?utm_source=x'},
            2: {'id': f'same{i}', 'text': document['text'].upper()},
            3: {'id': f'near{i}', 'text': changed},
            4: {'id': f'far{i}', 'text': f'Home | About | Contact us\n{" ".join(generator.sample(words, len(words)))}'},
            5: {'id': f'fail{i}', 'text': 'fail'},
        }[i % 6]
        documents.append({'url': f'http://b.org/{i}', **kind})
    template = articles[0][1].split(' ')[:60]
    for i in range(1500):
        documents.append({'id': f'hot{i}', 'text': ' '.join([*template, f'number{i} x{i % 2}'])})
    # One that goes for another by its URL, which goes for a third that is nearly the same.
    link, other, longest = (' '.join(articles[i][1].split(' ')[:90]) for i in (20, 21, 22))
    documents += [
        {'id': 'linked', 'text': other, 'url': 'http://c.org/p'},
        {'id': 'longer', 'text': f'{longest} and {link}', 'url': 'http://www.c.org/p#top'},
        {'id': 'longest', 'text': f'{longest} and {link} to the very end'},
    ]
    generator.shuffle(documents)
    even = [document | {'text': document['text'] + ' ' * (len(document['text']) % 2)} for document in documents]
    return [document for document in even if document['text'] != 'fail' or document['id'] < 'fail3']


def backwards(document: dict[str, str]) -> str:
    """A text that is like no other."""
    return ' '.join(document['text'].split()[::-1])


def prepared(output: Path) -> dict[str, list[str]]:
    """What a run wrote, whatever its files are called."""
    found = {
        kind: sorted(json.dumps(row, sort_keys=True) for row in rows(output, kind))
        for kind in ('documents', 'ledger', 'final', 'verdicts', 'contamination')
    }
    lines = [path.read_text().splitlines() for path in (output / 'quarantine').glob('*')]
    return found | {'quarantine': sorted(line for some in lines for line in some)}


@pytest.mark.slow
def test_beam_gives_what_one_machine_gives_and_no_step_reads_a_large_group(dev_data, tmp_path):
    documents = planted(dev_data)
    for i in range(2):  # with records that are counted anew in each file, so that these ids say nothing
        counted = [{'id': str(n), 'text': backwards(documents[40 * i + n])} for n in range(20)]
        lines = [json.dumps(document) for document in documents[i::2] + counted]
        (tmp_path / f'{i}.jsonl').write_text('\n'.join([*lines, 'no json']))
    again = [{'id': f'hot{i}', 'text': document['text']} for i, document in enumerate(documents[:9])]
    (tmp_path / '2.jsonl').write_text('\n'.join(json.dumps(document) for document in again))
    (tmp_path / 'other').mkdir()
    named = [{'id': document['id'], 'text': backwards(document)} for document in documents[80:100]]
    (tmp_path / 'other/0.jsonl').write_text('\n'.join(json.dumps(row) for row in named))
    sources = (
        JsonLines(files=str(tmp_path / '*.jsonl'), name='texts'),
        JsonLines(files=str(tmp_path / 'other/*.jsonl'), name='other'),
        Warc(files=f'{dev_data}/web/warc/*.warc.gz', name='web'),
    )
    item = {'question': ' '.join(documents[7]['text'].split()[:40])}
    (tmp_path / 'evaluation.json').write_text(json.dumps(item))
    config = Deduplication(
        sources=('web',),
        near=NearDuplicates(threshold=0.7, bucket=8),
        repeats=(Repeats('lines', occurrences=3, words=2), Repeats('passages', words=30)),
    )
    against = Decontamination((EvaluationSet(str(tmp_path / 'evaluation.json')),), (CommonNgrams(window=20),))
    local, out = tmp_path / 'local', tmp_path / 'beam'
    for path in (local, out):
        path.mkdir()
    expected = run(sources, CHAIN, local, settings='', processes=1, progress=False)
    final = pipeline.finish(local, config, against, processes=1)
    runner = Beam(salts=16, piece_documents=128, rounds=1, spread_bytes=100_000)
    assert runner.prepare(sources, CHAIN, out, '').as_json() == expected.as_json()
    assert runner.finish(out, config, against).as_json() == final.as_json()
    found = prepared(out)
    assert found == prepared(local)
    assert expected.counts.quarantined > 10 and final.changed > 10 and len(found['contamination']) > 0
    assert final.removed.keys() >= {'id', 'url', 'document', 'near_duplicate', 'contamination'}
    assert {row['id']: row['representative'] for row in rows(out, 'verdicts')}['linked'] == 'longest'
    assert final.removed['near_duplicate'] > 1400
    done = {path.name: path.read_text() for path in (out / 'beam/done').iterdir()}
    assert 70 < max(json.loads(mark)['largest_group'] for mark in done.values()) < 150  # of buckets of 1,500
    no_graph_grows_with_the_corpus(str(out), config, against)
    runner.finish(out, config, against)  # all is there
    assert {path.name: path.read_text() for path in (out / 'beam/done').iterdir()} == done
    (out / 'final/000001-000000.parquet').write_bytes(b'damaged')
    runner.finish(out, config, against)
    assert prepared(out) == found
    ids_are_compared_as_asked(out, config)
    a_file_more_or_less_changes_no_other(tmp_path, runner, sources, expected.shards)


def ids_are_compared_as_asked(out: Path, config: Deduplication) -> None:
    """What Beam compares of ids, for each setting; among real documents are some with the ids of others."""
    differing = {
        some.ids: len(
            {card.keys.get('id') for path in (out / 'documents').iterdir() for _, card in cards(str(path), some)}
        )
        for some in (config, dataclasses.replace(config, ids='all'))
    }
    names = [(row['source'], row['id']) for row in rows(out, 'documents')]
    of_sources = {name for name in names if not name[1].isdecimal()}
    assert differing == {'source': len(of_sources) + 1, 'all': len({name for _, name in names})}
    assert len(of_sources) > len({name for _, name in of_sources}) + 5
    counted = [row for row in rows(out, 'verdicts') if row['id'].isdecimal()]
    assert len({row['id'] for row in counted}) + 5 < len(counted) and not any(row['rule'] == 'id' for row in counted)


def a_file_more_or_less_changes_no_other(folder: Path, runner: Beam, sources: Sequence[Source], shards: int) -> None:
    """Both runners do again what changed, under the same numbers, and withdraw what was made of all documents."""
    local, out = folder / 'local', folder / 'beam'
    (folder / '+.jsonl').write_text(json.dumps({'id': 'first', 'text': 'It sorts before all others. ' * 20}))
    summary = runner.prepare(sources, CHAIN, out, '')
    assert (summary.resumed, summary.shards) == (shards, shards + 1)
    assert not (out / 'final.json').exists() and not (out / 'final').exists()
    run(sources, CHAIN, local, settings='', processes=1, progress=False)
    assert records(out) == records(local) and prepared(out) == prepared(local)
    # As after a pipeline that was stopped: a shard of which a piece is not whole; and one of which the input is gone.
    (out / 'documents/000001-000000.parquet').write_bytes(b'damaged')
    (folder / '2.jsonl').unlink()
    summary = runner.prepare(sources, CHAIN, out, '')
    assert (summary.resumed, summary.shards) == (shards - 1, shards)
    run(sources, CHAIN, local, settings='', processes=1, progress=False)
    assert records(out) == records(local) and prepared(out) == prepared(local)


def records(output: Path) -> dict[str, Any]:
    """What commits shards, but for the sizes of their files."""
    found = {path.name: json.loads(path.read_text()) for path in (output / 'shards').iterdir()}
    return {name: {**record, 'sizes': 0} for name, record in found.items()}


def no_graph_grows_with_the_corpus(out, config, against):
    """Pipelines for a cluster as they are sent there: Dataflow takes 20 MB at most."""
    from llm.data.documents.beam import components, deduplicating, finishing, preparing

    tasks = [f'{out}/beam/tasks/{i:06d}.pickle' for i in range(100)]  # of 1,000 shards each
    add = (
        functools.partial(
            preparing.documents,
            tasks=tasks,
            chain=CHAIN,
            output=out,
            spread_bytes=1 << 30,
            piece_documents=4096,
            seconds_per_batch=600.0,
        ),
        functools.partial(deduplicating.duplicates, output=out, work=f'{out}/beam', config=config, salts=256),
        functools.partial(components.stars, work=f'{out}/beam', turn=0, rounds=3, salts=256),
        finishing.Finish(out, f'{out}/beam', 1, config, against, 'digest', 256, 10**13).build,
    )
    for some in add:
        pipeline = new_pipeline(DATAFLOW)
        some(pipeline)
        graph = pipeline.to_runner_api()
        assert len(graph.components.transforms) > 20 and graph.ByteSize() < 1_000_000


@pytest.mark.parametrize('runner', ['local', 'dataflow', 'flink', 'spark'])
def test_settings_of_a_cluster_are_options_that_beam_knows(runner):
    path = Path(f'gin_configs/documents/beam_{runner}.gin')
    values = {name: f'gs://some-bucket/{name.lower()}' for name in ('BUCKET', 'TEMPORARY', 'DIRECTORY')}
    values |= {'PROJECT': 'some-project', 'IMAGE': 'registry/llm:1', 'MASTER': 'spark://host:7077'}
    bindings = [
        f'{name} = {value!r}' for name, value in values.items() if f'{name} = %gin.REQUIRED' in path.read_text()
    ]
    job, _ = load_job(['gin_configs/runs/prepare_web.gin', str(path)], ['FILES = "x.warc"', *bindings])
    options = new_pipeline(job.runner.options).options.get_all_options(drop_default=True)
    assert options['runner'].lower().startswith({'local': 'direct'}.get(runner, runner))
    assert job.runner.directory == (
        '' if runner == 'local' else values['BUCKET' if runner == 'dataflow' else 'DIRECTORY']
    )
    for option, message in {
        '--worker_machin=x': 'no runner of Beam knows worker_machin',
        'x': "'x' is no option",
        '--direct_num_workers=x': r"refuses the options \(argument --direct_num_workers: invalid int value: 'x'\)",
    }.items():
        with pytest.raises(UserError, match=message):
            dataclasses.replace(job.runner, options=(*job.runner.options, option)).check()


def test_what_beam_cannot_do_is_said_before_anything_is_read(tmp_path):
    (tmp_path / 'some.jsonl').write_text('{"text": "of another"}')
    for runner, config in (Beam(index=True), None), (Beam(), Deduplication(earlier=('runs/first/deduplication',))):
        with pytest.raises(UserError, match='on a disk that all workers reach'):
            dataclasses.replace(runner, directory='gs://some-bucket/run').check(config)
    with pytest.raises(UserError, match='a report reads output_directory'):
        PrepareData('out', (JsonLines(files='x', name='texts'),), (), runner=Beam(directory='gs://some-bucket/run'))
    with pytest.raises(UserError, match='salts'):
        Beam(salts=0)
    sources = (JsonLines(files=str(tmp_path / '*.jsonl'), name='texts'),)
    with pytest.raises(UserError, match='not empty, and of no run'):
        Beam(directory=str(tmp_path)).prepare(sources, CHAIN, tmp_path / 'out', '')


def test_a_local_pipeline_logs_errors_and_an_interrupt_ends_its_workers():
    for option, level in ((), 'ERROR'), (('--default_sdk_harness_log_level=INFO',), 'INFO'):
        found = new_pipeline(('--runner=DirectRunner', *option)).options.get_all_options()
        assert found['default_sdk_harness_log_level'] == level
    before = signal.getsignal(signal.SIGINT)
    command = [sys.executable, '-c', 'input()', 'apache_beam.runners.worker.sdk_worker_main']
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE) as worker,
        subprocess.Popen(['cat'], stdin=subprocess.PIPE) as other,
    ):
        with pytest.raises(KeyboardInterrupt), interruptible():
            # As Beam starts its workers, to which a terminal sends SIGINT, too.
            ignoring = f"{sys.executable} -c 'import signal; signal.raise_signal(signal.SIGINT)'"
            subprocess.run(ignoring, shell=True, check=True)
            signal.raise_signal(signal.SIGINT)
        assert worker.wait() == -signal.SIGKILL and other.poll() is None
    assert signal.getsignal(signal.SIGINT) is before
