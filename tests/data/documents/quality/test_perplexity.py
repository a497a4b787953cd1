"""The stage that filters by perplexity: buckets, limits, other limits for some documents, chances, references."""

import dataclasses
import pickle
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llm.data.documents.document import Document
from llm.data.documents.ngram_models.building import build_ngram_model
from llm.data.documents.ngram_models.estimating import KneserNey
from llm.data.documents.ngram_models.tokens import TokenConfig
from llm.data.documents.quality.gopher_quality import GopherQuality
from llm.data.documents.quality.perplexity import _MOST_FIGURES, Perplexity, PerplexityLimits, _Figures
from llm.data.documents.quality.rules import Chance, Exempt
from llm.errors import UserError
from tests.data.documents.ngram_models.made_up_text import TEXT, sentences

TEXTS = ['\n'.join(sentences(6, seed)) for seed in range(20, 50)]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp('ngram') / 'model'
    directory.mkdir()
    build_ngram_model(TEXT, TEXTS[:20], directory, config=KneserNey(3), tokens=TokenConfig('words'), min_tokens=20)
    return str(directory)


def document(name: str, text: str, **fields) -> Document:
    return Document(name, text, fields.pop('source', 'web'), **fields)


def removed(stage: Perplexity, documents: list[Document]) -> list[str]:
    return [done.id for done in stage(documents) if done.removed_by]


def test_buckets_are_written_and_decide(model):
    stage = Perplexity(model=model, limits=PerplexityLimits(buckets=('head', 'middle')))
    assert stage.rules == ('perplexity/range', 'perplexity/bucket')
    stage = pickle.loads(pickle.dumps(stage))
    documents = [document(str(i), text, metadata={'a': 1}) for i, text in enumerate(TEXTS[:20])]
    results = stage(documents)
    values = np.array([done.metadata['perplexity'] for done in results])
    head, middle = np.percentile(values, [30, 60])  # they are what the model was measured on
    names = np.where(values <= head, 'head', np.where(values <= middle, 'middle', 'tail'))
    assert [done.metadata['perplexity_bucket'] for done in results] == names.tolist() and len(set(names)) == 3
    assert [done.removed_by for done in results] == ['perplexity/bucket' if name == 'tail' else None for name in names]
    assert all(done.metadata['a'] == 1 and done.text == text for done, text in zip(results, TEXTS, strict=False))
    first, second = results[0].verdicts
    assert first.value == values[0] and second.value == ['head', 'middle', 'tail'].index(names[0])
    assert [stage([each])[0] for each in documents] == results  # to the last bit


def test_limits_exemptions_chances_and_what_is_not_judged(model):
    repeated = ' '.join(['eisb stem'] * 60)  # no such order of words in the text: high
    known = document('known', TEXT[0] + '\n' + '\n'.join(TEXT[:6]))
    documents = [known, *(document(f'{i}', text) for i, text in enumerate(TEXTS[:12])), document('rare', repeated)]
    values = [done.metadata['perplexity'] for done in Perplexity(model=model)(documents)]
    assert values[0] == min(values) and values[-1] == max(values)
    limits = PerplexityLimits(least=values[0] + 1, most=values[-1] - 1)
    stage = Perplexity(model=model, limits=limits)
    assert removed(stage, documents) == ['known', 'rare']
    exempt = (
        Exempt(PerplexityLimits(), sources=('books',)),
        Exempt(dataclasses.replace(limits, most=None), domains=('example.org',), languages=('de',)),
    )
    stage = dataclasses.replace(stage, exempt=exempt)
    others = [
        dataclasses.replace(documents[0], source='books'),
        dataclasses.replace(documents[-1], domain='de.example.org', language='de'),
        dataclasses.replace(documents[-1], id='other', domain='de.example.org', language='en'),
    ]
    assert removed(stage, others) == ['other']
    # Those that would go, with probabilities that depend on the figure: none, and all.
    chance = Chance('perplexity/range', ((values[0], 0.0), (values[-1], 1.0)))
    assert removed(dataclasses.replace(stage, chances=(chance,)), documents) == ['known']

    short, empty = stage([document('short', 'rare words here'), document('empty', '')])
    assert short.removed_by is None and 'perplexity' not in short.metadata and 'perplexity_bucket' not in empty.metadata
    assert [verdict.value for verdict in short.verdicts] == [None, None]
    before = document('again', 'too short', metadata={'perplexity': 3.0, 'perplexity_bucket': 'head'})
    assert stage([before])[0].metadata == {}


