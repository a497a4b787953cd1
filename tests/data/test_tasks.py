"""SeqIO tasks over small TFDS datasets, which are written to disk in TFDS's own format and read by the real code."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llm.configuration import Invocation
from llm.data import tasks
from llm.data.mixtures.parts import Part
from llm.data.mixtures.prepared import PreparedMixture, register_mixture
from llm.data.objectives import LanguageModelling
from llm.data.packing import PackedRows, training_plan
from llm.data.sources import ReadCounts, StandardLibrary, TextFiles, read_documents
from llm.data.token_cache_building import open_token_cache
from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError
from llm.jobs.make_mixture import MakeMixture


@pytest.fixture(scope='module')
def seqio():
    return tasks.import_seqio()


def texts(prefix, count):
    return [f'{prefix} {i}: naïve café ' + 'la ' * (i % 5) for i in range(count)]


SPLITS = {
    'c4/en:3.1.0': {'train': texts('web', 90), 'validation': texts('held out web', 12)},
    'wikipedia/20230601.en:1.0.0': {'train': texts('article', 300)},
    'lm1b:1.1.0': {'train': texts('sentence', 40), 'test': texts('held out sentence', 9)},
    'tiny_shakespeare:1.0.0': {'train': ['to be\n\nor not'], 'validation': ['that is'], 'test': ['the question']},
}


@pytest.fixture(scope='module')
def data_directory(tmp_path_factory):
    """The four datasets with the features that TFDS's own builders declare; C4's train split in three files."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    folder = str(tmp_path_factory.mktemp('tensorflow_datasets'))
    for full_name, splits in SPLITS.items():
        name, version = full_name.split(':')
        dataset, _, config = name.partition('/')
        features = tfds.builder(full_name, data_dir=folder).info.features
        tfds.dataset_builders.store_as_tfds_dataset(
            name=dataset,
            version=version,
            config=config or None,
            data_dir=folder,
            features=features,
            split_datasets={
                split: tf.data.Dataset.from_tensor_slices(
                    {key: rows if key == 'text' else ['x'] * len(rows) for key in features}
                )
                for split, rows in splits.items()
            },
            download_config=tfds.download.DownloadConfig(num_shards=3 if dataset == 'c4' else 1),
        )
    return folder


def documents(source, split):
    return list(read_documents(source, split))


@pytest.mark.parametrize(
    ('task', 'train', 'validation'),
    [
        ('c4_en', SPLITS['c4/en:3.1.0']['train'], SPLITS['c4/en:3.1.0']['validation']),
        ('lm1b', SPLITS['lm1b:1.1.0']['train'], SPLITS['lm1b:1.1.0']['test']),
        ('tiny_shakespeare', ['to be\n\nor not'], ['that is']),
    ],
)
def test_documents_of_a_tfds_task_are_its_texts(data_directory, task, train, validation):
    source = tasks.SeqioTask(task, data_directory)
    assert sorted(documents(source, 'train')) == sorted(train)
    assert sorted(documents(source, 'validation')) == sorted(validation)


def test_wikipedia_without_a_validation_split_is_cut_in_two(data_directory):
    source = tasks.SeqioTask('wikipedia_en', data_directory)
    train, validation = documents(source, 'train'), documents(source, 'validation')
    assert (len(train), len(validation)) == (297, 3)
    assert sorted(train + validation) == sorted(SPLITS['wikipedia/20230601.en:1.0.0']['train'])


def test_each_file_is_a_shard_and_counts_its_documents(data_directory):
    shards = tasks.SeqioTask('c4_en', data_directory).shards('train')
    assert [shard.name for shard in shards] == [f'c4-train.tfrecord-0000{i}-of-00003' for i in range(3)]
    assert len({shard.fingerprint() for shard in shards}) == 3
    counts = [ReadCounts() for _ in shards]
    parts = [list(shard.documents(count)) for shard, count in zip(shards, counts, strict=True)]
    assert all(parts) and sorted(itertools.chain(*parts)) == sorted(SPLITS['c4/en:3.1.0']['train'])
    assert [count.documents for count in counts] == [len(part) for part in parts]
    assert sum(count.bytes for count in counts) == sum(len(text.encode()) for text in SPLITS['c4/en:3.1.0']['train'])


