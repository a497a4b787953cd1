"""The make_mixture job, and what reads the mixtures it makes: training, the tokenizer, SeqIO alone."""

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from llm.configuration import Invocation
from llm.data.curricula import Curriculum
from llm.data.datasets import DataConfig
from llm.data.documents.quality.outliers import Outliers
from llm.data.documents.quality.rules import Rules
from llm.data.documents.sources import JsonLines
from llm.data.loader import host_rows, local_batch
from llm.data.mixtures.parts import Filter, Part
from llm.data.mixtures.prepared import PreparedMixture, read_record
from llm.data.mixtures.reading import share
from llm.data.sources import ReadCounts, TextFiles, read_documents
from llm.data.vocabularies import ByteVocabulary, VocabularyConfig
from llm.errors import UserError
from llm.jobs.make_mixture import MakeMixture
from llm.jobs.prepare_data import PrepareData
from llm.jobs.train_tokenizer import TrainTokenizer
from llm.main import main
from tests.data.byte_tokens import ByteTokens

RUN = Invocation(dry_run=False, operative_config='# a config\n', command=(), config_files=())
BOUNDS = [field.name for field in dataclasses.fields(Outliers)]  # none: the figures are told, and all stay


def records(name, count):
    return [
        {'id': f'{name}{i}', 'text': f'{i} ' + f'{name} ' * (i % 30 + 20), 'author': f'a{i % 3}'} for i in range(count)
    ]


def prepare(folder, name, count, files=2):
    """A prepared directory of so many documents in so many files; a rule gives each a figure in the ledger."""
    (folder / name).mkdir(parents=True)
    for i in range(files):
        lines = [json.dumps(record) for record in records(name, count)[i::files]]
        (folder / name / f'{i}.jsonl').write_text('\n'.join(lines))
    source = JsonLines(name=name, files=str(folder / name / '*.jsonl'))
    out = folder / f'prepared_{name}_{files}'
    PrepareData(str(out), (source,), (Rules((Outliers(**dict.fromkeys(BOUNDS)),)),), report=None, processes=1)(RUN)
    return str(out)


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    """(web, books: prepared directories; a plain source) for all tests, which change none of it."""
    folder = tmp_path_factory.mktemp('inputs')
    (folder / 'plain.jsonl').write_text(
        '\n'.join(json.dumps({'text': f'{i} ' + 'plain ' * (i % 20 + 9)}) for i in range(90))
    )
    plain = TextFiles(str(folder / 'plain.jsonl'), validation_fraction=0.1)
    return prepare(folder, 'web', 200), prepare(folder, 'books', 60), plain


def curriculum(**changes):
    rates = {'web': (0.9, 0.9, 0.3), 'books': (0.05, 0.05, 0.6), 'plain': (0.05, 0.05, 0.1)}
    return Curriculum((0, 0.5, 1), {name: rates[name] for name in rates}, **changes)


def job(folder, inputs, **settings):
    web, books, plain = inputs
    parts = (Part('web', web), Part('books', books), Part('plain', source=plain))
    return MakeMixture(str(folder / 'mixture'), **{'parts': parts, 'validation_fraction': 0.1} | settings)


def texts(directory, split='train'):
    """{component: its documents}"""
    mixture = PreparedMixture(directory)
    components = mixture.components() if split == 'train' else mixture.evaluation()
    return {each.name: list(read_documents(each.source, split)) for each in components}


