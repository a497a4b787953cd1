"""The data config: from gin to examples and evaluation sets."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llm.configuration import load_job
from llm.data import facts
from llm.data.datasets import Component, DataConfig, SeqioMixture, default_cache_directory
from llm.data.loader import Loader
from llm.data.mixtures.prepared import PreparedMixture
from llm.data.sources import TextFiles
from llm.data.tasks import SeqioTask
from llm.data.vocabularies import ByteVocabulary
from llm.errors import UserError
from llm.parallel.mesh import MeshConfig, make_mesh

VOCABULARY = ByteVocabulary()
PIECES = sorted((Path(__file__).parents[2] / 'gin_configs' / 'data').glob('*.gin'))


def component(folder, name, documents, length=40, **settings):
    files = folder / name
    if not files.exists():
        files.mkdir()
        lines = (json.dumps({'text': f'{name} {i} ' + 'é' * (i % length)}) for i in range(documents))
        (files / 'a.jsonl').write_text('\n'.join(lines))
    return Component(name, TextFiles(str(files / '*.jsonl'), validation_fraction=0.2), **settings)


@pytest.fixture
def config(tmp_path):
    parts = (component(tmp_path, 'web', 200), component(tmp_path, 'books', 60))
    return DataConfig(parts, cache_directory=str(tmp_path / 'cache'), workers=1)


def shares(examples, rows):
    sources, _ = examples.schedule.locate(np.arange(rows))
    return (np.bincount(sources, minlength=len(examples.sources)) / rows).tolist()


def with_components(config, **changes):
    parts = tuple(
        dataclasses.replace(part, **{key: value[i] for key, value in changes.items()})
        for i, part in enumerate(config.components)
    )
    return dataclasses.replace(config, components=parts)


def test_training_rows_come_at_the_rates_asked_for(config):
    examples = with_components(config, rate=(0.25, 0.75)).open_training(VOCABULARY, 64)
    assert shares(examples, 400) == [0.25, 0.75]
    texts = [VOCABULARY.decode(examples[i]['targets']) for i in range(8)]
    assert sum('books' in text for text in texts) == 6 and sum('web' in text for text in texts) == 2


def test_without_rates_sizes_and_temperature_decide(config):
    by_size = config.open_training(VOCABULARY, 64)
    sizes = [source.records.num_rows for source in by_size.sources]
    assert shares(by_size, sum(sizes)) == pytest.approx(np.divide(sizes, sum(sizes)), abs=1 / sum(sizes))
    flatter = dataclasses.replace(config, temperature=2.0).open_training(VOCABULARY, 64)
    roots = np.sqrt(sizes)
    assert shares(flatter, 10_000) == pytest.approx(roots / roots.sum(), abs=1e-3)
    clipped = dataclasses.replace(config, maximum_rows=min(sizes)).open_training(VOCABULARY, 64)
    assert shares(clipped, 1000) == [0.5, 0.5]


def test_a_component_with_an_epoch_limit_ends_and_the_rest_goes_on(config):
    examples = with_components(config, rate=(1, 1), max_epochs=(None, 2.0)).open_training(VOCABULARY, 64)
    limit = 2 * examples.sources[1].records.num_rows
    sources, _ = examples.schedule.locate(np.arange(10 * limit))
    assert (sources == 1).sum() == limit and examples.num_examples is None
    ending = with_components(config, rate=(1, 1), max_epochs=(1.0, 0.5))
    finite = ending.open_training(VOCABULARY, 64)
    rows = [source.records.num_rows for source in finite.sources]
    assert finite.num_examples == rows[0] + rows[1] // 2
    ending.open_training(VOCABULARY, 64, batch_size=1, total_steps=finite.num_examples)
    with pytest.raises(UserError, match='every component has had its max_epochs after'):
        ending.open_training(VOCABULARY, 64, batch_size=1, total_steps=finite.num_examples + 1)


def test_evaluation_sets_score_every_byte_once(config):
    sets = config.open_evaluation(VOCABULARY, 64)
    assert list(sets) == ['web', 'books']
    sharding = NamedSharding(make_mesh(MeshConfig(data=1), jax.devices()[:1]), PartitionSpec())
    for name, evaluation in sets.items():
        text, scored = b'', 0
        with Loader(evaluation.examples, 7, sharding) as loader:
            for step in range(evaluation.num_batches(7)):
                batch = {key: np.asarray(array) for key, array in loader.batch(step).items()}
                real = batch['loss_weights'] > 0
                scored += real.sum()
                text += VOCABULARY.decode_bytes(batch['targets'][real].tolist())
        assert scored == evaluation.num_tokens and evaluation.num_rows <= evaluation.num_batches(7) * 7
        assert len(text) == evaluation.num_bytes
        assert text.count(name.encode()) == evaluation.examples.cache.num_documents


def test_evaluation_may_be_of_other_sources_with_a_stride_and_fewer_documents(config, tmp_path):
    long = component(tmp_path, 'long', 40, length=300)
    other = dataclasses.replace(config, evaluation=(long,), evaluation_stride=16, evaluation_documents=5)
    (name, evaluation), *rest = other.open_evaluation(VOCABULARY, 64).items()
    assert name == 'long' and not rest
    everything = dataclasses.replace(other, evaluation_documents=None).open_evaluation(VOCABULARY, 64)['long']
    assert 0 < evaluation.num_bytes < everything.num_bytes == everything.examples.cache.num_bytes
    assert everything.num_tokens == everything.examples.cache.num_tokens
    with pytest.raises(UserError, match='stride of 100 is not between 1 and the sequence length 64'):
        dataclasses.replace(other, evaluation_stride=100).open_evaluation(VOCABULARY, 64)


def test_switches_reach_the_rows(config):
    apart = config.open_training(VOCABULARY, 256)[0]
    across = dataclasses.replace(config, attend_across_documents=True).open_training(VOCABULARY, 256)[0]
    assert apart['segment_ids'].max() > 1 and across['segment_ids'].max() == 1
    assert np.array_equal(apart['targets'], across['targets'])
    digests = {
        dataclasses.replace(config, **change).open_training(VOCABULARY, 256).digest
        for change in ({}, {'packing': 'concatenate'}, {'seed': 1}, {'attend_across_documents': True})
    }
    assert len(digests) == 4


def test_the_cache_is_found_by_environment_variable(config, tmp_path, monkeypatch):
    monkeypatch.setenv('LLM_CACHE', str(tmp_path / 'elsewhere'))
    examples = dataclasses.replace(config, cache_directory=None).open_training(VOCABULARY, 64)
    assert examples.sources[0].records.cache.directory.parent == tmp_path / 'elsewhere'
    monkeypatch.delenv('LLM_CACHE')
    assert default_cache_directory() == Path.home() / '.cache' / 'llm-jax' / 'tokens'


def test_facts_and_bad_records_for_the_report(config, tmp_path):
    (tmp_path / 'web' / 'b.jsonl').write_text('{"text": " "}\nnot json\n')
    examples = config.open_training(VOCABULARY, 64)
    figures = facts.facts(examples)
    cache = examples.sources[0].records.cache
    assert figures['web: documents'] == cache.num_documents and figures['web: bytes per token'] == 1.0
    assert figures['web: share of training rows'] + figures['books: share of training rows'] == 1.0
    report = facts.bad_records(source.records.cache for source in examples.sources)
    assert report['bad_records'] == {'empty': 1, 'left out': 1}
    assert [Path(example['where']).name for example in report['bad_examples']] == ['b.jsonl:2']
    json.dumps([figures, report])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'components': ()}, 'components is empty'),
        ({'temperature': 0.0}, 'temperature'),
        ({'evaluation_stride': 0}, 'evaluation_stride = 0'),
        ({'workers': -1}, 'workers = -1'),
    ],
)
def test_settings_out_of_range_are_refused(config, changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(config, **changes)


def test_contradicting_rates_are_refused(config):
    with pytest.raises(UserError, match='have rates, but not books'):
        with_components(config, rate=(0.5, None))
    with pytest.raises(UserError, match='temperature and maximum_rows are for components without rates'):
        dataclasses.replace(with_components(config, rate=(1, 2)), temperature=2.0)
    with pytest.raises(UserError, match='two of one name'):
        with_components(config, name=('a', 'a'))
    for rate in (0.0, -1.0, math.inf):
        with pytest.raises(UserError, match='is not positive'):
            with_components(config, rate=(rate, 1.0))


MIXTURE_OF_A_USER = """
import seqio, tensorflow as tf
def source(name, count):
    def dataset_fn(split, shuffle_files=False):
        return tf.data.Dataset.from_tensor_slices({"text": [f"{split} {name} {i}" for i in range(count)]})
    return seqio.FunctionDataSource(dataset_fn, splits=["train", "validation"], num_input_examples={"train": count})