@pytest.mark.slow  # each process imports TensorFlow
def test_a_token_cache_of_a_task_is_the_same_from_processes(data_directory, tmp_path):
    source = tasks.SeqioTask('c4_en', data_directory)
    alone = open_token_cache(source, 'train', ByteVocabulary(), tmp_path / '1', workers=1)
    together = open_token_cache(source, 'train', ByteVocabulary(), tmp_path / '2', workers=2)
    assert [shard.digests for shard in alone.shards] == [shard.digests for shard in together.shards]
    assert alone.digest == together.digest
    decoded = sorted(ByteVocabulary().decode(alone.document(i)) for i in range(alone.num_documents))
    assert decoded == sorted(SPLITS['c4/en:3.1.0']['train'])


def test_fingerprints_know_settings_and_not_where_the_data_lies(data_directory, tmp_path):
    copied = tmp_path / 'moved'
    copied.symlink_to(data_directory)

    def fingerprint(**changes):
        source = dataclasses.replace(tasks.SeqioTask('lm1b', data_directory), **changes)
        return source.shards('train')[0].fingerprint()

    assert fingerprint() == fingerprint(data_directory=str(copied))
    assert len({fingerprint(), fingerprint(revision=1), fingerprint(train_split='validation')}) == 3


def test_missing_data_says_how_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r'lm1b:1\.1\.0 is not in') as caught:
        tasks.SeqioTask('lm1b', str(tmp_path)).shards('train')
    assert f'tfds build lm1b:1.1.0 --data_dir={tmp_path}' in caught.value.fix
    assert 'data_directory' in caught.value.fix


def test_an_unknown_version_task_split_or_module_is_a_user_error(data_directory):
    with pytest.raises(UserError, match=r'cannot open c4/en:9\.9\.9'):
        tasks.SeqioTask('c4_en', data_directory, tfds_version='9.9.9').shards('train')
    with pytest.raises(UserError, match=r"no SeqIO task is called 'stdlb'.*Did you mean 'stdlib'"):
        tasks.SeqioTask('stdlb').shards('train')
    with pytest.raises(UserError, match="no split 'dev', only train, validation"):
        tasks.SeqioTask('lm1b', data_directory, validation_split='dev').shards('validation')
    with pytest.raises(UserError, match="module 'no_such_tasks' cannot be imported"):
        tasks.SeqioTask('mine', modules=('no_such_tasks',)).shards('train')