def test_a_mixture_says_what_it_holds_and_its_batches_follow_the_curriculum(tmp_path, inputs, capsys):
    made = job(tmp_path, inputs, curriculum=curriculum(), budget=60_000, budget_unit='bytes')
    made(RUN)
    printed = capsys.readouterr().out
    directory = made.output_directory
    record, found = read_record(directory), texts(directory)
    held_out = texts(directory, 'validation')
    for component in record['components']:
        name = component['name']
        assert component['train']['documents'] == len(found[name])
        assert component['train']['bytes'] == sum(len(text.encode()) for text in found[name])
        assert component['validation']['documents'] == len(held_out[name]) > 0
        size = component['train']['bytes']
        assert component['epochs'] == pytest.approx(component['share'] * 60_000 / size)
    assert [component['share'] for component in record['components']] == pytest.approx([0.75, 0.1875, 0.0625])
    every = [record['text'] for name, count in (('web', 200), ('books', 60)) for record in records(name, count)]
    assert sorted(found['web'] + held_out['web'] + found['books'] + held_out['books']) == sorted(every)
    assert f'plain{"":19}' in printed and 'rates at 0, 0.5, 1 (of the run, linear):' in printed

    vocabulary, steps, rows = ByteTokens(), 40, 8
    config = DataConfig(PreparedMixture(directory), cache_directory=str(tmp_path / 'tokens'), workers=1)
    settings = {'batch_size': rows, 'total_steps': steps, 'progress': False}
    examples = config.open_training(vocabulary, 64, **settings)
    wanted = rows * made.curriculum.integrals(examples.names, steps)
    batches = [local_batch(examples, step, rows, range(rows)) for step in range(steps)]
    counts = np.zeros((steps + 1, 3), int)
    for step, batch in enumerate(batches):
        for text in map(vocabulary.decode, batch['targets']):
            counts[step + 1, int(np.argmax([text.count(name) for name in examples.names]))] += 1
    assert np.abs(np.cumsum(counts, axis=0) - wanted).max() <= 0.75 + 1e-6
    again = config.open_training(vocabulary, 64, **settings)
    assert again.digest == examples.digest
    for hosts in (1, 2, 4):  # directly, by another reader
        parts = [local_batch(again, 33, rows, host_rows(rows, host, hosts)) for host in range(hosts)]
        for name, whole in batches[33].items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), whole), name
    with pytest.raises(UserError, match='ends after 320 rows'):
        again.rows([320])
    assert sorted(config.open_evaluation(vocabulary, 64, progress=False)) == ['books', 'plain', 'web']

    made(RUN)
    assert f'{directory}: complete' in capsys.readouterr().out
    with pytest.raises(UserError, match='holds a run of another config'):
        job(tmp_path, inputs, budget=1, budget_unit='bytes')(RUN)


