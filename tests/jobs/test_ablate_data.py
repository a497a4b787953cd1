"""The ablate_data job: variants of data by seeds, with equal tokens, stopped and gone on with, and what it says."""

import csv
import dataclasses
import json
import random
import shutil

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from llm.configuration import load_job
from llm.data.vocabularies.training import VocabularyConfig, train_on_sample
from llm.errors import UserError
from llm.main import main
from llm.training.metrics import read_metrics
from llm.training.run_directory import write_atomically

RUN = """
include 'gin_configs/runs/ablate_data.gin'
include 'gin_configs/models/tiny.gin'
include 'gin_configs/optimizers/adamw.gin'
from __gin__ import dynamic_registration
from llm.data import datasets
from llm.data.sources import text_files
from llm.data.vocabularies import training
from llm.evaluation import multiple_choice
from llm.jobs import ablate_data
from llm.parallel import mesh
from llm.training import checkpoints

BASELINE = '{folder}/words.jsonl'
CANDIDATE = '{folder}/noise.jsonl'
HELD_OUT = '{folder}/held.jsonl'
MULTIPLE_CHOICE = (@quiz/multiple_choice.MultipleChoiceSet(),)
OUTPUT_DIRECTORY = '{folder}/ablation'
SEEDS = (3, 4)
VOCAB_SIZE = 264
D_MODEL = 16
NUM_LAYERS = 1
NUM_HEADS = 2
NUM_KV_HEADS = 2
HEAD_DIM = 8
D_FF = 32
TOTAL_STEPS = 12
WARMUP_STEPS = 2
BATCH_SIZE = 4
SEQUENCE_LENGTH = 64
MAX_LENGTH = 64
EVALUATE_EVERY = 6
SAVE_EVERY = 6
LEARNING_RATE = 1e-2
ablate_data.AblateData.variants = (
    @baseline/ablate_data.DataVariant(),
    @candidate/ablate_data.DataVariant(),
    @again/ablate_data.DataVariant(),
)
again/ablate_data.DataVariant.name = 'again'
again/ablate_data.DataVariant.data = @baseline/datasets.DataConfig()
quiz/multiple_choice.MultipleChoiceSet.name = 'choices'
quiz/multiple_choice.MultipleChoiceSet.files = '{folder}/quiz.jsonl'
training.VocabularyConfig.kind = 'bytes'
datasets.DataConfig.workers = 1
mesh.MeshConfig.data = 1
checkpoints.CheckpointConfig.keep_last = 2
"""