def test_models_and_boundaries_are_of_the_language(model, tmp_path):
    documents = [document(f'{i}', text, language='de' if i % 3 else 'en') for i, text in enumerate(TEXTS[:12])]
    stage = Perplexity(models=(('de', model),), boundaries=(('de', 0.5, 1e9),))
    assert [done.metadata.get('perplexity_bucket') for done in stage(documents)] == [None, 'middle', 'middle'] * 4

    value = stage([documents[1]])[0].metadata['perplexity']
    for head, middle, name in ((value, value, 'head'), (0.5, value, 'middle'), (0.5, value - 1e-9, 'tail')):
        edge = dataclasses.replace(stage, boundaries=(('de', head, middle),))
        assert edge([documents[1]])[0].metadata['perplexity_bucket'] == name
    table = pyarrow.table(
        {
            'language': [*(['de', 'de', 'en', None, None] * 20), 'fr'],
            'perplexity/range.value': pyarrow.array([*([0.0, 1e9, 1e9, 2.0, None] * 20), 1e9], pyarrow.float32()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / '0.parquet')
    stage = Perplexity(model=model, reference=str(tmp_path / '*.parquet'), percentiles=(0, 50))
    results = stage([dataclasses.replace(documents[0], language=code) for code in ('de', 'en', None, 'fr')])
    assert [done.metadata['perplexity_bucket'] for done in results[:3]] == ['middle', 'head', 'tail']
    # Of French it has one document only: the boundaries are the model's own.
    own = Perplexity(model=model, percentiles=(0, 50))([documents[0]])[0]
    assert results[3].metadata == own.metadata
    before = stage.identities()
    pyarrow.parquet.write_table(table.slice(1), tmp_path / '1.parquet')
    assert stage.identities() != before
    other = Perplexity(model=model, name='other', reference=str(tmp_path / '0.parquet'))
    with pytest.raises(UserError, match="is no ledger with figures of 'other/range'"):
        other([document('a', TEXTS[0])])


def test_a_reference_of_any_size_takes_bounded_memory():
    figures, number = _Figures(), 5 * _MOST_FIGURES // 2
    for part in np.split(np.arange(number, dtype=np.float32), [7, 10, 1_000_001, 3_000_000]):
        figures.add(part)
        assert sum(map(len, figures._parts)) <= _MOST_FIGURES
    np.testing.assert_array_equal(np.concatenate(figures._parts), np.arange(0, number, 4))
    np.testing.assert_allclose(figures.percentiles(), np.linspace(0, number - 4, 101))


def test_a_model_and_a_reference_that_are_replaced_are_read_again(model, tmp_path):
    shutil.copytree(model, tmp_path / 'model')
    stage = Perplexity(model=str(tmp_path / 'model'), reference=str(tmp_path / 'ledger.parquet'), min_tokens=1)

    def ledger(value):
        columns = {'language': [None] * 20, 'perplexity/range.value': pyarrow.array([value] * 20, pyarrow.float32())}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / 'ledger.parquet')

    ledger(1e9)
    first = stage([document('a', TEXTS[29])])[0].metadata
    ledger(0.5)
    second = stage([document('a', TEXTS[29])])[0].metadata
    assert (first['perplexity_bucket'], second['perplexity_bucket']) == ('head', 'tail')
    shutil.rmtree(tmp_path / 'model')
    build_ngram_model(TEXTS[25:], [], tmp_path / 'model', config=KneserNey(2), tokens=TokenConfig('words'))
    third = stage([document('a', TEXTS[29])])[0].metadata
    assert third['perplexity'] < second['perplexity'] == first['perplexity']


def test_mistakes_are_told(model):
    for what, settings in (
        ('there is no model', {}),
        ('min_tokens', {'min_tokens': 0}),
        ('percentiles', {'percentiles': (60, 30)}),
        ("boundaries of 'de'", {'boundaries': (('de', 3.0, 2.0),)}),
        ('no set has a rule', {'chances': (Chance('perplexity', ((0.0, 1.0),)),)}),
        ('exempt has GopherQuality', {'exempt': (Exempt(GopherQuality()),)}),
    ):
        with pytest.raises(UserError, match=what):
            Perplexity(**({'model': model} if settings else {}), **settings)
    for settings in ({'least': 2.0, 'most': 1.0}, {'buckets': ('top',)}):
        with pytest.raises(UserError):
            PerplexityLimits(**settings)