def test_sub_corpora_samples_and_splits_do_not_depend_on_how_files_are_cut(tmp_path, inputs):
    cut_otherwise = prepare(tmp_path, 'web', 200, files=5)
    found = []
    for i, web in enumerate((inputs[0], cut_otherwise)):
        parts = (
            Part('sampled', web, epochs=0.3),
            Part('of_two', web, filters=(Filter('metadata.author', ('a1', 'a2')),), weight=None),
            Part('of_one', web, filters=(Filter('metadata.author', ('a1', 'a2'), exclude=True),)),
            Part('long', web, filters=(Filter('outliers/characters.value', minimum=200),)),
            Part('middle', web, filters=(Filter('outliers/characters.value', minimum=150, below=200),)),
        )
        made = job(tmp_path / str(i), inputs, parts=parts)
        made(RUN)
        found.append({name: sorted(some) for name, some in texts(made.output_directory).items()})
    assert found[0] == found[1]
    train = {record['text']: record for record in records('web', 200) if share(record['id'], 'validation') >= 0.1}
    assert sorted(text for text in found[0]['sampled']) == sorted(
        text for text, record in train.items() if share(record['id'], 'sample') < 0.3
    )
    assert [train[text]['author'] for text in found[0]['of_one']] == ['a0'] * len(found[0]['of_one'])
    assert len(found[0]['of_one']) + len(found[0]['of_two']) == len(train)
    assert found[0]['long'] and min(map(len, found[0]['long'])) >= 200
    assert {len(text) // 50 for text in found[0]['middle']} == {3}


def test_documents_of_a_component_are_read_or_counted_as_of_the_other_split(tmp_path, inputs):
    made = job(tmp_path, inputs)
    made(RUN)
    component = PreparedMixture(made.output_directory).components()[0]
    found = {}
    for split in ('train', 'validation'):
        counts = ReadCounts()
        for shard in component.source.shards(split):
            assert sum(1 for _ in shard.documents(counts)) > 0
        found[split] = (counts.documents, counts.empty, counts.other_split)
        assert sum(found[split]) == 200
    assert found['train'][0] == found['validation'][2] > 0


def test_sizes_temperature_weights_epochs_and_caps(tmp_path, inputs):
    def outcome(name, parts, **settings):
        made = job(tmp_path / name, inputs, parts=parts, **settings)
        made(RUN)
        record = read_record(made.output_directory)
        return record, {each['name']: each for each in record['components']}

    web, books, _ = inputs
    ByteVocabulary().save(tmp_path / 'vocabulary')
    counting = {'vocabulary': str(tmp_path / 'vocabulary'), 'cache_directory': str(tmp_path / 'tokens'), 'workers': 1}
    record, by_name = outcome('natural', (Part('web', web, epochs=0.5), Part('books', books, epochs=3)), **counting)
    sizes = {name: each['train']['tokens'] for name, each in by_name.items()}
    for each in by_name.values():
        assert each['train']['tokens'] == each['train']['bytes'] + each['train']['documents']
    assert record['total'] == sizes['web'] + 3 * sizes['books']
    assert by_name['books']['epochs'] == pytest.approx(3) and by_name['web']['epochs'] == pytest.approx(1)
    assert by_name['web']['share'] == pytest.approx(sizes['web'] / record['total'])

    same = TextFiles(f'{Path(web).parent}/web/*.jsonl', validation_fraction=0.5)  # as web, but for ids and splits
    record, by_name = outcome('flat', (Part('web', web), Part('same', source=same)), temperature=2.0)
    directory = str(tmp_path / 'flat/mixture')
    for name, other in (('web', 'same'), ('same', 'web')):
        leaked = set(texts(directory)[name]) & set(texts(directory, 'validation')[other])
        assert by_name[name]['train']['held_out'] == len(leaked) > 5
        assert f'{name} trains on {len(leaked)} documents whose text is held out' in record['warnings'][name == 'same']
    roots = [each['train']['bytes'] ** 0.5 for each in record['components']]
    assert [each['share'] for each in record['components']] == pytest.approx([root / sum(roots) for root in roots])

    parts = (Part('web', web, weight=1, max_epochs=1.0), Part('books', books, weight=1))
    record, by_name = outcome('capped', parts, budget=1000, budget_unit='documents')
    assert by_name['web']['epochs'] == 1 and by_name['books']['epochs'] > 9
    assert by_name['web']['read'] + by_name['books']['read'] == pytest.approx(record['total'])
    words = ' '.join(record['warnings'])
    assert 'web has had its max_epochs after ' in words
    assert f'books would be read {by_name["books"]["epochs"]:.1f} times' in words
    documents = sum(
        0.5 * record['total'] / each['train']['bytes'] * each['train']['documents'] for each in by_name.values()
    )
    assert documents == pytest.approx(1000)
    config = DataConfig(
        PreparedMixture(str(tmp_path / 'capped/mixture')), cache_directory=str(tmp_path / 'tokens'), workers=1
    )
    examples = config.open_training(ByteTokens(), 64, progress=False)
    sources, _ = examples.schedule.locate(np.arange(2000))
    assert (sources == 0).sum() == examples.sources[0].records.num_rows


@pytest.mark.slow
def test_seqio_alone_reads_the_same_documents(tmp_path, inputs):
    made = job(tmp_path, inputs, name='small')
    made(RUN)
    directory = made.output_directory
    import seqio

    split = {'sequence_length': {'targets': 10_000}, 'shuffle': False}

    def read(dataset):
        return [bytes(x - 3 for x in e['targets'] if x > 1).decode() for e in dataset.as_numpy_iterator()]

    with pytest.MonkeyPatch.context() as patch:
        for module in [name for name in sys.modules if name.partition('.')[0] == 'llm']:
            patch.setitem(sys.modules, module, None)  # any import of it fails
        with pytest.raises(ImportError):
            importlib.import_module('llm.errors')
        spec = importlib.util.spec_from_file_location('tasks', f'{directory}/tasks.py')
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        mixture = seqio.get_mixture_or_task('small')
        each = {task.name: read(task.get_dataset(split='train', **split)) for task in mixture.tasks}
        some = read(mixture.get_dataset(split='validation', num_epochs=1, **split))
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    ours = texts(directory)
    assert {name.removeprefix('small:'): sorted(found) for name, found in each.items()} == {
        name: sorted(found) for name, found in ours.items()
    }
    # SeqIO goes on for as long as one of the components has examples it has not given.
    held_out = {text for found in texts(directory, 'validation').values() for text in found}
    assert set(some) <= held_out and len(set(some)) > 5
    assert rates == {f'small:{each["name"]}': each['share'] for each in read_record(directory)['components']}


def test_a_tokenizer_learns_from_equal_bytes_of_each_component(tmp_path, inputs, capsys):
    web, books, plain = inputs
    job(tmp_path, (web, books, dataclasses.replace(plain, validation_fraction=1e-9)))(RUN)
    assert 'plain has no documents of the validation split' in capsys.readouterr().out
    sources = PreparedMixture(str(tmp_path / 'mixture'))
    config = VocabularyConfig('byte_level_bpe', 300, sample_bytes=6000)
    TrainTokenizer(str(tmp_path / 'tokenizer'), config, sources, held_out_bytes=500)(RUN)
    report = json.loads((tmp_path / 'tokenizer/report.json').read_text())
    assert list(report['sources']) == ['web', 'books', 'plain']
    assert all(1500 < source['sampled_bytes'] <= 2000 for source in report['sources'].values())
    held_out = [source['held_out_bytes_per_token'] for source in report['sources'].values()]
    assert min(held_out[:2]) > 1 and held_out[2] is None
    printed = capsys.readouterr().out.partition('held-out text')[2]
    assert 'books  ' in printed and 'plain  ' not in printed
    assert 'plain has no documents of the validation split, and is not measured' in printed
    assert '<td>none</td>' in (tmp_path / 'tokenizer/report.html').read_text()


def test_training_on_a_mixture_goes_on_to_the_same_bits(tiny_run, inputs):
    folder = tiny_run.folder
    job(folder, inputs, curriculum=curriculum())(RUN)
    text = (folder / 'run.gin').read_text().replace('data/text_files.gin', 'data/mixture.gin')
    lines = [line for line in text.splitlines() if 'text_files' not in line and 'VALIDATION_FRACTION' not in line]
    text = '\n'.join(lines).replace('FILES = ', 'MIXTURE = ').replace(str(tiny_run.corpus), str(folder / 'mixture'))
    (folder / 'run.gin').write_text(text)

    assert tiny_run() == 0
    losses = [line['loss'] for line in tiny_run.metrics('train')]
    assert len(losses) == 12
    assert {line['set'] for line in tiny_run.metrics('evaluation')} == {'web', 'books', 'plain'}
    (tiny_run.directory / 'complete').unlink()
    shutil.rmtree(tiny_run.checkpoints / 'step_000000012')
    shutil.rmtree(tiny_run.checkpoints / 'step_000000009')
    assert tiny_run() == 0
    assert [line['loss'] for line in tiny_run.metrics('train')] == losses


@pytest.fixture
def refused(tmp_path, capfd):
    """Starts a run file with bindings that it must refuse; the one line that it says."""

    def refused(name, *bindings):
        arguments = [f'--gin_file=gin_configs/runs/{name}.gin', *(f'--gin_bindings={each}' for each in bindings)]
        capfd.readouterr()
        code = main(arguments)
        printed = capfd.readouterr().err
        assert code == 2 and 'Traceback' not in printed, printed
        return printed.splitlines()[-1].removeprefix('error: ')

    return refused


def test_bad_input_is_said_in_one_line(tmp_path, inputs, refused):
    web, books, plain = inputs
    out = f'OUTPUT_DIRECTORY="{tmp_path}/out"'
    given = {'WEB': web, 'BOOKS': books, 'FILES': plain.files}

    def made(*bindings, **changes):
        return refused('make_mixture', out, *(f'{k}={v!r}' for k, v in (given | changes).items()), *bindings)

    assert 'there is no such directory' in made(WEB=f'{tmp_path}/nowhere')
    records_only = tmp_path / 'records_only'
    shutil.copytree(web, records_only, ignore=shutil.ignore_patterns('documents'))
    config = json.loads((records_only / 'config.json').read_text())
    (records_only / 'config.json').write_text(json.dumps(config | {'runner.directory': 'gs://bucket/run'}))
    assert 'gs://bucket/run has its documents' in made(WEB=str(records_only))
    unfinished = tmp_path / 'unfinished'
    shutil.copytree(web, unfinished)
    (unfinished / 'summary.json').unlink()
    line = made(WEB=str(unfinished))
    assert f'web, {unfinished}: prepare_data has not ended there: summary.json is missing' in line
    shutil.copy(Path(web) / 'summary.json', unfinished)
    (unfinished / 'documents/000001.parquet').unlink()
    (unfinished / 'documents/000002.parquet').write_bytes(b'PAR1 cut short')
    assert '000002.parquet: is not Parquet that can be read' in made(WEB=str(unfinished))
    (unfinished / 'documents/000002.parquet').unlink()
    assert 'documents/ has 100 documents and its counts say 200' in made(WEB=str(unfinished))
    assert 'was not made by prepare_data' in made(WEB=str(_run_of_another_job(tmp_path)))
    wanted = ('web/parts.Part.filters = (@parts.Filter(),)', 'parts.Filter.column = "language"')
    assert 'web: has no training documents' in made(*wanted, 'parts.Filter.values = ("de",)')
    missing = made(wanted[0], 'parts.Filter.column = "perplexity.value"', 'parts.Filter.minimum = 1')
    assert "no column 'perplexity.value'" in missing and 'outliers/characters.value' in missing
    assert 'does not rise from 0' in made('AT = (0.0, 0.8, 0.8)')
    late = ('curricula.Curriculum.shape = "constant"', 'WEB_RATES = (0.0, 0.0, 0.4)')
    assert 'web: its rates come to 0 over the run' in made(*late)
    assert 'web has a rate that is negative' in made('WEB_RATES = (0.8, -1.0, 0.4)')
    assert 'the rates of web are all 0' in made('WEB_RATES = (0.0, 0.0, 0.0)')
    assert "two components are called 'web'" in made('books/parts.Part.name = "web"')
    assert 'budget is in tokens, and what is counted is bytes' in made('BUDGET = 5', 'BUDGET_UNIT = "tokens"')
    assert 'rates are of books, files, web, and the components are' in made('files/parts.Part.name = "texts"')
    assert 'weights, a temperature or epochs' in made('web/parts.Part.weight = 2.0')

    copy = tmp_path / 'copy'
    shutil.copytree(web, copy)
    job(tmp_path, (str(copy), books, plain))(RUN)
    mixture = f'MIXTURE="{tmp_path}/mixture"'
    file = copy / 'documents/000001.parquet'
    table = pyarrow.parquet.read_table(file)
    file.write_bytes(file.read_bytes())  # another time, the same content
    assert texts(f'{tmp_path}/mixture')['web']
    pyarrow.parquet.write_table(table.slice(1), file)
    run = f'RUN_DIRECTORY="{tmp_path}/run"'
    line = refused('pretrain_mixture', mixture, run)
    assert '000001.parquet: has changed since the mixture was made' in line
    file.unlink()
    assert '000001.parquet: cannot be read (No such file' in refused('pretrain_mixture', mixture, run)
    assert 'is not a finished mixture' in refused('pretrain_mixture', f'MIXTURE="{tmp_path}/none"', run)


def _run_of_another_job(folder):
    (folder / 'other').mkdir()
    (folder / 'other/config.json').write_text('{"type": "Pretrain"}')
    return folder / 'other'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'parts': ()}, 'there are no components'),
        ({'temperature': 0.0}, 'temperature'),
        ({'validation_fraction': 1.0}, 'validation_fraction'),
        ({'name': 'a-b'}, "name 'a-b'"),
        ({'budget': 0, 'budget_unit': 'bytes'}, 'budget = 0'),
    ],
)
def test_settings_are_checked(tmp_path, inputs, changes, message):
    with pytest.raises(UserError, match=message):
        job(tmp_path, inputs, **changes)
    web, books, plain = inputs
    with pytest.raises(UserError, match='components have weights, but not books'):
        job(tmp_path, inputs, parts=(Part('web', web, weight=1), Part('books', books)))
    for settings in ({}, {'directory': web, 'source': plain}, {'directory': web, 'weight': 0.0}, {'name': 'a-b'}):
        with pytest.raises(UserError):
            Part(**{'name': 'a', **settings})
    for settings in ({}, {'minimum': 2, 'below': 1}):
        with pytest.raises(UserError):
            Filter('language', **settings)
    assert dataclasses.replace(Part('web', web, epochs=2.5)).sample == 1