def test_a_damaged_record_file_is_a_user_error(data_directory, tmp_path):
    copy = tmp_path / 'lm1b' / '1.1.0'
    copy.mkdir(parents=True)
    for path in (Path(data_directory) / 'lm1b' / '1.1.0').iterdir():
        data = bytearray(path.read_bytes())
        if 'train' in path.name:
            data[len(data) // 2] ^= 255
        (copy / path.name).write_bytes(data)
    with pytest.raises(UserError, match='cannot be read') as caught:
        documents(tasks.SeqioTask('lm1b', str(tmp_path)), 'train')
    assert caught.value.where == 'lm1b-train.tfrecord-00000-of-00001'


def test_the_tasks_tokenise_by_themselves_too(data_directory):
    task = tasks.tfds_task('mine', tasks.TFDS_TASKS['lm1b'], ByteVocabulary().as_seqio(), data_directory)
    examples = list(task.get_dataset(None, 'train', shuffle=False).as_numpy_iterator())
    decoded = [ByteVocabulary().decode(example['targets']) for example in examples]
    assert sorted(decoded) == sorted(SPLITS['lm1b:1.1.0']['train'])
    assert all(example['targets'][-1] == ByteVocabulary().eos_id for example in examples)


TASKS_OF_A_USER = """
import seqio, tensorflow as tf

def source(prefix, count):
    def dataset_fn(split, shuffle_files=False):
        rows = [f"{prefix} {i}" for i in range(count)]
        return tf.data.Dataset.from_tensor_slices({"text": rows + ["  ", b"bad \\xff byte"]})
    return seqio.FunctionDataSource(dataset_fn, splits=["train"], num_input_examples={"train": count})

rekey = lambda dataset: dataset.map(lambda x: {"targets": x["text"]})
shout = lambda x: {**x, "targets_pretokenized": tf.strings.upper(x["targets_pretokenized"])}
upper = lambda dataset: dataset.map(shout)
number = lambda dataset: dataset.map(lambda x: {"targets": tf.constant([1])})
features = {"targets": seqio.Feature(seqio.ByteVocabulary())}
cache = seqio.CacheDatasetPlaceholder()
tokenize = seqio.preprocessors.tokenize
seqio.TaskRegistry.add("plain", source("plain", 30), features, [rekey, tokenize, cache])
seqio.TaskRegistry.add("shouted", source("shouted", 10), features, [rekey, tokenize, upper, cache])
seqio.TaskRegistry.add("uncached", source("uncached", 10), features, [rekey, tokenize])
seqio.TaskRegistry.add("numbers", source("numbers", 10), features, [number, cache])
seqio.MixtureRegistry.add("both", [("plain", seqio.mixing_rate_num_examples), ("shouted", 5.0)])
seqio.MixtureRegistry.add("all", [("both", 3.0), ("numbers", 2)])
"""


@pytest.fixture(scope='module')
def user_tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('modules')
    (folder / 'tasks_of_a_user.py').write_text(TASKS_OF_A_USER)
    sys.path.insert(0, str(folder))
    yield ('tasks_of_a_user',)
    sys.path.remove(str(folder))


def test_any_registered_task_is_a_source(user_tasks):
    counts = ReadCounts()
    plain = list(read_documents(tasks.SeqioTask('plain', modules=user_tasks), 'train', counts))
    assert plain == [*(f'plain {i}' for i in range(30)), 'bad \ufffd byte']
    assert (counts.documents, counts.empty, counts.invalid_utf8) == (31, 1, 1)
    assert [(sample.file, sample.record) for sample in counts.samples] == [('train', 32)]
    shouted = documents(tasks.SeqioTask('shouted', modules=user_tasks), 'train')
    assert shouted[:2] == ['SHOUTED 0', 'SHOUTED 1']


def test_a_task_that_gives_no_text_is_refused(user_tasks):
    with pytest.raises(UserError, match='no CacheDatasetPlaceholder'):
        documents(tasks.SeqioTask('uncached', modules=user_tasks), 'train')
    with pytest.raises(UserError, match="gives targets, and no text in 'targets'"):
        documents(tasks.SeqioTask('numbers', modules=user_tasks), 'train')


def test_rates_of_a_mixture_are_seqios(user_tasks):
    assert tasks.mixture_rates('both', user_tasks) == [('plain', 30.0), ('shouted', 5.0)]
    nested = dict(tasks.mixture_rates('all', user_tasks))
    assert nested == pytest.approx({'plain': 3 * 30 / 35, 'shouted': 3 * 5 / 35, 'numbers': 2.0})
    with pytest.raises(UserError, match=r"no SeqIO mixture is called 'bot'.*Did you mean 'both'"):
        tasks.mixture_rates('bot', user_tasks)


def test_our_sources_are_tasks_and_come_back_unchanged(tmp_path, seqio):
    (tmp_path / 'a.txt').write_text('one<end>two\n<end>drei ß')
    source = TextFiles(str(tmp_path / '*.txt'), document_separator='<end>', validation_fraction=0.0)
    task = tasks.as_seqio_task(source, 'my_texts', ByteVocabulary().as_seqio())
    seqio.TaskRegistry.add_provider('my_texts', task)
    assert documents(tasks.SeqioTask('my_texts'), 'train') == documents(source, 'train')
    ids = [example['targets'] for example in task.get_dataset(None, 'train', shuffle=False).as_numpy_iterator()]
    assert [ByteVocabulary().decode(row) for row in ids] == documents(source, 'train')


def test_the_standard_library_is_a_registered_task(seqio):
    tasks.register_tasks()
    assert set(tasks.TFDS_TASKS) | {'stdlib'} <= set(seqio.TaskRegistry.names())
    assert documents(tasks.SeqioTask('stdlib'), 'validation') == documents(StandardLibrary(), 'validation')


def test_an_objective_as_a_preprocessor_gives_what_the_packed_rows_hold(tmp_path):
    (tmp_path / 'a.txt').write_text('\n'.join(texts('line', 12)))
    source = TextFiles(str(tmp_path / '*.txt'), document_separator='\n', validation_fraction=0.0)
    vocabulary = ByteVocabulary()
    objective = LanguageModelling(start=vocabulary.bos_id)
    outputs = {'inputs': np.int32, 'targets': np.int32, 'loss_weights': np.float32, 'positions': np.int32}
    task = tasks.as_seqio_task(
        source,
        'lines',
        vocabulary.as_seqio(),
        preprocessors=[
            *tasks.text_preprocessors(),
            lambda dataset: dataset.map(lambda example: {'targets': example['targets']}),
            tasks.as_seqio_preprocessor(objective, 0, outputs),
        ],
    )
    cache = open_token_cache(source, 'train', vocabulary, tmp_path / 'cache', workers=1)
    rows = PackedRows(cache, training_plan(cache, cache.num_tokens, 'concatenate', 0), cache.num_tokens)[0]
    ours = [{name: rows[name][rows['segment_ids'] == i + 1] for name in outputs} for i in range(12)]
    theirs = list(task.get_dataset(None, 'train', shuffle=False).as_numpy_iterator())
    for examples in (ours, theirs):
        examples.sort(key=lambda example: example['targets'].tobytes())
    for mine, other in zip(ours, theirs, strict=True):
        for name, dtype in outputs.items():
            assert np.array_equal(mine[name], other[name]) and other[name].dtype == dtype, name


def test_randomness_of_a_preprocessor_is_by_position():
    import tensorflow as tf

    def noise(example, generator):
        return {'noise': generator.random(3)}

    step = tasks.as_seqio_preprocessor(noise, 5, {'noise': np.float64})
    dataset = step(tf.data.Dataset.from_tensor_slices({'a': [1, 2, 3]}))
    values = [np.stack([example['noise'] for example in dataset.as_numpy_iterator()]) for _ in range(2)]
    assert np.array_equal(*values) and len(np.unique(values[0])) == 9


def test_tensorflow_is_imported_only_when_a_task_is_read():
    program = (
        'import sys\n'
        'from llm.data import datasets, examples, loader, objectives, packing, tasks, token_cache_building\n'
        'from llm.data.sources import StandardLibrary\n'
        'tasks.SeqioTask("c4_en"); StandardLibrary().shards("train")\n'
        'assert not {"tensorflow", "seqio", "tensorflow_datasets"} & set(sys.modules)\n'
    )
    subprocess.run([sys.executable, '-c', program], check=True, cwd=Path(__file__).parents[2])


def test_a_mixture_directory_in_the_registry(seqio, tmp_path):
    (tmp_path / 'a.jsonl').write_text('\n'.join(f'{{"text": "text {i}"}}' for i in range(50)))
    parts = tuple(Part(name, source=TextFiles(str(tmp_path / 'a.jsonl'), validation_fraction=0.2)) for name in 'ab')
    made = MakeMixture(str(tmp_path / 'mixture'), parts, 'of_a_directory')
    made(Invocation(dry_run=False, operative_config='', command=(), config_files=()))
    names = register_mixture(made.output_directory)
    assert names == ('of_a_directory', ['of_a_directory:a', 'of_a_directory:b'])
    assert tasks.mixture_rates(names[0]) == [(name, 0.5) for name in names[1]]
    (ours, _) = PreparedMixture(made.output_directory).components()
    assert documents(tasks.SeqioTask(names[1][0]), 'train') == documents(ours.source, 'train')
    with pytest.raises(UserError, match='has a mixture of the name of_a_directory already'):
        register_mixture(made.output_directory)