def words(generator, count):
    return ' '.join(generator.choices(['the', 'sea', 'is', 'deep', 'and', 'cold'], k=count))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two texts, one of them of noise, text set aside, questions, and the gin file."""
    folder = tmp_path_factory.mktemp('ablation')
    generator = random.Random(0)
    texts = {
        'words': [words(generator, 60) for _ in range(30)],
        'noise': [''.join(generator.choices('abcdefghij0123456789', k=200)) for _ in range(20)],
        'held': [words(generator, 40) for _ in range(6)],
    }
    texts['noise'].append(texts['held'][0].upper() + '!')  # contaminated, but for case and punctuation
    for name, some in texts.items():
        (folder / f'{name}.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in some))
    items = [
        {'query': f'{words(generator, 3)}?', 'choices': [words(generator, 3), '0a1b2c3'], 'gold': 0} for _ in range(10)
    ]
    (folder / 'quiz.jsonl').write_text(''.join(json.dumps(item) + '\n' for item in items))
    (folder / 'blank.txt').write_text(' ')
    (folder / 'run.gin').write_text(RUN.format(folder=folder))
    return folder


@pytest.fixture(scope='module')
def run(folder, compiled):
    """Runs the job in this process with more bindings; the exit code."""
    before = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LLM_CACHE', str(folder / 'tokens'))
        patch.setenv('JAX_COMPILATION_CACHE_DIR', str(compiled))
        jax.config.update('jax_compilation_cache_dir', str(compiled))
        compilation_cache.reset_cache()  # whether there is one is decided at the first compilation of the process

        def run(*bindings, dry_run=False):
            arguments = [f'--gin_file={folder / "run.gin"}', *(f'--gin_bindings={binding}' for binding in bindings)]
            return main([*arguments, *(['--dry_run'] if dry_run else [])])

        yield run
    jax.config.update('jax_compilation_cache_dir', before)
    compilation_cache.reset_cache()


@pytest.fixture(scope='module')
def directory(folder, run):
    """Of the finished job."""
    assert run() == 0
    return folder / 'ablation'


def table(directory):
    with open(directory / 'results.csv', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def metrics(run_directory):
    """Of every step, without times."""
    return [{key: value for key, value in line.items() if key != 'timing'} for line in read_metrics(run_directory)]


def test_a_dry_run_says_what_would_be_run_and_writes_nothing(folder, run, capfd):
    assert run("OUTPUT_DIRECTORY = 'nowhere'", dry_run=True) == 0
    said = capfd.readouterr().out
    assert said.startswith('would train 6 models of ')
    assert 'each on 12 steps of 256 tokens = 3,072 tokens, ' in said
    assert 'together 18,432 tokens, ' in said and 'choices: 10 items' in said
    assert not (folder / 'nowhere').exists()


def test_results_are_those_of_the_runs(directory):
    rows = table(directory)
    curves = {(row['variant'], row['seed'], row['step']) for row in rows if row['metric'] == 'bits_per_byte'}
    variants = ('baseline', 'candidate', 'again')
    assert curves == {(name, seed, step) for name in variants for seed in '34' for step in ('6', '12')}
    record = json.loads((directory / 'verdict.json').read_text())
    by_name = {(each['variant'], each['dataset'], each['metric']): each for each in record['metrics']}
    assert len(by_name) == 2 * 5

    def final(variant, metric):
        found = [float(row['value']) for row in rows if (row['variant'], row['metric']) == (variant, metric)]
        return sum(found[-1:] + found[len(found) // 2 - 1 : len(found) // 2]) / 2

    for metric in ('bits_per_byte', 'accuracy', 'margin_per_byte'):
        name = 'held_out' if metric == 'bits_per_byte' else 'choices'
        each = by_name['candidate', name, metric]
        assert each['value'] == pytest.approx(final('candidate', metric))
        assert each['difference'] == pytest.approx(final('candidate', metric) - final('baseline', metric))
        assert each['low'] <= each['difference'] <= each['high']
    assert by_name['candidate', 'held_out', 'bits_per_byte']['difference'] > 0.1  # noise teaches less
    assert by_name['candidate', 'choices', 'margin_per_byte']['difference'] < 0


def test_the_same_data_gives_the_same_bits_and_no_difference(directory):
    for seed in (3, 4):
        runs = [directory / 'runs' / name / f'seed_{seed}' for name in ('baseline', 'again')]
        assert metrics(runs[0]) == metrics(runs[1])
        assert len({(each / 'multiple_choice.json').read_bytes() for each in runs}) == 1
    assert metrics(directory / 'runs/baseline/seed_3') != metrics(directory / 'runs/baseline/seed_4')
    record = json.loads((directory / 'verdict.json').read_text())
    again = [each for each in record['metrics'] if each['variant'] == 'again']
    assert {each['corrected_p_value'] for each in again} == {1.0}
    assert record['overall']['again'] == 'no difference shown'
    assert record['sentences'][1].startswith('No difference between again and baseline is shown (2 seeds in pairs')


def test_the_report_says_what_each_variant_is_and_where_held_out_text_was_found(directory):
    record = json.loads((directory / 'verdict.json').read_text())
    data = record['data']
    assert data['candidate']['documents'] == 21
    assert data['baseline']['tokens trained on'] == 12 * 256  # others less the padding of a last row
    assert 12 * 256 - 64 < data['candidate']['tokens trained on'] <= 12 * 256
    rows = -(-data['candidate']['tokens'] // 64)
    assert data['candidate']['epochs'] == pytest.approx(12 * 4 / rows, rel=0.05)
    found = record['overlap']['candidate']['held_out']
    assert (found['documents'], found['equal'], found['touched']) == (6, 1, 1)
    assert record['overlap']['baseline']['held_out']['equal'] == 0
    assert any('held_out is in the training text of candidate' in text for text in record['warnings'])
    page = (directory / 'report.html').read_text()
    assert record['sentences'][0] in page and 'class="band c1"' in page and 'http' not in page.split('<details>')[0]
    assert (directory / 'curves.svg').read_text().startswith('<svg')


def test_killed_it_goes_on_with_the_run_that_was_not_finished_to_the_same_bits(directory, run, capfd):
    # What a kill after the first checkpoint of one of the runs leaves; the one after it had not begun.
    cut, later = directory / 'runs/candidate/seed_4', directory / 'runs/again/seed_4'
    choices = 'multiple_choice.json'
    before = [metrics(cut), metrics(later), (cut / choices).read_bytes(), (later / choices).read_bytes()]
    results = {name: (directory / name).read_bytes() for name in ('results.csv', 'verdict.json', 'curves.svg')}
    untouched = (directory / 'runs/baseline/seed_4' / choices).stat().st_mtime_ns
    shutil.rmtree(cut / 'checkpoints' / 'step_000000012')
    for path in [cut / 'complete', cut / choices, *(directory / name for name in results)]:
        path.unlink()
    shutil.rmtree(later)
    capfd.readouterr()
    assert run() == 0
    said = capfd.readouterr()
    assert f'resuming {cut}' in said.err and 'restored the checkpoint of step 6' in said.err
    assert said.err.count('starting ') == said.err.count('resuming ') == 1
    assert said.out.count('already complete') == 4
    after = [metrics(cut), metrics(later), (cut / choices).read_bytes(), (later / choices).read_bytes()]
    assert after == before
    assert {name: (directory / name).read_bytes() for name in results} == results
    assert (directory / 'runs/baseline/seed_4' / choices).stat().st_mtime_ns == untouched


def test_changed_text_is_not_compared_with_what_was_trained_before(folder, directory, run, capfd):
    path = folder / 'held.jsonl'
    before = path.read_text()
    write_atomically(path, before + '{"text": "more"}\n')
    assert run() == 2
    assert 'the content of held out: held_out is not what it was when this began' in capfd.readouterr().err
    write_atomically(path, before)
    assert run() == 0


@pytest.mark.parametrize(
    ('bindings', 'said'),
    [
        (['SEEDS = (1,)'], 'seeds are (1,)'),
        (['SEEDS = (1, 1)'], 'seeds are (1, 1)'),
        (["again/ablate_data.DataVariant.name = 'baseline'"], "'baseline' is given twice"),
        (["again/ablate_data.DataVariant.name = '../x'"], "'../x'"),
        (['loop.LoopConfig.patience = 2'], 'with patience'),
        (['candidate/datasets.DataConfig.evaluation_stride = 8'], 'variants differ in DataConfig.evaluation_stride'),
        (['candidate/datasets.DataConfig.evaluation = ()'], 'candidate has an evaluation of its own'),
        (["HELD_OUT = 'nothing*.jsonl'"], "no file matches 'nothing*.jsonl'"),
        (
            ["quiz/multiple_choice.MultipleChoiceSet.files = '{folder}/words.jsonl'"],
            "words.jsonl:1: there is no field 'query', but 'text'",
        ),
        # Nothing is kept of what cannot begin: another config may have the directory.
        (['MAX_LENGTH = 1'], 'max_length is 1. Use at least 2'),
        (
            ['candidate/datasets.Component.max_epochs = 1.0', 'TOTAL_STEPS = 60', "OUTPUT_DIRECTORY = '{folder}/free'"],
            'candidate: every component has had its max_epochs after ',
        ),
        (['MAX_LENGTH = 4', "OUTPUT_DIRECTORY = '{folder}/free'"], 'tokens, and rows have 4'),
        (
            ["HELD_OUT = '{folder}/blank.txt'", "OUTPUT_DIRECTORY = '{folder}/free'"],
            'blank.txt: the validation split has no documents',
        ),
        (['VOCAB_SIZE = 258', "OUTPUT_DIRECTORY = '{folder}/free'"], 'the vocabulary has 259 tokens and the model 258'),
    ],
)
def test_mistakes(folder, run, capfd, bindings, said):
    assert run(*(binding.replace('{folder}', str(folder)) for binding in bindings)) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith('error: ') and said in last


def test_nothing_to_compare_or_to_measure_on(folder):
    job, _ = load_job([str(folder / 'run.gin')])
    with pytest.raises(UserError, match='there is 1 variant'):
        dataclasses.replace(job, variants=job.variants[:1])
    short = dataclasses.replace(job.model, position='learned', max_positions=64)
    with pytest.raises(UserError, match='max_length is 65 and the model has 64 positions'):
        dataclasses.replace(job, model=short, max_length=65)
    with pytest.raises(UserError, match='there is no held-out set'):
        dataclasses.replace(job, held_out=())


def test_epochs_are_those_of_all_steps_also_where_a_component_ends_before(folder, monkeypatch):
    monkeypatch.setenv('LLM_CACHE', str(folder / 'tokens'))
    job, _ = load_job([str(folder / 'run.gin')])
    words, noise = (dataclasses.replace(each.data.components[0], name=each.name) for each in job.variants[:2])
    both = dataclasses.replace(job.variants[0].data, components=(words, dataclasses.replace(noise, max_epochs=0.25)))
    job = dataclasses.replace(job, variants=(dataclasses.replace(job.variants[0], data=both), job.variants[1]))
    vocabulary = train_on_sample(VocabularyConfig('bytes'), [])
    found = job._epochs(vocabulary)
    examples = both.open_training(vocabulary, 64, progress=False)
    sizes = [source.records.num_rows for source in examples.sources]
    ended = sizes[1] // 4
    assert found['baseline'] == pytest.approx({'baseline': (48 - ended) / sizes[0], 'candidate': ended / sizes[1]})
    assert 48 * examples.schedule.shares()[1] > ended + 1  # it would be read more often without a limit