rekey = lambda dataset: dataset.map(lambda x: {"targets": x["text"]})
features = {"targets": seqio.Feature(seqio.ByteVocabulary())}
for name, count in (("few", 20), ("many", 60)):
    seqio.TaskRegistry.add(name, source(name, count), features, [rekey, seqio.CacheDatasetPlaceholder()])
seqio.MixtureRegistry.add("few_and_many", ["few", "many"], default_rate=seqio.mixing_rate_num_examples)
"""


def test_a_seqio_mixture_becomes_ours(tmp_path, monkeypatch):
    (tmp_path / 'mixture_of_a_user.py').write_text(MIXTURE_OF_A_USER)
    monkeypatch.syspath_prepend(str(tmp_path))
    mixture = SeqioMixture('few_and_many', ('mixture_of_a_user',))
    config = DataConfig(mixture, cache_directory=str(tmp_path / 'cache'), workers=1)
    examples = config.open_training(ByteVocabulary(), 64)
    assert examples.names == ('few', 'many') and shares(examples, 80) == [0.25, 0.75]
    assert list(config.open_evaluation(ByteVocabulary(), 64)) == ['few', 'many']
    with pytest.raises(UserError, match='temperature'):
        dataclasses.replace(config, temperature=2.0)


@dataclasses.dataclass(frozen=True)
class ShowData:
    """A job that has data, for the gin files."""

    data: DataConfig

    def __call__(self, invocation):
        del invocation


def load(files, text, tmp_path):
    run = tmp_path / 'run.gin'
    lines = [f"include '{file}'" for file in files]
    imports = (
        'from __gin__ import dynamic_registration',
        'from llm.data import datasets',
        'from tests.data import test_datasets',
    )
    run.write_text('\n'.join([*imports, *lines]) + '\nJOB = @test_datasets.ShowData()\n' + text)
    return load_job([str(run)])[0].data


@pytest.mark.parametrize('piece', PIECES, ids=lambda path: path.stem)
def test_every_piece_makes_a_config(piece, tmp_path):
    files = {'text_files': '\nFILES = "x/*.txt"', 'mixture': '\nMIXTURE = "runs/x"'}.get(piece.stem, '')
    config = load([piece], f'test_datasets.ShowData.data = @datasets.DataConfig(){files}', tmp_path)
    if piece.stem == 'mixture':
        assert config.components == PreparedMixture('runs/x')
        return
    (only,) = config.components
    assert only.name == {'text_files': 'text'}.get(piece.stem, piece.stem)
    assert callable(only.source.shards)
    if isinstance(only.source, SeqioTask):
        assert only.source.task.startswith(piece.stem)


def test_pieces_join_to_a_mixture(tmp_path):
    text = (
        'test_datasets.ShowData.data = @datasets.DataConfig()\nTFDS_DIRECTORY = "/data"\n'
        'datasets.DataConfig.components = (@c4/datasets.Component(), @lm1b/datasets.Component(), '
        '@stdlib/datasets.Component())\n'
        'c4/datasets.Component.rate = 0.7\nlm1b/datasets.Component.rate = 0.2\nstdlib/datasets.Component.rate = 0.1\n'
        'stdlib/datasets.Component.max_epochs = 4\n'
    )
    files = [path for path in PIECES if path.stem in ('c4', 'lm1b', 'stdlib')]
    config = load(files, text, tmp_path)
    assert [(part.name, part.rate, part.max_epochs) for part in config.components] == [
        ('c4', 0.7, None),
        ('lm1b', 0.2, None),
        ('stdlib', 0.1, 4.0),
    ]
    assert [part.source.data_directory for part in config.components[:2]] == ['/data', '/data']
